"""Dense products of few tokens by the compiled kernels: torch reads bf16 weights at half speed."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from moe_infinity.kernels import native
from moe_infinity.kernels.base import ExpertKernel
from moe_infinity.kernels.described import describe
from moe_infinity.model.packed_linears import packed_of
from moe_infinity.model.spinning import end_idle_threads
from moe_infinity.model.taps import Step

_LONG_CONTEXT = 4096  # tokens whose attention is worth torch's threads


def speed_up(model: nn.Module, kernel: ExpertKernel) -> bool:
    """Let a compiled kernel do the linear layers of ``model`` that it can do; whether there are
    any."""
    found = False
    if not isinstance(kernel, native.Kernel):
        return found
    for module in model.modules():
        if type(module) is not nn.Linear or packed_of(module) is not None:
            continue
        if _can(module.weight, module.bias):
            compiled = _Linear(kernel, module, module.bias)
            module.forward = compiled.forward  # type: ignore[method-assign,assignment]
            found = True
    return found


class FewThreads:
    """Keeps torch to one thread during decode whose large products the compiled kernels do.

    What is left for torch then is small, and its other threads, which may spin while they wait,
    would only take processors from the kernels' own and from readers. The setting belongs to the
    process: the first to begin remembers it, and everyone who ends puts it back.
    """

    _lock = threading.Lock()
    _num_steps = 0
    _before = 1

    def __init__(self, is_wanted: bool) -> None:
        self._is_wanted = is_wanted
        self._is_on = False

    def begin(self, step: Step) -> None:
        """Between two steps of decode nothing changes; ``end`` with the request."""
        small = step.num_rows <= native.MOST_TOKENS and step.context <= _LONG_CONTEXT
        if not (self._is_wanted and step.phase == "decode" and small):
            self.end()
            return
        if self._is_on:
            return
        with FewThreads._lock:
            if FewThreads._num_steps == 0:
                FewThreads._before = torch.get_num_threads()
            FewThreads._num_steps += 1
        self._is_on = True
        end_idle_threads()
        torch.set_num_threads(1)

    def end(self) -> None:
        if not self._is_on:
            return
        with FewThreads._lock:
            FewThreads._num_steps -= 1
        self._is_on = False
        torch.set_num_threads(FewThreads._before)


def _can(weight: torch.Tensor, bias: torch.Tensor | None) -> bool:
    fits = bias is None or (bias.dtype == weight.dtype and bias.is_contiguous())
    if weight.dim() != 2 or weight.dtype not in native.SHORT_TYPES or not weight.is_cpu:
        return False
    return fits and weight.stride(1) == 1


def product_of(kernel: ExpertKernel, module: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    """x [T, in] -> [T, out] by a module's weight, and its bias if it is one of outputs."""
    weight, bias = module.weight, getattr(module, "bias", None)
    if not isinstance(bias, torch.Tensor) or bias.shape != weight.shape[:1]:
        bias = None
    if isinstance(kernel, native.Kernel) and _can(weight, bias):
        return _Linear(kernel, module, bias).forward
    return lambda x: nn.functional.linear(x.to(module.weight.dtype), module.weight, bias)


class _Linear:
    """One layer, for as long as its weights are those it had."""

    def __init__(self, kernel: native.Kernel, module: Any, bias: torch.Tensor | None) -> None:
        self._kernel = kernel
        self._module = module
        self._weight, self._bias = module.weight, bias
        self._rows, self._cols = module.weight.shape
        self._matrix = describe(module.weight.detach())
        self._address = module.weight.data_ptr()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self._fits(x):
            bias = self._module.bias if self._bias is not None else None
            return nn.functional.linear(x.to(self._module.weight.dtype), self._module.weight, bias)
        tokens = x.reshape(-1, self._cols).contiguous()
        out = self._kernel.linear(self._matrix, self._rows, tokens, self._bias)
        return out.view(*x.shape[:-1], self._rows)

    def _fits(self, x: torch.Tensor) -> bool:
        module, weight = self._module, self._weight
        if module.weight is not weight or getattr(module, "bias", None) is not self._bias:
            return False
        if x.dtype != weight.dtype or not x.is_cpu or x.shape[-1] != self._cols:
            return False
        if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
            return False
        few = 0 < x.numel() <= self._kernel.most_linear_tokens * self._cols
        return bool(few and weight.data_ptr() == self._address)
