"""Every bad input ends in one message (got, expected, what to do) and exit code 2."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from moe_infinity import bundled_model_path
from moe_infinity.policies import policy_names
from moe_infinity.predictors import predictor_names
from support import command_line
from support.checkpoints import (
    bundled_links,
    dense_checkpoint,
    edit_config,
    weights,
)
from support.command_line import Process, refused, run

IDS = ("--ids", "1,2,3")
PATIENCE_S = 120


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
        edit_config(tiny, quantization_config={"quant_method": "bitsandbytes"})
        message = refused("run", tiny, *IDS)
        assert "the weights are quantised by 'bitsandbytes', expected one of mxfp4, fp8" in message
        assert "use the model's 16-bit checkpoint" in message


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
            assert f"unknown policy {name!r}" in message
            assert f"; there are: {', '.join(policy_names())}" in message
            assert "package.module:Class" in message

    def test_a_policy_that_is_none(self) -> None:
        for name in ("pathlib:Path", "moe_infinity.policies.lru:NoSuch"):
            message = refused("run", "--policy", name, "hi")
            assert "expected a subclass of moe_infinity.policies.base.CachePolicy" in message

    def test_prefetch(self) -> None:
        message = refused("chat", "--prefetch", "nosuch")
        assert f"unknown predictor 'nosuch'; there are: {', '.join(predictor_names())}" in message

    def test_dtype_and_device(self) -> None:
        assert "dtype: got 'int4', expected one of" in refused("run", "--dtype", "int4", "hi")
        assert "device: got 'gpu', expected auto, cpu" in refused("run", "--device", "gpu", "hi")


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
            assert "expected a folder or file on the disk that is to be measured" in message


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

    @pytest.mark.parametrize("words", [["--version"], ["plan"], ["plan", "--json"]])
    def test_a_full_disk_behind_the_output(self, words: list[str]) -> None:
        if not Path("/dev/full").exists():
            pytest.skip("no /dev/full here")
        command = [sys.executable, "-m", "moe_infinity", *words]
        with open("/dev/full", "wb") as full:
            done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
        assert done.returncode == 1
        assert done.stderr.startswith("error: standard output cannot be written: No space left")
        assert done.stderr.count("\n") == 1

    def test_the_installed_command(self) -> None:
        script = Path(sys.executable).parent / "moe-infinity"
        if not script.exists():
            pytest.skip("the package is not installed with its command")
        done = subprocess.run([script, "--help"], capture_output=True, text=True, check=True)
        assert all(command in done.stdout for command in ("run", "chat", "plan", "doctor"))


def test_the_version_is_said() -> None:
    result = run("--version")
    assert result.code == 0 and result.out.startswith("moe-infinity ")
