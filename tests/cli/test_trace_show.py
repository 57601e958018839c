"""``moe-infinity trace-show``: its picture in the terminal, its JSON, its PNG, its refusals."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from moe_infinity.tracing.trace import Trace
from moe_infinity.tracing.trace_file import save_trace
from support.command_line import refused, run
from support.routing import grid, random_decode

NUM_LAYERS, NUM_EXPERTS, TOP_K, NUM_TOKENS = 4, 16, 2, 60
BLOCKS = set("░▒▓█")


@pytest.fixture
def trace_path(tmp_path: Path) -> Path:
    """Four requests of two domains, with the locality of real routing."""
    return write_trace(tmp_path / "small.safetensors")


def write_trace(path: Path, num_layers: int = NUM_LAYERS, phase: int = 1) -> Path:
    shape = grid(num_layers, NUM_EXPERTS, TOP_K)
    events = random_decode(shape, NUM_TOKENS, seed=1)
    ids = np.concatenate([each.top_k_index for each in events]).reshape(-1, num_layers, TOP_K)
    trace = Trace(
        shape=shape,
        step=np.arange(NUM_TOKENS, dtype=np.int32),
        request=(np.arange(NUM_TOKENS) // 15).astype(np.int32),
        position=(np.arange(NUM_TOKENS) % 15).astype(np.int32),
        phase=np.full(NUM_TOKENS, phase, dtype=np.int8),
        ids=ids.astype(np.int16),
        weights=np.ones(ids.shape, dtype=np.float32),
        token_ids=np.full(NUM_TOKENS, -1, dtype=np.int32),
        meta={
            "name": "small model",
            "domains": {"0": "maths", "1": "prose", "2": "maths", "3": "prose"},
        },
    )
    save_trace(trace, path)
    return path


class TestOutput:
    def test_text(self, trace_path: Path) -> None:
        result = run("trace-show", trace_path)
        assert result.code == 0, result.both
        assert "small model: 60 tokens decoded, 4 layers, top 2 of 16 experts" in result.out
        assert "caching pays" in result.out
        assert "Belady (optimum)" in result.out
        assert "distance of 2 domains" in result.out
        assert result.err == "", "the spinner is for terminals"

    def test_heat_map_has_a_line_per_layer(self, trace_path: Path) -> None:
        assert heat_map(run("trace-show", trace_path).out) == ["0", "1", "2", "3"]

    def test_many_layers_share_lines(self, tmp_path: Path) -> None:
        path = write_trace(tmp_path / "deep.safetensors", num_layers=60)
        labels = heat_map(run("trace-show", path, "--events", "60").out)
        assert labels == [str(layer) for layer in range(0, 60, 2)]

    def test_json(self, trace_path: Path) -> None:
        result = run("trace-show", trace_path, "--json")
        assert result.code == 0 and result.err == ""
        found = json.loads(result.out)
        assert found["version"] == 1
        assert (found["name"], found["num_tokens"], found["num_requests"]) == ("small model", 60, 4)
        assert np.shape(found["use"]) == (NUM_LAYERS, NUM_EXPERTS)
        assert np.sum(found["use"]) == pytest.approx(NUM_LAYERS * TOP_K, abs=1e-3)
        assert len(found["reuse_per_layer"]) == len(found["entropy_per_layer"]) == NUM_LAYERS
        assert found["reuse_by_chance"] == TOP_K / NUM_EXPERTS < found["reuse"] < 1
        assert found["reuse_ratio"] == pytest.approx(found["reuse"] / found["reuse_by_chance"])
        assert found["domains"]["names"] == ["maths", "prose"]
        assert np.shape(found["domains"]["distance"]) == (2, 2)
        assert [each["segment_tokens"] for each in found["coverage"]] == [4, 4]
        assert [each["experts"] for each in found["busiest"]] == [0.1, 0.25, 0.5]
        for point in found["hit_rates"]:
            assert max(point["next_use"], point["lru"]) <= point["belady"] <= 1
        assert found["verdict"]

    def test_events_bound_the_replay(self, trace_path: Path) -> None:
        found = json.loads(run("trace-show", trace_path, "--json", "--events", "40").out)
        assert found["tokens_replayed"] == 10
        assert found["num_tokens"] == NUM_TOKENS

    def test_png(self, trace_path: Path, tmp_path: Path) -> None:
        picture = tmp_path / "pictures" / "small.png"
        result = run("trace-show", trace_path, "--png", picture)
        assert result.code == 0, result.both
        assert picture.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
        assert picture.stat().st_size > 20_000


class TestRefusals:
    def test_no_file(self, tmp_path: Path) -> None:
        assert "no such file; expected a trace" in refused("trace-show", tmp_path / "none.npz")

    def test_truncated(self, trace_path: Path) -> None:
        data = trace_path.read_bytes()
        trace_path.write_bytes(data[: len(data) // 2])
        message = refused("trace-show", trace_path)
        assert trace_path.name in message and "truncated" in message

    def test_of_a_later_version(self, trace_path: Path) -> None:
        with safe_open(trace_path, framework="numpy") as file:
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            header = file.metadata()
        save_file(arrays, trace_path, header | {"version": "99"})
        message = refused("trace-show", trace_path)
        assert "version '99', this program reads up to" in message

    def test_no_decode_rows(self, tmp_path: Path) -> None:
        path = write_trace(tmp_path / "prompt.safetensors", phase=0)
        assert "no tokens of phase 'decode'" in refused("trace-show", path)

    def test_a_picture_that_cannot_be_written(self, trace_path: Path, tmp_path: Path) -> None:
        folder = tmp_path / "folder.png"
        folder.mkdir()
        assert "cannot be written" in refused("trace-show", trace_path, "--png", folder)
        message = refused("trace-show", trace_path, "--png", tmp_path / "prompts.jsonl")
        assert "expected a name ending in .png" in message


def heat_map(out: str) -> list[str]:
    """The layers that label its lines."""
    lines = [line for line in out.splitlines() if line[:5].strip().isdecimal()]
    return [line[:5].strip() for line in lines if BLOCKS & set(line)]
