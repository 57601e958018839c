"""Quantised safetensors run as they are stored, and agree with stock on the decoded weights."""

import contextlib
import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from moe_infinity import MoE
from moe_infinity.assembly import open_checkpoint
from moe_infinity.checkpoint.base import SidePlane, Sides, TensorEntry
from moe_infinity.checkpoint.quantised import gather
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
            views = moe._hierarchy._views._kept
            assert all(each.prepared[2].call is not None for *_, each in views.values())
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
        self.refused(coded, UnsupportedModelError, "an unnamed method")

    def test_other_bits_and_orders(self, coded: Path) -> None:
        self.config(coded, bits=8)
        self.refused(coded, UnsupportedModelError, "8 bits", "expected 4")
        self.config(coded, bits=4, desc_act=True)
        self.refused(coded, UnsupportedModelError, "desc_act")

    def test_columns_in_another_order(self, coded: Path) -> None:
        """Whatever the config says of it."""
        name = "model.layers.0.mlp.experts.0.down_proj.g_idx"
        assert name in load_file(coded / "model.safetensors")
        self.change(coded, **{name: torch.tensor([0] * 31 + [1], dtype=torch.int32)})
        self.refused(coded, UnsupportedModelError, name, "desc_act")

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
        self.refused(coded, CorruptCheckpointError, ".qweight'", "quantization_config")

    def test_a_config_that_promises_too_much(self, tmp_path: Path) -> None:
        tiny_checkpoint(tmp_path / "tiny")
        edit_config(tmp_path / "tiny", quantization_config={"quant_method": "fp8"})
        self.refused(tmp_path / "tiny", CorruptCheckpointError, "fp8", "found none")

    def test_another_method_than_the_tensors(self, coded: Path) -> None:
        self.config(coded, quant_method="mxfp4")
        self.refused(coded, UnsupportedModelError, ".qweight'", "only what mxfp4 makes")

    def test_fp8_without_a_word_of_it(self, tmp_path: Path) -> None:
        quantise(build("qwen3_moe"), tmp_path / "coded", "fp8")
        edit_config(tmp_path / "coded", quantization_config=None)
        words = ("_scale_inv'", "expected a quantization_config")
        self.refused(tmp_path / "coded", CorruptCheckpointError, *words)

    def test_headers_say_it_all(self, coded: Path) -> None:
        """A weight takes the place of its codes, under the model's own names."""
        checkpoint = SafetensorsCheckpoint(coded)
        name = "model.layers.0.mlp.experts.0.down_proj.weight"
        assert checkpoint.tensors[name].shape == (64, 32)
        assert checkpoint.tensors[name].format == "GPTQ"
        assert checkpoint.sides[name].scales.shape == (64, 1)
        assert not any(n.endswith((".qweight", ".scales", ".qzeros")) for n in checkpoint.tensors)
        checkpoint.close()


F8 = "F8_E4M3"


def entry(name: str, number_format: str, *shape: int) -> TensorEntry:
    return TensorEntry(name, number_format, shape, 0, 0, 64)


def gathered(quantisation: dict[str, Any], *entries: TensorEntry) -> dict[str, Sides]:
    tensors = {each.name: each for each in entries}
    return gather(Path("here"), tensors, quantisation)[1]


class TestGathering:
    """By headers alone."""

    def fp8(self, weight: tuple[int, ...], scales: tuple[int, ...], **said: Any) -> SidePlane:
        tensors = entry("w.weight", F8, *weight), entry("w.weight_scale_inv", "F32", *scales)
        return gathered({"quant_method": "fp8", **said}, *tensors)["w.weight"].scales

    def test_blocks_that_do_not_divide(self) -> None:
        said = {"weight_block_size": [128, 128]}
        assert self.fp8((576, 7168), (5, 56), **said).group == (128, 128)
        assert self.fp8((2880, 2880), (23, 23), **said).group == (128, 128)
        groups = {"all": {"weights": {"block_structure": [128, 128]}}}
        assert self.fp8((576, 7168), (5, 56), config_groups=groups).group == (128, 128)
        with pytest.raises(CorruptCheckpointError, match="expected a scale for all of it"):
            self.fp8((576, 7168), (5, 56))

    def test_blocks_go_before_rows(self) -> None:
        found = self.fp8((32, 4096), (1, 32), weight_block_size=[128, 128])
        assert (found.shape, found.group) == ((1, 32), (128, 128))
        assert self.fp8((32, 4096), (32, 1)).group == (1, 4096)
        assert self.fp8((32, 4096), (32,)).group == (1, 4096)
        assert self.fp8((32, 4096), ()).group == (32, 4096)
        assert self.fp8((6, 32, 4096), (6,)).group == (32, 4096)

    @pytest.mark.parametrize(("weight", "scales"), [((0, 64), (2, 1)), ((5, 0), (2, 3))])
    def test_nothing_at_all(self, weight: tuple[int, int], scales: tuple[int, int]) -> None:
        with pytest.raises(CorruptCheckpointError, match="expected"):
            self.fp8(weight, scales)

    def test_groups_as_the_config_says(self) -> None:
        packed = entry("w.weight_packed", "I32", 16, 24), entry("w.weight_scale", "BF16", 16, 2)
        groups = {"all": {"weights": {"num_bits": 4, "group_size": 128}}}
        said = {"quant_method": "compressed-tensors", "config_groups": groups}
        assert gathered(said, *packed)["w.weight"].scales.group == (1, 128)
        assert gathered(said | {"config_groups": {}}, *packed)["w.weight"].scales.group == (1, 96)

    def test_eight_bits_in_words(self) -> None:
        packed = entry("w.weight_packed", "I32", 16, 16), entry("w.weight_scale", "BF16", 16, 1)
        groups = {"all": {"weights": {"num_bits": 8}}}
        said = {"quant_method": "compressed-tensors", "config_groups": groups}
        with pytest.raises(UnsupportedModelError, match="8 bits in words, expected 4"):
            gathered(said, *packed)

    def test_codes_of_another_kind_are_not_taken_for_numbers(self) -> None:
        packed = [entry("w.weight_packed", "I32", 16, 8), entry("w.weight_scale", "BF16", 16, 1)]
        packed += [entry("x.weight", "I8", 16, 64), entry("x.weight_scale", "BF16", 16, 1)]
        with pytest.raises(UnsupportedModelError, match=r"'x\.weight_scale', expected only"):
            gathered({"quant_method": "compressed-tensors"}, *packed)

    @pytest.mark.parametrize("rows", [4, 12, 20])
    def test_zero_points_of_whole_words_only(self, rows: int) -> None:
        tensors = [entry("w.qweight", "I32", 8, rows), entry("w.scales", "F16", 1, rows)]
        tensors.append(entry("w.qzeros", "I32", 1, rows // 8))
        with pytest.raises(UnsupportedModelError, match=f"{rows} rows, expected a multiple of 8"):
            gathered({"quant_method": "gptq", "bits": 4}, *tensors)

    def test_anything(self) -> None:
        """Whatever is taken has a scale for every weight, and a word for every eight rows."""
        draw, taken = random.Random(0), 0
        sizes = (0, 1, 2, 3, 4, 8, 12, 16, 32, 64, 96, 128, 160)
        for _ in range(30_000):
            method = draw.choice(("fp8", "compressed-tensors", "gptq", "awq", "mxfp4"))
            names = {
                "fp8": (("w.weight", F8), ("w.weight_scale_inv", "F32")),
                "compressed-tensors": (("w.weight_packed", "I32"), ("w.weight_scale", "BF16")),
                "mxfp4": (("w_blocks", "U8"), ("w_scales", "U8")),
            }.get(method, (("w.qweight", "I32"), ("w.scales", "F16"), ("w.qzeros", "I32")))
            if method == "compressed-tensors" and draw.random() < 0.5:
                names += (("w.weight_zero_point", "I32"),)
            shapes = [
                [draw.choice(sizes) for _ in range(draw.choice((0, 1, 2, 2, 2, 2)))] for _ in names
            ]
            if method == "mxfp4":
                shapes = [[*shapes[1], 16], shapes[1]]
            said = {"quant_method": method, "weight_block_size": [draw.choice((16, 128)), 128]}
            entries = [entry(n, f, *shape) for (n, f), shape in zip(names, shapes, strict=True)]
            try:
                (sides,) = gathered(said | {"group_size": 32}, *entries).values()
                tensors, _ = gather(Path("here"), {e.name: e for e in entries}, said)
            except CheckpointError as error:
                assert "expected" in str(error)
                continue
            (coded,) = tensors.values()
            taken += 1
            (rows, cols), scales = coded.shape[-2:], sides.scales
            assert scales.shape[0] * scales.group[0] >= rows > 0
            assert scales.shape[1] * scales.group[1] >= cols > 0
            assert math.prod(scales.shape) == math.prod(scales.entry.shape)
            assert scales.group[1] >= cols or scales.group[1] % 32 == 0
            if sides.zeros is not None:
                assert sides.zeros.shape[0] * 8 == rows
                assert sides.zeros.shape[1] == scales.shape[1]
        assert taken > 100


def test_a_dense_tensor_without_its_scales(tmp_path: Path) -> None:
    tiny_checkpoint(tmp_path / "tiny")
    file = tmp_path / "tiny" / "model.safetensors"
    stored = load_file(file)
    name = "model.layers.0.self_attn.q_proj.weight"
    save_file(stored | {name: stored[name].to(torch.float8_e4m3fn)}, file, {"format": "pt"})
    with pytest.raises(CorruptCheckpointError, match="stored as F8_E4M3 without scales, expected"):
        MoE(tmp_path / "tiny", ram="4GiB")


def test_codes_that_lie_the_other_way_round(tmp_path: Path) -> None:
    """gpt-oss holds experts [in, out]; coded ones are [out, in] in every method."""
    path = tmp_path / "plain"
    build("gpt_oss").save_pretrained(path)
    stored = load_file(path / "model.safetensors")
    for name, tensor in list(stored.items()):
        if tensor.ndim == 3:
            stored[name] = tensor.to(torch.float8_e4m3fn)
            stored[f"{name}_scale"] = torch.ones(len(tensor), 1, 1)
    save_file(stored, path / "model.safetensors", {"format": "pt"})
    edit_config(path, quantization_config={"quant_method": "fp8"})
    with pytest.raises(CorruptCheckpointError, match=r"has shape .* expected"):
        MoE(path, ram="4GiB")


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
