"""Dense products of few tokens by the compiled kernels: torch reads bf16 weights at half speed."""

from __future__ import annotations

import torch
from torch import nn

from moe_infinity.kernels import native
from moe_infinity.kernels.base import ExpertKernel

# In float32 the order of a sum shows: stock's own results are kept, to its own spread.
_TYPES = (torch.bfloat16, torch.float16)


def speed_up(model: nn.Module, kernel: ExpertKernel) -> None:
    """Let a compiled kernel do the linear layers of ``model`` that it can do."""
    if not isinstance(kernel, native.Kernel):
        return
    for module in model.modules():
        if type(module) is nn.Linear and _can(module.weight, module.bias):
            compiled = _Linear(kernel, module.weight)
            module.forward = compiled.forward  # type: ignore[method-assign,assignment]


def _can(weight: torch.Tensor, bias: torch.Tensor | None) -> bool:
    return bias is None and weight.dim() == 2 and weight.dtype in _TYPES and weight.is_cpu


class _Linear:
    """One layer without bias. Its weight is held, so that the address stays good."""

    def __init__(self, kernel: native.Kernel, weight: torch.Tensor) -> None:
        self._kernel = kernel
        self._weight = weight
        self._rows, self._cols = weight.shape
        self._matrix = native.describe(weight.detach())
        self._address = weight.data_ptr()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = self._weight
        fits = x.dtype == weight.dtype and weight.data_ptr() == self._address
        if not fits or x.numel() > native.MOST_TOKENS * self._cols or not x.numel():
            return nn.functional.linear(x, weight)
        tokens = x.reshape(-1, self._cols).contiguous()
        return self._kernel.linear(self._matrix, self._rows, tokens).view(*x.shape[:-1], self._rows)
