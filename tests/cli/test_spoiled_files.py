"""Checkpoints that are damaged, or change while they are used: one message, exit code 2."""

import json
import os
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from support.checkpoints import (
    bundled_copy,
    edit_config,
    edit_header,
    first_expert,
    truncate,
    weights,
)
from support.command_line import Process, assert_refused, refused, run

IDS = ("--ids", "1,2,3")
PATIENCE_S = 120


class TestSpoiledFiles:
    def test_no_weights(self, tiny: Path) -> None:
        weights(tiny).unlink()
        assert "got no *.safetensors file, expected model.safetensors" in refused("run", tiny, *IDS)

    def test_a_shard_is_missing(self, tiny: Path) -> None:
        _shard(tiny)
        (tiny / "model-00002-of-00002.safetensors").unlink()
        message = refused("run", tiny, *IDS)
        assert "1 of 2 shards are missing (model-00002-of-00002.safetensors)" in message
        assert "download them again" in message

    def test_an_index_promises_too_much(self, tiny: Path) -> None:
        _shard(tiny, promised={"model.no.such.weight": "model-00001-of-00002.safetensors"})
        message = refused("plan", tiny)
        assert "promises 1 tensors that its shards lack (first: 'model.no.such.weight')" in message

    @pytest.mark.parametrize("text", ["{", "{}", '{"weight_map": 5}', '{"weight_map": {}}'])
    def test_an_index_that_is_none(self, tiny: Path, text: str) -> None:
        (tiny / "model.safetensors.index.json").write_text(text)
        assert "model.safetensors.index.json" in refused("run", tiny, *IDS)

    @pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.999])
    def test_truncated(self, tiny: Path, share: float) -> None:
        truncate(tiny, share)
        message = refused("run", tiny, *IDS)
        assert "model.safetensors" in message and "truncated" in message

    def test_text_instead_of_weights(self, tiny: Path) -> None:
        weights(tiny).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
        assert "not safetensors" in refused("run", tiny, *IDS)

    @pytest.mark.parametrize("header", [b"{", b"[]", b"5", b'{"a": 5}', b'{"a": {"dtype": "F32"}}'])
    def test_a_header_that_is_none(self, tiny: Path, header: bytes) -> None:
        weights(tiny).write_bytes(struct.pack("<Q", len(header)) + header + bytes(4096))
        assert "model.safetensors" in refused("run", tiny, *IDS)

    def _with(self, tiny: Path, change: Callable[[dict[str, Any]], None]) -> str:
        edit_header(tiny, change)
        message = refused("run", tiny, *IDS)
        assert str(tiny) in message or "expert" in message
        return message

    def test_offsets_outside_the_file(self, tiny: Path) -> None:
        def change(header: dict[str, Any]) -> None:
            entry = first_expert(header)
            length = entry["data_offsets"][1] - entry["data_offsets"][0]
            entry["data_offsets"] = [10**9, 10**9 + length]

        message = self._with(tiny, change)
        assert "claims bytes 1000000000 to" in message and "there are" in message

    def test_overlap(self, tiny: Path) -> None:
        def change(header: dict[str, Any]) -> None:
            experts = [v for k, v in header.items() if ".experts." in k]
            experts[1]["data_offsets"] = list(experts[0]["data_offsets"])

        assert "overlap, expected them apart" in self._with(tiny, change)

    def test_a_wrong_dtype(self, tiny: Path) -> None:
        def change(header: dict[str, Any]) -> None:
            first_expert(header)["dtype"] = "BF16"

        assert "has 2048 bytes, expected those of BF16 with shape" in self._with(tiny, change)

    def test_an_unknown_dtype(self, tiny: Path) -> None:
        def change(header: dict[str, Any]) -> None:
            for name, entry in header.items():
                if ".experts." in name:
                    entry["dtype"] = "Q4_K"

        assert "stored as Q4_K, expected one of" in self._with(tiny, change)

    def test_a_shape_the_config_contradicts(self, tiny: Path) -> None:
        def change(header: dict[str, Any]) -> None:
            for name, entry in header.items():
                if ".experts." in name:
                    entry["shape"] = entry["shape"][::-1]

        message = self._with(tiny, change)
        assert "in the checkpoint, expected [8," in message and "from its config" in message

    def test_one_expert_with_another_shape(self, tiny: Path) -> None:
        def change(header: dict[str, Any]) -> None:
            first_expert(header)["shape"] = first_expert(header)["shape"][::-1]

        self._with(tiny, change)

    def test_a_dense_tensor_with_another_shape(self, tiny: Path) -> None:
        def change(header: dict[str, Any]) -> None:
            header["lm_head.weight"]["shape"] = header["lm_head.weight"]["shape"][::-1]

        self._with(tiny, change)

    def test_negative_sizes(self, tiny: Path) -> None:
        def change(header: dict[str, Any]) -> None:
            first_expert(header)["data_offsets"] = [-8, 8]

        self._with(tiny, change)

    @pytest.mark.parametrize("word", [".experts.0.gate_proj", ".layers.1.", "lm_head", "q_proj"])
    def test_a_tensor_is_missing(self, tiny: Path, word: str) -> None:
        def change(header: dict[str, Any]) -> None:
            name = next(name for name in header if word in name)
            del header[name]

        self._with(tiny, change)

    def test_more_experts_to_a_token_than_there_are(self, tiny: Path) -> None:
        edit_config(tiny, num_experts_per_tok=99)
        assert "num_experts_per_tok: got 99, expected at most" in refused("run", tiny, *IDS)

    def test_more_layers_in_the_config_than_on_disk(self, tiny: Path) -> None:
        edit_config(tiny, num_hidden_layers=4)
        message = refused("run", tiny, *IDS)
        assert "expected all" in message or "lacks" in message


def _shard(path: Path, promised: dict[str, str] | None = None) -> None:
    """The one file as two, with an index."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(weights(path))
    weights(path).unlink()
    names = sorted(tensors)
    index = {}
    for number, part in enumerate((names[::2], names[1::2]), start=1):
        file = f"model-0000{number}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, path / file)
        index |= dict.fromkeys(part, file)
    text = json.dumps({"metadata": {}, "weight_map": index | (promised or {})})
    (path / "model.safetensors.index.json").write_text(text)


def test_shards_themselves_are_fine(tiny: Path) -> None:
    whole = json.loads(run("run", tiny, *IDS, "--max-new-tokens", 4, "--json").out)
    _shard(tiny)
    shards = json.loads(run("run", tiny, *IDS, "--max-new-tokens", 4, "--json").out)
    assert shards["token_ids"] == whole["token_ids"]


class TestInMidGeneration:
    def test_the_disk_fails(self) -> None:
        result = run("run", "hello", "--policy", "failing_disk:Policy", "--ram-slots", 40)
        assert_refused(result)
        assert "40 of 256 experts fit" in result.err  # the model was open
        assert "model.safetensors: reading" in result.err
        assert "failed with Input/output error; check the disk" in result.err

    def test_the_checkpoint_changes(self, tmp_path: Path) -> None:
        path = bundled_copy(tmp_path / "copy")
        pipe, out, err = (tmp_path / name for name in ("pipe", "out", "err"))
        os.mkfifo(pipe)
        process = Process(("chat", path), stdin=str(pipe), stdout=str(out), stderr=str(err))
        with pipe.open("w") as keyboard:
            deadline = time.monotonic() + PATIENCE_S
            while not out.exists() or "> " not in out.read_text():
                assert time.monotonic() < deadline
                time.sleep(0.01)
            truncate(path)
            keyboard.write("hello\n")
        assert process.wait() == (2, False)
        message = err.read_text()
        assert "model.safetensors changed on disk since it was opened" in message
        assert "open the model again" in message and "Traceback" not in message
