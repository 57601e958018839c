"""Checkpoints quantised as their public tools do, beside stock models of the decoded weights."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import numpy as np
import torch
import transformers
from compressed_tensors.compressors import pack_to_int32
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import dequantize
from safetensors.torch import load_file, save_file
from transformers.integrations.finegrained_fp8 import Fp8Dequantize, Fp8Quantize
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

Tensors = dict[str, torch.Tensor]
# A weight [out, in] to its tensors, by what follows its name without ".weight", and decoded.
Coder = Callable[[torch.Tensor], tuple[Tensors, torch.Tensor]]
BLOCK, GROUP = [16, 32], 32


def fp8(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    config = SimpleNamespace(weight_block_size=BLOCK, scale_fmt="float")
    quantiser = SimpleNamespace(quantization_config=config)
    found = Fp8Quantize(quantiser).convert({"x.weight": weight})
    codes, scales = found["x.weight"], found["x.weight_scale_inv"]
    decoded = Fp8Dequantize(quantiser)._dequantize_one(codes, scales, torch.float32)
    return {".weight": codes, ".weight_scale_inv": scales}, decoded


def fp8_rows(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    """As compressed-tensors has it: a scale for each row."""
    scales = (weight.abs().amax(dim=1, keepdim=True) / 448).to(torch.bfloat16)
    codes = (weight / scales.float()).to(torch.float8_e4m3fn)
    return {".weight": codes, ".weight_scale": scales}, codes.float() * scales.float()


def int4(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    groups = weight.view(len(weight), -1, GROUP)
    scales = (groups.abs().amax(dim=2) / 7.5).to(torch.bfloat16)
    codes = (groups / scales.float()[..., None]).round().clamp(-8, 7).view_as(weight).to(torch.int8)
    args = QuantizationArgs(num_bits=4, strategy="group", group_size=GROUP)
    decoded = dequantize(codes, scales.float(), args=args)
    shape = torch.tensor(weight.shape)
    packed = pack_to_int32(codes, 4)
    return {".weight_packed": packed, ".weight_scale": scales, ".weight_shape": shape}, decoded


def int4_with_zeros(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    codes, scales, zeros = _unsigned(weight)
    args = QuantizationArgs(num_bits=4, strategy="group", group_size=GROUP, symmetric=False)
    signed, zero = (codes.int() - 8).to(torch.int8), (zeros.int() - 8).to(torch.int8)
    decoded = dequantize(signed, scales, zero, args=args)
    found = {
        ".weight_packed": pack_to_int32(signed, 4),
        ".weight_scale": scales,
        ".weight_zero_point": pack_to_int32(zero, 4, packed_dim=0).contiguous(),
    }
    return found, decoded


def gptq(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    codes, scales, zeros = _unsigned(weight)
    found = {
        ".qweight": _words(codes.T.contiguous(), range(8), dim=0),
        ".scales": scales.T.contiguous().half(),
        ".qzeros": _words((zeros.T - 1 & 15).contiguous(), range(8), dim=1),
        ".g_idx": torch.arange(weight.shape[1], dtype=torch.int32) // GROUP,
    }
    return found, _decoded(codes, scales.half().float(), zeros)


def awq(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    codes, scales, zeros = _unsigned(weight)
    order = (0, 2, 4, 6, 1, 3, 5, 7)
    found = {
        ".qweight": _words(codes.T.contiguous(), order, dim=1),
        ".scales": scales.T.contiguous().half(),
        ".qzeros": _words(zeros.T.contiguous(), order, dim=1),
    }
    return found, _decoded(codes, scales.half().float(), zeros)


def mxfp4(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    """Of gpt-oss, a weight [E, in, out]; llama.cpp's quantiser chooses the numbers."""
    rows = weight.transpose(1, 2).contiguous()
    packed = gguf.quants.quantize(rows.numpy(), gguf.GGMLQuantizationType.MXFP4)
    groups = torch.from_numpy(packed).view(*rows.shape[:2], -1, 17)
    halves = groups[..., 1:]
    numbers = torch.cat([halves & 15, halves >> 4], dim=-1)
    blocks, scales = numbers[..., 0::2] | numbers[..., 1::2] << 4, groups[..., 0].contiguous()
    decoded = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
    return {"_blocks": blocks.contiguous(), "_scales": scales}, decoded


def _unsigned(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """codes [R, C], scales float [R, G], zeros [R, G]; codes and zeros from 0 to 15."""
    groups = weight.view(len(weight), -1, GROUP)
    low, high = groups.amin(dim=2).clamp(max=0), groups.amax(dim=2).clamp(min=0)
    scales = ((high - low) / 15).half().float()
    zeros = (-low / scales).round().clamp(0, 15)
    codes = (groups / scales[..., None] + zeros[..., None]).round().clamp(0, 15)
    return codes.view_as(weight).to(torch.uint8), scales, zeros.to(torch.uint8)


def _decoded(codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor) -> torch.Tensor:
    wide = [x.float().repeat_interleave(GROUP, dim=1) for x in (scales, zeros)]
    return (codes.float() - wide[1]) * wide[0]


def _words(codes: torch.Tensor, order: Any, dim: int) -> torch.Tensor:
    """Eight codes along ``dim`` in a word, those of ``order`` from the lowest bits on."""
    apart = codes.to(torch.int64).unflatten(dim, (-1, 8))
    words = sum(apart.select(dim + 1, each) << 4 * place for place, each in enumerate(order))
    return torch.from_numpy(np.asarray(words).astype(np.uint32).view(np.int32))


METHODS: dict[str, tuple[Coder, dict[str, Any]]] = {
    "fp8": (fp8, {"quant_method": "fp8", "weight_block_size": BLOCK}),
    "fp8_rows": (fp8_rows, {"quant_method": "compressed-tensors", "format": "float-quantized"}),
    "int4": (int4, {"quant_method": "compressed-tensors", "format": "pack-quantized"}),
    "int4_with_zeros": (int4_with_zeros, {"quant_method": "compressed-tensors"}),
    "gptq": (gptq, {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": False}),
    "awq": (awq, {"quant_method": "awq", "bits": 4, "group_size": GROUP, "version": "gemm"}),
    "mxfp4": (mxfp4, {"quant_method": "mxfp4"}),
}


def quantise(model: Any, path: Path, method: str) -> Any:
    """Save ``model`` to a folder with its experts and attention quantised (of mxfp4 the experts
    only); returns a stock model in float32 that holds the decoded weights."""
    coder, config = METHODS[method]
    plain = path.with_name(path.name + "_plain")
    model.float().save_pretrained(plain)
    stored, kept, decoded = load_file(plain / "model.safetensors"), {}, {}
    for name, tensor in stored.items():
        if _is_coded(name, tensor, method):
            tensors, decoded[name] = coder(tensor)
            stem = name.removesuffix(".weight")
            kept |= {stem + ending: each for ending, each in tensors.items()}
        else:
            kept[name] = decoded[name] = tensor
    save_file(decoded, plain / "model.safetensors", {"format": "pt"})
    path.mkdir()
    save_file(kept, path / "model.safetensors", {"format": "pt"})
    raw = json.loads((plain / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(raw | {"quantization_config": config}))
    return transformers.AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32)


def _is_coded(name: str, tensor: torch.Tensor, method: str) -> bool:
    if method == "mxfp4":
        return tensor.ndim == 3 and "experts" in name
    return tensor.ndim == 2 and ("experts." in name or "_proj" in name or "self_attn" in name)
