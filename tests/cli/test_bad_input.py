"""Every bad input ends in one message (got, expected, what to do) and exit code 2."""

import json
import os
import signal
import struct
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moe_infinity import bundled_model_path
from support import command_line
from support.checkpoints import (
    bundled_copy,
    bundled_links,
    dense_checkpoint,
    edit_config,
    edit_header,
    first_expert,
    tiny_checkpoint,
    truncate,
    weights,
)
from support.command_line import Process, Result, run

IDS = ("--ids", "1,2,3")
PATIENCE_S = 120


def refused(*arguments: object, **options: Any) -> str:
    """The message of a command that is refused as it should be."""
    result = run(*arguments, **options)
    _assert_refused(result)
    return result.err


def _assert_refused(result: Result) -> None:
    assert result.code == 2, result.both
    assert "Traceback" not in result.both
    assert result.out == ""
    assert result.err.count("error:") == 1
    assert not result.left_running


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    return tiny_checkpoint(tmp_path / "tiny")


class TestNoModel:
    def test_no_such_path(self) -> None:
        for command in (("run", "/no/such/path", "hi"), ("plan", "/no/such"), ("chat", "/no/such")):
            message = refused(*command)
            assert "/no/such" in message
            assert "got neither an existing folder nor a hub id" in message
            assert "such as Qwen/Qwen3-30B-A3B" in message

    def test_no_such_path_with_ids(self) -> None:
        """A lone positional is no prompt where the prompt is given in ids."""
        assert "/no/such/path: got neither" in refused("run", "/no/such/path", *IDS)

    def test_no_such_hub_id(self) -> None:
        for command in (("run", "nobody/nothing", "hi"), ("plan", "nobody/nothing")):
            assert "nobody/nothing: no folder of this name here" in refused(*command)

    def test_no_home(self) -> None:
        assert "~nobody-has-this-name" in refused("run", "~nobody-has-this-name/model", "hi")

    def test_a_path_too_long(self) -> None:
        assert "got neither" in refused("run", "x" * 5000, "hi")

    def test_no_config(self, tmp_path: Path) -> None:
        for command in ("run", "plan", "chat"):
            message = refused(command, tmp_path)
            assert "has no config.json, expected a model's folder" in message

    @pytest.mark.parametrize("text", ["", "{", "[]", '"text"', "\0", '{"model_type": 5}', "{}"])
    def test_a_config_that_is_none(self, tiny: Path, text: str) -> None:
        (tiny / "config.json").write_text(text)
        assert "config.json" in refused("run", tiny, *IDS)

    @pytest.mark.parametrize(
        "changes",
        [
            {"num_hidden_layers": "three"},
            {"hidden_act": "nosuch"},
            {"dtype": "nosuch"},
            {"head_dim": 7},
            {"vocab_size": 95},
            {"model_type": "nosuch", "architectures": ["NoSuchForCausalLM"]},
            {"num_attention_heads": None},
        ],
    )
    def test_a_config_that_makes_no_sense(self, tiny: Path, changes: dict[str, Any]) -> None:
        edit_config(tiny, **changes)
        assert str(tiny) in refused("run", tiny, *IDS)

    def test_a_config_that_is_a_folder(self, tiny: Path) -> None:
        (tiny / "config.json").unlink()
        (tiny / "config.json").mkdir()
        assert "config.json" in refused("plan", tiny)

    def test_a_file_is_no_folder(self, tiny: Path) -> None:
        assert "model.safetensors" in refused("plan", weights(tiny))


class TestNotAnMoE:
    def test_dense(self, tmp_path: Path) -> None:
        path = dense_checkpoint(tmp_path / "dense")
        for command in (("run", path, *IDS), ("plan", path)):
            message = refused(*command)
            assert "model type 'llama' has no routed experts" in message
            assert "expected a Mixture-of-Experts model such as" in message
            assert "run a dense model with transformers" in message

    def test_quantised(self, tiny: Path) -> None:
        edit_config(tiny, quantization_config={"quant_method": "gptq", "bits": 4})
        message = refused("run", tiny, *IDS)
        assert "the weights are quantised (gptq)" in message
        assert "bf16, fp16 and fp32" in message


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

        assert "overlap; the header lies" in self._with(tiny, change)

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


class TestInMidGeneration:
    def test_the_disk_fails(self) -> None:
        result = run("run", "hello", "--policy", "failing_disk:Policy", "--ram-slots", 40)
        _assert_refused(result)
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


def test_a_reader_that_leaves(tmp_path: Path) -> None:
    """As ``moe-infinity run ... | head``."""
    pipe, err = tmp_path / "pipe", tmp_path / "err"
    os.mkfifo(pipe)
    arguments = ("run", "--max-new-tokens", 500, "--ignore-eos", "hi")
    process = Process(arguments, stdin=os.devnull, stdout=str(pipe), stderr=str(err))
    with pipe.open("rb", buffering=0) as reader:
        assert reader.read(1)
    code, left_running = process.wait()
    assert code not in (0, 2) and not left_running
    assert "Traceback" not in err.read_text() and "Exception" not in err.read_text()


def test_shards_themselves_are_fine(tiny: Path) -> None:
    whole = json.loads(run("run", tiny, *IDS, "--max-new-tokens", 4, "--json").out)
    _shard(tiny)
    shards = json.loads(run("run", tiny, *IDS, "--max-new-tokens", 4, "--json").out)
    assert shards["token_ids"] == whole["token_ids"]


class TestBudget:
    def test_too_small(self) -> None:
        for command in (("run", "hi"), ("plan",), ("chat",)):
            message = refused(*command, "--ram", "100MiB")
            assert "will not fit into ram=100.00 MiB" in message
            assert "dense weights" in message and "sum, of 100.00 MiB" in message
            assert "the smallest budget that works is" in message

    @pytest.mark.parametrize("size", ["8XB", "-1", "0", "", "0.4B", "9" * 5000, "all"])
    @pytest.mark.parametrize("command", ["run", "plan"])
    def test_not_a_size(self, command: str, size: str) -> None:
        message = refused(command, "--ram", size)
        assert f"ram: got {size!r}, expected a size such as 8GiB" in message

    def test_too_few_slots(self) -> None:
        message = refused("run", "--ram-slots", 3, "hi")
        assert "ram_slots: got 3, expected at least 4" in message
        assert "ram_slots: got 0" in refused("plan", "--ram-slots", 0)


class TestNames:
    def test_policy(self) -> None:
        for name in ("nosuch", "nosuch.module:Class", ":Class", ".x:Class", "base", "lru:"):
            message = refused("run", "--policy", name, "hi")
            assert f"unknown policy {name!r}; there are: fifo, lfru, lfu, lru, next_use" in message
            assert "package.module:Class" in message

    def test_a_policy_that_is_none(self) -> None:
        for name in ("pathlib:Path", "moe_infinity.policies.lru:NoSuch"):
            message = refused("run", "--policy", name, "hi")
            assert "expected a subclass of moe_infinity.policies.base.CachePolicy" in message

    def test_prefetch(self) -> None:
        message = refused("chat", "--prefetch", "nosuch")
        assert "unknown predictor 'nosuch'; there are: none" in message

    def test_dtype_and_device(self) -> None:
        assert "dtype: got 'int4', expected one of" in refused("run", "--dtype", "int4", "hi")
        assert "device: got 'cuda', expected one of cpu" in refused("run", "--device", "cuda", "hi")


class TestPrompt:
    def test_context_beyond_the_plan(self) -> None:
        message = refused("run", "--max-context", 8, "--max-new-tokens", 8, "hello")
        assert "context: got" in message and "at most the planned 8" in message
        assert "max_context=" in message

    @pytest.mark.parametrize("ids", ["1,x", "", ",", "1;2", "1.5", "[1,2]"])
    def test_ids_that_are_no_numbers(self, ids: str) -> None:
        assert "expected numbers such as 1,2,3" in refused("run", "--ids", ids)

    def test_ids_out_of_range(self) -> None:
        for ids in ("1,99999", "-1", "4096"):
            assert "expected 0 to 4095" in refused("run", "--ids", ids)
        assert "expected rows of token ids" in refused("run", "--ids", 2**70)

    def test_ids_and_text(self) -> None:
        message = refused("run", bundled_model_path(), "hello", *IDS)
        assert "--ids: got a prompt as well ('hello')" in message

    def test_empty(self) -> None:
        for prompt in (("",), (bundled_model_path(), "")):
            assert "the prompt is empty, expected at least one token" in refused("run", *prompt)
        assert "the prompt is empty" in refused("run", "-", stdin="")

    def test_bytes_that_are_no_text(self) -> None:
        assert "expected UTF-8" in refused("run", "-", stdin=b"\xff\xfe\x00")
        assert "expected UTF-8" in refused("run", os.fsdecode(b"a\xff"))

    def test_no_tokenizer(self, tmp_path: Path) -> None:
        path = bundled_links(tmp_path / "mute", "tokenizer.json", "tokenizer_config.json")
        for command in (("run", path, "hello"), ("chat", path)):
            message = refused(*command)
            assert "has no tokenizer, expected files such as tokenizer.json" in message
            assert "token ids instead" in message

    def test_a_tokenizer_that_is_none(self, tmp_path: Path) -> None:
        path = bundled_links(tmp_path / "mute", "tokenizer.json")
        (path / "tokenizer.json").write_text('{"model": {"type": "NoSuch"}}')
        assert "has no tokenizer that can be loaded" in refused("run", path, "hello")

    def test_no_chat_template(self, tmp_path: Path) -> None:
        path = bundled_links(tmp_path / "plain", "chat_template.jinja")
        assert "its tokenizer has no chat template; use 'run'" in refused("chat", path)

    def test_a_chat_template_that_refuses(self, tmp_path: Path) -> None:
        path = bundled_links(tmp_path / "strict", "chat_template.jinja")
        (path / "chat_template.jinja").write_text("{{ raise_exception('no system, please') }}")
        result = run("chat", path, "--system", "Be brief", stdin="hello\n")
        assert result.code == 2 and "Traceback" not in result.both
        assert (
            "its chat template refuses messages of system, user (no system, please)" in result.err
        )


class TestUsage:
    @pytest.mark.parametrize(
        "arguments",
        [
            ("run", "--nosuch"),
            ("run", "a", "b", "c"),
            ("run", "--max-new-tokens", "0"),
            ("run", "--temperature", "-1"),
            ("run", "--top-p", "2"),
            ("run", "--seed", str(2**64)),
            ("run", "--max-context", "many"),
            ("run", "--ram"),
            ("plan", "--hit-rate", "7"),
            ("nosuch",),
        ],
    )
    def test_what_the_command_does_not_know(self, arguments: tuple[str, ...]) -> None:
        result = run(*arguments)
        assert result.code == 2 and result.out == ""
        assert "Traceback" not in result.err and "Error" in result.err

    def test_doctor_needs_something_to_read(self, tmp_path: Path) -> None:
        for folder in (tmp_path, tmp_path / "nosuch"):
            message = refused("doctor", folder)
            assert "got no file to read, expected a folder with *.safetensors" in message


class TestInterpreter:
    """The same from an interpreter of its own, as a shell starts it."""

    def test_refusal(self) -> None:
        process = command_line.start("plan", "--ram", "8XB")
        out, err = process.communicate(timeout=PATIENCE_S)
        assert (process.returncode, out) == (2, b"")
        assert err.startswith(b"error: ") and err.count(b"\n") == 1

    def test_ctrl_c_in_prefill(self) -> None:
        process = command_line.start("run", "-", "--max-context", 60_000, start_new_session=True)
        assert process.stdin is not None and process.stderr is not None
        process.stdin.write(b"def main():\n" * 9_000)
        process.stdin.close()
        process.stdin = None
        said = process.stderr.readline()  # the plan: the model is open, prefill begins
        assert b"tokens of context]" in said
        os.killpg(process.pid, signal.SIGINT)
        out, err = process.communicate(timeout=PATIENCE_S)
        assert (process.returncode, out) == (130, b"")
        assert b"Traceback" not in err
        with pytest.raises(ProcessLookupError):
            os.killpg(process.pid, 0)

    def test_the_installed_command(self) -> None:
        import sys

        script = Path(sys.executable).parent / "moe-infinity"
        if not script.exists():
            pytest.skip("the package is not installed with its command")
        done = subprocess.run([script, "--help"], capture_output=True, text=True, check=True)
        assert all(command in done.stdout for command in ("run", "chat", "plan", "doctor"))
