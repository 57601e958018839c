"""``moe-infinity trace`` and ``simulate``: from prompts to a table, and what they refuse."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moe_infinity.errors import ConfigError
from moe_infinity.simulator import sweep
from moe_infinity.tracing.trace_file import load_trace, save_trace
from support.command_line import refused, run
from support.traces import trace_of

COLUMNS = ["trace", "policy", "prefetch", "capacity", "slots", "hits", "misses", "late", "hit_rate"]
COLUMNS += ["demand_loads", "proactive_loads", "wasted_loads", "stall_s"]


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trace")
    prompts, path = folder / "prompts.jsonl", folder / "out.safetensors"
    lines = [{"prompt": "def main():", "task": "code"}, {"prompt": "In the beginning"}]
    prompts.write_text("\n".join(json.dumps(line) for line in lines) + "\n\n")
    options = ("--max-new-tokens", 6, "--logits", "--hidden", "--foresight", 2, "--ram-slots", 64)
    result = run("trace", "--prompts", prompts, "-o", path, *options)
    assert result.code == 0, result.both
    assert "trace-show" in result.out
    return path


def rows(*arguments: object) -> list[dict[str, Any]]:
    result = run("simulate", *arguments, "--json", "--processes", 1)
    assert result.code == 0, result.both
    return json.loads(result.out)


def test_a_recorded_trace_holds_what_was_asked_for(recorded: Path) -> None:
    trace = load_trace(recorded)
    assert trace.ids.shape[1:] == (8, 4)
    assert (trace.ids >= 0).all()
    assert trace.logits is not None and trace.logits.shape[1:] == (8, 32)
    assert trace.hidden is not None and trace.hidden.shape[1:] == (8, 192)
    assert trace.embeddings is not None and np.abs(trace.embeddings).sum() > 0
    assert {mode: s.shape[2] for mode, s in trace.foresight.items()} == {
        "raw": 2,
        "residual": 2,
        "next_norm": 2,
    }
    assert (trace.domain(0), trace.domain(1)) == ("code", "unknown")
    decode = trace.of_phase("decode")
    assert [int((decode.request == r).sum()) for r in (0, 1)] == [5, 5]  # of six, the first is
    assert trace.fingerprint is not None  # the prompt's
    ranked = np.argsort(-trace.logits.astype(np.float32), axis=2)[..., :4]
    agree = (np.sort(ranked) == np.sort(trace.ids)).all(axis=2).mean()
    assert agree > 0.98  # half precision may tie


def test_one_array_of_rows(made_up: Path) -> None:
    found = rows(made_up, "--policy", "lru,belady", "--prefetch", "none,oracle", "--load-ms", 1)
    assert [list(row) for row in found] == [COLUMNS] * 9  # belady only without prefetch
    for row in found:
        assert row["hits"] + row["misses"] + row["late"] == 40 * 3 * 2
        assert row["hit_rate"] == pytest.approx(row["hits"] / 240)
        assert 0 <= row["hit_rate"] <= 1
    oracle = [row for row in found if row["prefetch"] == "oracle"]
    assert any(row["proactive_loads"] > 0 for row in oracle)


def test_what_a_trace_lacks_reads_not_available(made_up: Path) -> None:
    options = ("--policy", "lru", "--prefetch", "auto", "--capacity", "25%", "--processes", 1)
    result = run("simulate", made_up, *options, "--json")
    (row,) = json.loads(result.out)
    assert row["prefetch"] == "gate_lookahead"
    assert row["hit_rate"] == row["stall_s"] == "n/a"
    assert row["slots"] == 12
    assert "holds no foresight in mode residual" in result.err


def test_recorded_foresight_serves_the_simulator(recorded: Path) -> None:
    options = ("--policy", "lru", "--capacity", "0.25", "--phase", "all")
    (row,) = rows(recorded, *options, "--prefetch", "gate_lookahead")
    assert row["proactive_loads"] > 0


def test_everything_is_drawn_as_far_as_it_is_there(made_up: Path, tmp_path: Path) -> None:
    """Bounds have no time, and of some predictors the trace holds nothing."""
    pytest.importorskip("matplotlib")
    options = ("--policy", "all", "--prefetch", "none,gate_lookahead", "--capacity", "25%")
    result = run("simulate", made_up, *options, "--load-ms", 1, "--plot", tmp_path / "all.png")
    assert result.code == 0, result.both
    assert "belady_bypass" in result.out
    assert (tmp_path / "all.png").read_bytes()[:4] == b"\x89PNG"


def test_who_has_learned_nothing_is_named(made_up: Path) -> None:
    options = ("--policy", "lru", "--capacity", "25%")
    assert "fit it before" not in run("simulate", made_up, *options).err
    result = run("simulate", made_up, *options, "--prefetch", "learned", "--phase", "all")
    assert "holds no router inputs" in result.err or "moe-infinity fit learned" in result.err


OWN = {
    "abstract": "class Policy(CachePolicy): pass",
    "raises": "class Policy(Lru):\n    def __init__(self, *args): raise RuntimeError('no')",
    "few": "class Policy(Lru):\n    def __init__(self, shape, num_slots): pass",
    "syntax": "class Policy(Lru:",
}


@pytest.mark.parametrize("fault", sorted(OWN))
def test_a_policy_of_ones_own_that_is_wrong(
    fault: str, made_up: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    head = "from moe_infinity.policies.base import CachePolicy\n"
    head += "from moe_infinity.policies.lru import Policy as Lru\n"
    (tmp_path / f"own_{fault}.py").write_text(head + OWN[fault])
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match=f"own_{fault}"):
        sweep.run(
            sweep.tasks_of([made_up], [f"own_{fault}:Policy"], ["none"], [0.25]), num_processes=1
        )


def test_a_table_for_people(made_up: Path) -> None:
    result = run("simulate", made_up, "--capacity", "25%", "--scope", "layer")
    assert result.code == 0
    assert "next_use" in result.out and "25.0%" in result.out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--policy", "nosuch"), "unknown policy 'nosuch'"),
        (("--policy", ","), "expected names"),
        (("--policy", "belady", "--prefetch", "oracle"), "the oracles are bounds"),
        (("--plot", "prompts.jsonl"), "expected a name ending in .png"),
        (("--prefetch", "nosuch"), "unknown predictor 'nosuch'"),
        (("--capacity", "0%"), "--capacity: got '0%'"),
        (("--capacity", "nan"), "--capacity: got 'nan'"),
        (("--capacity", "200%"), "expected shares"),
        (("--capacity", "3%"), "one token's experts of a layer; ask for 4.2% or more"),
        (("--scope", "tribal"), "expected one of global, layer"),
        (("--phase", "half"), "expected one of decode, prefill, all"),
        (("--phase", "prefill"), "got no tokens of phase 'prefill'"),
    ],
)
def test_refuses(made_up: Path, arguments: tuple[str, ...], message: str) -> None:
    assert message in refused("simulate", made_up, "--processes", 1, *arguments)


def test_refuses_spoiled_traces(made_up: Path, tmp_path: Path) -> None:
    whole = made_up.read_bytes()
    spoiled = tmp_path / "spoiled.safetensors"
    for content, message in (
        (whole[: len(whole) // 2], "spoiled or truncated"),
        (whole.replace(b'"version":"1"', b'"version":"9"'), "this program reads up to 1"),
        (whole.replace(b"moe-infinity-trace", b"moe-infinity-other"), "expected a"),
        (b"", "spoiled or truncated"),
    ):
        spoiled.write_bytes(content)
        assert message in refused("simulate", spoiled, "--processes", 1)
    assert "no such file" in refused("simulate", tmp_path / "nothing.npz", "--processes", 1)
    (tmp_path / "bad.npz").write_bytes(b"PK\x03\x04 no archive")
    assert "not a readable trace" in refused("simulate", tmp_path / "bad.npz", "--processes", 1)


def test_refuses_ids_out_of_range_and_missing_rows(tmp_path: Path) -> None:
    path = tmp_path / "t.npz"
    ids = np.zeros((4, 2, 2), dtype=np.int16)
    ids[..., 1] = 1
    fields = {
        "w": np.ones((4, 2, 2), dtype=np.float32),
        "layers": np.arange(2),
        "req": np.zeros(4, dtype=np.int32),
        "pos": np.arange(4, dtype=np.int32),
        "phase": np.zeros(4, dtype=np.int8),
        "meta": json.dumps({"model": "m", "n_experts": 8}),
    }
    beyond = ids.copy()
    beyond[2, 1, 0] = 8
    np.savez(path, ids=beyond, **fields)
    message = refused("simulate", path, "--processes", 1)
    assert "token 2, layer 1 has expert 8, expected 0 to 7 or -1" in message
    missing = ids.copy()
    missing[1, 1] = -1
    np.savez(path, ids=missing, **fields)
    message = refused("simulate", path, "--phase", "prefill", "--processes", 1)
    assert "1 of 4 tokens have no experts recorded" in message


def test_history_of_another_model_is_refused(made_up: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.safetensors"
    save_trace(trace_of(np.zeros((3, 5, 1), dtype=np.int16), num_experts=4), other)
    options = ("--prefetch", "eamc", "--processes", 1)
    message = refused("simulate", made_up, "--history", other, *options)
    assert "is of a model with" in message


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is empty"),
        ("no json\n", "line 1 is not a JSON object"),
        ('{"prompt": "a"}\n{"task": "b"}\n', 'line 2 has no "prompt"'),
        ("[1]\n", "line 1 is not a JSON object"),
    ],
)
def test_trace_refuses_bad_prompts(tmp_path: Path, content: str, message: str) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(content)
    out = tmp_path / "out.safetensors"
    assert message in refused("trace", "--prompts", prompts, "-o", out)
    assert not out.exists()


def test_trace_refuses_other_suffixes_and_missing_prompts(tmp_path: Path) -> None:
    missing = tmp_path / "none.jsonl"
    assert "cannot read" in refused("trace", "--prompts", missing, "-o", tmp_path / "o.safetensors")
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "a"}')
    message = refused("trace", "--prompts", prompts, "-o", tmp_path / "out.npz")
    assert "ending in .safetensors" in message
