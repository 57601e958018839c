"""Linear layers whose weights lie in memory as they were packed."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import nn

from moe_infinity.kernels import native
from moe_infinity.kernels.base import ExpertKernel
from moe_infinity.kernels.described import TYPES, describe
from moe_infinity.kernels.packed import PackedMatrix

_NAME = "_moe_infinity_packed"
_DECODED_AT_ONCE = 512 * 1024  # numbers, of several bytes each while they are decoded


def attach_packed(module: nn.Module, weight: PackedMatrix) -> None:
    """Give a linear layer its coded weight; ``run_packed`` makes use of it."""
    setattr(module, _NAME, weight)


def packed_of(module: nn.Module) -> PackedMatrix | None:
    found: PackedMatrix | None = module.__dict__.get(_NAME)
    return found


def move(model: nn.Module, device: torch.device) -> None:
    """Bring every weight to ``device``, coded ones too."""
    if device.type == "cpu":
        return
    for module, weight in _coded(model):
        attach_packed(module, weight.to(device))
        if 0 in module.weight.stride():  # one number for all, which ``to`` would write out
            there = torch.full((1,), torch.nan, dtype=module.weight.dtype, device=device)
            placeholder = there.expand(module.weight.shape)
            module.weight = nn.Parameter(placeholder, requires_grad=False)
    model.to(device)


def run_packed(model: nn.Module, kernel: ExpertKernel) -> bool:
    """Let ``kernel`` do the coded linear layers of ``model``; whether a compiled one does any."""
    coded = list(_coded(model))
    for module, weight in coded:
        if kernel.name == "triton":
            module.forward = partial(_on_gpu, kernel, module, weight)
        else:
            module.forward = _PackedLinear(kernel, module, weight).forward
    return bool(coded) and isinstance(kernel, native.Kernel)


def _coded(model: nn.Module) -> Iterator[tuple[Any, PackedMatrix]]:
    for module in model.modules():
        weight = packed_of(module)
        if weight is not None:
            yield module, weight


def _on_gpu(kernel: Any, module: Any, weight: PackedMatrix, x: torch.Tensor) -> torch.Tensor:
    out: torch.Tensor = kernel.linear(weight, x, module.bias)
    return out


class _PackedLinear:
    """One coded layer, for any number of tokens."""

    def __init__(self, kernel: ExpertKernel, module: Any, weight: PackedMatrix) -> None:
        self._kernel: Any = kernel
        self._bias: torch.Tensor | None = module.bias
        self._weight = weight
        self._matrix = describe(weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., cols] -> [..., rows]"""
        is_known = isinstance(self._kernel, native.Kernel) and x.dtype in TYPES
        has_types = self._bias is None or self._bias.dtype == x.dtype
        if not is_known or not has_types or not x.numel():
            return self._plain(x)
        tokens = x.reshape(-1, self._weight.cols).contiguous()
        out: torch.Tensor = self._kernel.linear(self._matrix, self._weight.rows, tokens, self._bias)
        return out.view(*x.shape[:-1], self._weight.rows)

    def _plain(self, x: torch.Tensor) -> torch.Tensor:
        """A few rows at a time: decoded, the whole weight is in no budget."""
        weight = self._weight
        out = x.new_empty(*x.shape[:-1], weight.rows)
        step = max(1, _DECODED_AT_ONCE // weight.cols)
        for start in range(0, weight.rows, step):
            some = weight.decode_rows(start, min(step, weight.rows - start))
            out[..., start : start + step] = nn.functional.linear(x, some.to(x.dtype))
        return out if self._bias is None else out + self._bias
