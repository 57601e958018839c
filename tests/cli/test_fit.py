"""moe-infinity fit: what is fitted lands where a run looks for it; what cannot be is refused."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from moe_infinity.cli.fit import learners
from moe_infinity.config import learned_path
from moe_infinity.policies import find_policy
from moe_infinity.predictors import find_predictor
from moe_infinity.tracing.trace import Trace
from moe_infinity.tracing.trace_file import save_trace
from support.command_line import refused, run
from support.learnable import by_embedding, by_hidden, with_logits
from support.traces import random_trace

WATCHING = {"popularity", "transition", "transition_pairs", "eamc", "expert_map"}


@pytest.fixture(autouse=True)
def state(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MOE_INFINITY_STATE_DIR", str(tmp_path / "state"))


def written(folder: Path, trace: Trace, name: str = "trace", fingerprint: str = "f1") -> Path:
    path = folder / f"{name}.safetensors"
    save_trace(replace(trace, meta={"name": name, "fingerprint": fingerprint}), path)
    return path


def full_trace(tokens: int) -> Trace:
    """Hidden states, embeddings and logits."""
    embedded = with_logits(by_embedding(tokens, 1))
    return replace(embedded, hidden=by_hidden(tokens, 1).hidden)


def test_all_that_learn_are_offered() -> None:
    assert set(learners()) >= WATCHING | {"weighted", "learned", "sequence", "gate_lookahead"}
    assert not set(learners()) & {"lru", "none", "oracle", "next_use"}


@pytest.mark.parametrize("name", sorted(WATCHING | {"weighted", "learned", "sequence"}))
def test_fits_to_where_a_run_looks(name: str, tmp_path: Path) -> None:
    trace = full_trace(60)
    result = run("fit", name, written(tmp_path, trace), "--json", "--capacity", "50%")
    assert result.code == 0, result.both
    answer = json.loads(result.out)
    assert answer["name"] == name and answer["measures"]
    assert Path(answer["path"]) == learned_path("f1", name)
    fitted = find_policy(name)(trace.shape, 20) if name == "weighted" else None
    member = fitted or find_predictor(name)(trace.shape)
    member.fingerprint = "f1"
    member.load(learned_path("f1", name))


def test_several_traces_are_fitted_together(tmp_path: Path) -> None:
    paths = [written(tmp_path, by_hidden(40, seed), f"t{seed}") for seed in (1, 2)]
    result = run("fit", "popularity", *paths, "-o", tmp_path / "out.safetensors")
    assert result.code == 0, result.both
    assert "80 tokens" in result.out and "validation_recall" in result.out
    assert (tmp_path / "out.safetensors").is_file()


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    trace = written(tmp_path, by_hidden(40, 1))
    (tmp_path / "file").write_text("no folder")
    message = refused("fit", "popularity", trace, "-o", tmp_path / "file" / "out.safetensors")
    assert "expected to write what is learned there; say where else with -o" in message


def test_traces_of_two_models_are_refused(tmp_path: Path) -> None:
    one = written(tmp_path, by_hidden(20, 1), "one")
    smaller = written(tmp_path, random_trace(2, 4, 2, 20, seed=0), "two")
    other = written(tmp_path, by_hidden(20, 1), "three", fingerprint="f2")
    assert "one model" in refused("fit", "popularity", one, smaller)
    assert "f2" in refused("fit", "popularity", one, other)


@pytest.mark.parametrize(
    ("name", "missing", "option"),
    [
        ("learned", "router inputs", "--hidden"),
        ("sequence", "embeddings", "--hidden"),
        ("expert_map", "router logits", "--logits"),
    ],
)
def test_says_what_the_trace_lacks(name: str, missing: str, option: str, tmp_path: Path) -> None:
    message = refused("fit", name, written(tmp_path, random_trace(3, 8, 2, 40, seed=0)))
    assert missing in message and f"trace {option}" in message


def test_an_unknown_checkpoint_needs_a_place(tmp_path: Path) -> None:
    path = written(tmp_path, random_trace(3, 8, 2, 40, seed=0), fingerprint="")
    assert "-o" in refused("fit", "popularity", path)
    assert run("fit", "popularity", path, "-o", tmp_path / "out.safetensors").code == 0


def test_bad_names_and_values_are_refused(tmp_path: Path) -> None:
    path = written(tmp_path, random_trace(3, 8, 2, 40, seed=0))
    assert "transition_pairs" in refused("fit", "nonsense", path)
    assert "nothing to fit" in refused("fit", "lru", path)
    assert "nothing to fit" in refused("fit", "moe_infinity.policies.lru:Policy", path)
    assert "--capacity" in refused("fit", "weighted", path, "--capacity", "some")
    assert "slots" in refused("fit", "weighted", path, "--capacity", "1%")
    assert "no such file" in refused("fit", "popularity", tmp_path / "absent.safetensors")
    lonely = written(tmp_path, by_hidden(10, 0), "lonely")
    assert "at least 2" in refused("fit", "learned", lonely)
    assert run("fit", "popularity", lonely).code == 0
