"""Quantised safetensors run as they are stored, and agree with stock on the decoded weights."""

import contextlib
import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from moe_infinity import MoE
from moe_infinity.assembly import open_checkpoint
from moe_infinity.checkpoint.safetensors import SafetensorsCheckpoint
from moe_infinity.errors import CheckpointError, CorruptCheckpointError, UnsupportedModelError
from moe_infinity.kernels import native
from moe_infinity.model.loading import examine
from support.checkpoints import edit_config, tiny_checkpoint
from support.quantised import METHODS, quantise
from support.quantised_models import build

IDS = torch.arange(3, 47)[None]
MODELS = [("gpt_oss", "mxfp4"), ("deepseek_v3", "fp8"), ("deepseek_v3", "fp8_rows")]
MODELS += [("qwen3_moe", method) for method in METHODS if method != "mxfp4"]


def logits(path: Path, **options: Any) -> torch.Tensor:
    with MoE(path, ram="4GiB", **options) as moe, torch.no_grad():
        found: torch.Tensor = moe(IDS).logits.float()
        return found


@pytest.mark.parametrize(("name", "method"), MODELS)
class TestNumbers:
    def test_agrees_with_stock_on_the_decoded_weights(
        self, name: str, method: str, tmp_path: Path
    ) -> None:
        model = quantise(build(name), tmp_path / "coded", method)
        with torch.no_grad():
            expected = model(IDS).logits
        found = logits(tmp_path / "coded", dtype="float32", kernel="torch", ram_slots=8)
        assert (found - expected).norm() <= 1e-5 * expected.norm()

    @pytest.mark.skipif(native.native is None, reason="installed without a compiler")
    def test_by_the_kernels_of_this_machine(self, name: str, method: str, tmp_path: Path) -> None:
        """The same experts: what routers see differs by what kernels round."""
        model = quantise(build(name), tmp_path / "coded", method)
        with torch.no_grad():
            expected = model(IDS).logits
        with MoE(tmp_path / "coded", ram="4GiB", dtype="float32", ram_slots=8) as moe:
            with torch.no_grad():
                found = moe(IDS).logits.float()
            views = moe._hierarchy._views
            assert all(each.prepared[2].call is not None for _, each in views.values())
        assert (found - expected).norm() <= 0.05 * expected.norm()


def test_few_tokens_are_those_of_many(tmp_path: Path) -> None:
    """A prompt at once and token by token."""
    quantise(build("gpt_oss"), tmp_path / "coded", "mxfp4")
    options = {"max_new_tokens": 12, "do_sample": False}
    with MoE(tmp_path / "coded", ram="4GiB", dtype="float32", kernel="torch") as moe:
        ids = moe.generate(IDS[:, :9], **options)
        again = moe.generate(ids[:, :-4], **options | {"max_new_tokens": 4})
        assert torch.equal(again, ids)
        assert moe.stats().bit_exact


class TestBadInput:
    @pytest.fixture
    def coded(self, tmp_path: Path) -> Path:
        quantise(build("qwen3_moe"), tmp_path / "coded", "gptq")
        return tmp_path / "coded"

    def refused(self, path: Path, kind: type[CheckpointError], *words: str) -> None:
        with pytest.raises(kind) as caught:
            MoE(path, ram="4GiB")
        message = str(caught.value)
        assert all(word in message for word in words), message
        assert "expected" in message

    def change(self, path: Path, **tensors: torch.Tensor | None) -> None:
        file = path / "model.safetensors"
        stored = load_file(file) | tensors
        save_file({n: t for n, t in stored.items() if t is not None}, file)

    def config(self, path: Path, **changes: Any) -> None:
        raw = json.loads((path / "config.json").read_text())
        edit_config(path, quantization_config=raw["quantization_config"] | changes)

    def test_unknown_method(self, coded: Path) -> None:
        self.config(coded, quant_method="bitsandbytes")
        self.refused(coded, UnsupportedModelError, "'bitsandbytes'", "mxfp4, fp8", "gptq")

    def test_unnamed_method(self, coded: Path) -> None:
        self.config(coded, quant_method=None)
        self.refused(coded, UnsupportedModelError, "'None'")

    def test_other_bits_and_orders(self, coded: Path) -> None:
        self.config(coded, bits=8)
        self.refused(coded, UnsupportedModelError, "8 bits", "expected 4")
        self.config(coded, bits=4, desc_act=True)
        self.refused(coded, UnsupportedModelError, "desc_act")

    def test_scales_missing(self, coded: Path) -> None:
        name = "model.layers.1.mlp.experts.3.up_proj"
        self.change(coded, **{f"{name}.scales": None})
        self.refused(coded, CorruptCheckpointError, f"{name}.qweight", f"{name}.scales")

    def test_scales_of_another_size(self, coded: Path) -> None:
        name = "model.layers.1.mlp.experts.3.up_proj.scales"
        self.change(coded, **{name: torch.ones(2, 24, dtype=torch.float16)})
        self.refused(coded, CorruptCheckpointError, name, "[2, 24]")

    def test_groups_that_do_not_divide(self, coded: Path) -> None:
        name = "model.layers.1.mlp.experts.3.up_proj"
        scales = torch.ones(3, 32, dtype=torch.float16)
        zeros = torch.zeros(3, 4, dtype=torch.int32)
        self.change(coded, **{f"{name}.scales": scales, f"{name}.qzeros": zeros})
        self.refused(coded, CorruptCheckpointError, f"{name}.qweight", "3 groups", "64 columns")

    def test_zero_points_of_another_size(self, coded: Path) -> None:
        name = "model.layers.1.mlp.experts.3.up_proj.qzeros"
        self.change(coded, **{name: torch.zeros(2, 5, dtype=torch.int32)})
        self.refused(coded, CorruptCheckpointError, name, "[2, 5]")

    def test_a_config_that_says_nothing(self, coded: Path) -> None:
        edit_config(coded, quantization_config=None)
        self.refused(coded, CorruptCheckpointError)

    def test_a_config_that_promises_too_much(self, tmp_path: Path) -> None:
        tiny_checkpoint(tmp_path / "tiny")
        edit_config(tmp_path / "tiny", quantization_config={"quant_method": "fp8"})
        self.refused(tmp_path / "tiny", CorruptCheckpointError, "fp8", "found none")

    def test_another_method_than_the_tensors(self, coded: Path) -> None:
        self.config(coded, quant_method="mxfp4")
        self.refused(coded, CorruptCheckpointError, "mxfp4", "found none")

    def test_fp8_without_a_word_of_it(self, tmp_path: Path) -> None:
        quantise(build("qwen3_moe"), tmp_path / "coded", "fp8")
        edit_config(tmp_path / "coded", quantization_config=None)
        self.refused(tmp_path / "coded", CorruptCheckpointError, "F8_E4M3", "scales")

    def test_headers_say_it_all(self, coded: Path) -> None:
        """A weight takes the place of its codes, under the model's own names."""
        checkpoint = SafetensorsCheckpoint(coded)
        name = "model.layers.0.mlp.experts.0.down_proj.weight"
        assert checkpoint.tensors[name].shape == (64, 32)
        assert checkpoint.tensors[name].format == "GPTQ"
        assert checkpoint.sides[name].scales.shape == (64, 1)
        assert not any(n.endswith((".qweight", ".scales", ".qzeros")) for n in checkpoint.tensors)
        checkpoint.close()


ODD = (None, True, -1, 0, 7, 2**40, 0.5, "", "x", [], [0, 0], [128], [1, "a"], {}, {"a": 1})


class TestFuzz:
    """What is spoiled at random is read, or refused by name."""

    @pytest.fixture(scope="class")
    def folders(self, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
        root = tmp_path_factory.mktemp("coded")
        for name, method in MODELS:
            quantise(build(name), root / f"{name}_{method}", method)
        return [root / f"{name}_{method}" for name, method in MODELS]

    def outcome(self, path: Path, is_whole: bool = True) -> str:
        try:
            with contextlib.closing(open_checkpoint(path)) as checkpoint:
                if is_whole:
                    examine(checkpoint, None)
            return "read"
        except CheckpointError as error:
            assert "expected" in str(error), error
            return "refused"

    @pytest.mark.parametrize("count", [150, pytest.param(10_000, marks=pytest.mark.slow)])
    def test_headers(self, folders: list[Path], count: int) -> None:
        draw, outcomes = random.Random(0), set()
        for number in range(count):
            path = folders[number % len(folders)]
            with (path / "model.safetensors").open("r+b") as file:
                size = int.from_bytes(file.read(8), "little")
                header = file.read(size)
                changed = bytearray(header)
                for _ in range(draw.choice((1, 1, 2, 8))):
                    changed[draw.randrange(size)] = draw.choice(b'0123456789",:[]{}FIU_. \xff')
                file.seek(8)
                file.write(changed)
                file.flush()
                outcomes.add(self.outcome(path))
                file.seek(8)
                file.write(header)
        assert outcomes == {"read", "refused"}

    def test_configs(self, folders: list[Path]) -> None:
        outcomes = set()
        for path in folders:
            before = (path / "config.json").read_text()
            raw = json.loads(before)
            described = raw["quantization_config"]
            for name in (*described, "version", "checkpoint_format", "desc_act"):
                for value in ODD:
                    edit_config(path, quantization_config=described | {name: value})
                    outcomes.add(self.outcome(path, is_whole=False))
            for value in ODD:
                edit_config(path, quantization_config=value)
                outcomes.add(self.outcome(path))
            (path / "config.json").write_text(before)
        assert outcomes == {"read", "refused"}
