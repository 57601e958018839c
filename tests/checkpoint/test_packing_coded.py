"""Packing what is coded already: quantised checkpoints and GGUF files."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from moe_infinity import MoE, bundled_model_path
from moe_infinity.checkpoint.packing import pack
from moe_infinity.errors import UnsupportedModelError
from moe_infinity.preparation import opened_source, packing_job
from support.gguf_files import Kind, small_model, write_gguf
from support.quantised import quantise
from support.quantised_models import build

IDS = torch.arange(3, 47)[None]
SOURCES = ["gpt_oss-mxfp4", "deepseek_v3-fp8", "qwen3_moe-gptq", "qwen3_moe-int4"]
SOURCES += ["gpt_oss.gguf", "mixtral.gguf", "deepseek_v3.gguf"]


def make(source: str, folder: Path) -> tuple[Path, Any]:
    """A checkpoint, and a stock model of what it codes."""
    if source.endswith(".gguf"):
        model = small_model(source.removesuffix(".gguf"))
        return folder / source, write_gguf(model, folder / source, Kind.Q8_0, splits_kv_b=True)
    return folder / source, quantise(
        build(source.split("-")[0]), folder / source, source.split("-")[1]
    )


def packed(source: Path, target: Path, experts: str, dense: str = "bf16") -> Path:
    with opened_source(source) as checkpoint:
        pack(packing_job(checkpoint, target, experts, dense))
    return target


def logits(path: Path, **options: Any) -> torch.Tensor:
    with MoE(path, ram="4GiB", **options) as moe, torch.no_grad():
        found: torch.Tensor = moe(IDS).logits.float()
        return found


@pytest.mark.parametrize("source", SOURCES)
def test_every_form_from_every_source(source: str, tmp_path: Path) -> None:
    path, model = make(source, tmp_path)
    with torch.no_grad():
        expected = model(IDS).logits
    for experts, dense, tolerance in (
        ("bf16", "bf16", 0.02),
        ("exact12", "bf16", 0.02),
        ("int8", "int8", 0.05),
        ("int4", "int8", 0.35),
    ):
        target = packed(path, tmp_path / f"{experts}_{dense}", experts, dense)
        found = logits(target, dtype="float32", ram_slots=8)
        error = (found - expected).norm() / expected.norm()
        assert error <= tolerance, (experts, dense, error)
        with MoE(target, ram="4GiB") as moe:
            moe.generate(IDS, max_new_tokens=1)
            assert not moe.stats().bit_exact


def test_a_config_says_nothing_of_codes_any_more(tmp_path: Path) -> None:
    path, _ = make("qwen3_moe-gptq", tmp_path)
    target = packed(path, tmp_path / "packed", "bf16")
    assert "quantization_config" not in json.loads((target / "config.json").read_text())


def test_a_gguf_files_tokenizer_comes_along(tmp_path: Path) -> None:
    words = ["t", "1", "t1", *(f"t{n}" for n in range(3, 96))]
    more = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.tokens": words}
    more |= {"tokenizer.ggml.merges": ["t 1"], "tokenizer.chat_template": "{{ messages }}"}
    path = tmp_path / "small.gguf"
    write_gguf(small_model("qwen3_moe"), path, Kind.F16, **more)
    target = packed(path, tmp_path / "packed", "bf16")
    with MoE(target, ram="4GiB") as moe:
        assert moe.tokenizer.convert_ids_to_tokens([5]) == ["t5"]
        assert moe.tokenizer.chat_template == "{{ messages }}"


def test_the_very_bits_of_a_gguf_file(tmp_path: Path) -> None:
    path = tmp_path / "small.gguf"
    write_gguf(small_model("mixtral", dtype=torch.bfloat16), path, Kind.BF16)
    target = packed(path, tmp_path / "packed", "bf16")
    assert torch.equal(logits(target), logits(path))


def test_what_is_packed_is_not_packed_again(tmp_path: Path) -> None:
    target = packed(bundled_model_path(), tmp_path / "packed", "int4")
    with pytest.raises(UnsupportedModelError, match="is packed already, expected"):
        packed(target, tmp_path / "again", "int8")
