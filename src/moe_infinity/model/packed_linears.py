"""Linear layers whose weights lie in memory as they were packed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from moe_infinity.kernels import native
from moe_infinity.kernels.base import ExpertKernel
from moe_infinity.kernels.packed import PackedMatrix

_NAME = "_moe_infinity_packed"


def attach_packed(module: nn.Module, weight: PackedMatrix) -> None:
    """Give a linear layer its coded weight; ``run_packed`` makes use of it."""
    setattr(module, _NAME, weight)


def packed_of(module: nn.Module) -> PackedMatrix | None:
    found: PackedMatrix | None = module.__dict__.get(_NAME)
    return found


def run_packed(model: nn.Module, kernel: ExpertKernel) -> bool:
    """Let ``kernel`` do the coded linear layers of ``model``; whether a compiled one does any."""
    coded = list(_coded(model))
    for module, weight in coded:
        module.forward = _PackedLinear(kernel, module, weight).forward
    return bool(coded) and isinstance(kernel, native.Kernel)


def _coded(model: nn.Module) -> Iterator[tuple[Any, PackedMatrix]]:
    for module in model.modules():
        weight = packed_of(module)
        if weight is not None:
            yield module, weight


class _PackedLinear:
    """One coded layer, for any number of tokens."""

    def __init__(self, kernel: ExpertKernel, module: Any, weight: PackedMatrix) -> None:
        self._kernel: Any = kernel
        self._bias: torch.Tensor | None = module.bias
        self._weight = weight
        self._matrix = native.describe(weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., cols] -> [..., rows]"""
        is_known = isinstance(self._kernel, native.Kernel) and x.dtype in native.TYPES
        if not is_known or not x.numel():
            decoded = self._weight.decode().to(x.dtype)
            return nn.functional.linear(x, decoded, self._bias)
        tokens = x.reshape(-1, self._weight.cols).contiguous()
        out: torch.Tensor = self._kernel.linear(self._matrix, self._weight.rows, tokens, self._bias)
        return out.view(*x.shape[:-1], self._weight.rows)
