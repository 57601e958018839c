"""Dense products of few tokens by the compiled kernels: torch reads bf16 weights at half speed."""

from __future__ import annotations

import torch
from torch import nn

from moe_infinity.kernels import native
from moe_infinity.kernels.base import ExpertKernel
from moe_infinity.types import Phase

# In float32 the order of a sum shows: stock's own results are kept, to its own spread.
_TYPES = (torch.bfloat16, torch.float16)


def speed_up(model: nn.Module, kernel: ExpertKernel) -> bool:
    """Let a compiled kernel do the linear layers of ``model`` that it can do; whether there are
    any."""
    found = False
    if not isinstance(kernel, native.Kernel):
        return found
    for module in model.modules():
        if type(module) is nn.Linear and _can(module.weight, module.bias):
            compiled = _Linear(kernel, module.weight, module.bias)
            module.forward = compiled.forward  # type: ignore[method-assign,assignment]
            found = True
    return found


class FewThreads:
    """Keeps torch to one thread in decode steps whose large products the compiled kernels do.

    What is left for torch then is small, and its other threads would only take processors from
    the kernels' own and from readers. Process-wide, so it lasts no longer than a step.
    """

    def __init__(self, is_wanted: bool) -> None:
        self._is_wanted = is_wanted
        self._before: int | None = None

    def begin(self, phase: Phase) -> None:
        if self._is_wanted and phase == "decode" and self._before is None:
            self._before = torch.get_num_threads()
            torch.set_num_threads(1)

    def end(self) -> None:
        if self._before is not None:
            torch.set_num_threads(self._before)
            self._before = None


def _can(weight: torch.Tensor, bias: torch.Tensor | None) -> bool:
    same = bias is None or bias.dtype == weight.dtype
    return same and weight.dim() == 2 and weight.dtype in _TYPES and weight.is_cpu


class _Linear:
    """One layer. Its weights are held, so that addresses stay good."""

    def __init__(
        self, kernel: native.Kernel, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> None:
        self._kernel = kernel
        self._weight, self._bias = weight, bias
        self._rows, self._cols = weight.shape
        self._matrix = native.describe(weight.detach())
        self._address = weight.data_ptr()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = self._weight
        fits = x.dtype == weight.dtype and weight.data_ptr() == self._address
        if not fits or x.numel() > native.MOST_TOKENS * self._cols or not x.numel():
            return nn.functional.linear(x, weight, self._bias)
        tokens = x.reshape(-1, self._cols).contiguous()
        out = self._kernel.linear(self._matrix, self._rows, tokens, self._bias)
        return out.view(*x.shape[:-1], self._rows)
