"""A model's last norm and its head, for one token, in one compiled call.

What torch takes for a norm is long enough for the kernels' threads to fall asleep before the head.
The norm of one token is the compiled one for whoever asks, the library too: torch sums in another
order, and now and then the last digit differs.
"""

from __future__ import annotations

import logging
from typing import Any, NamedTuple

import torch

from moe_infinity.kernels.blocks import Linear, Norm, TailCall, pack_tail, tail_call
from moe_infinity.kernels.described import num_rows
from moe_infinity.kernels.native import SHORT_TYPES, Kernel
from moe_infinity.model.block_kind import SCALES, linear_of, norm_of
from moe_infinity.model.found_block import Watch
from moe_infinity.model.standing import stand_before

_log = logging.getLogger(__name__)
_LAST_DIGITS = 2**-6  # of bf16, the coarser type: a norm rounds twice


def speed_up_tail(kernel: Kernel, norm: Any, head: Any) -> Tail | None:
    """Let compiled code do the norm of one token, whoever asks for it, if it is of the usual kind;
    returns both together."""
    try:
        spec, linear = norm_of(norm), linear_of(head)
        weights = [spec.weight, linear.bias, linear.weight]
        plain = [each for each in weights if isinstance(each, torch.Tensor)]
        dtype = spec.weight.dtype
        is_alike = all(each.dtype is dtype and each.is_contiguous() for each in plain)
        if dtype not in SHORT_TYPES or not is_alike or not all(each.is_cpu for each in plain):
            return None
        packed = pack_tail(spec, None)
        if not _computes_the_same(kernel, packed, norm):
            return None
        tail = Tail(kernel, spec, linear)
    except Exception:  # parts of another kind may want anything
        _log.debug("%s: not of the usual kind", type(norm).__name__, exc_info=True)
        return None
    _LoneNorm(kernel, packed, norm)
    return tail


class _Room(NamedTuple):
    logits: torch.Tensor
    scores: torch.Tensor


class Tail:
    """The head of the norm of one token."""

    def __init__(self, kernel: Kernel, norm: Norm, head: Linear) -> None:
        self._kernel = kernel
        self._packed = pack_tail(norm, head)
        self._kept = (norm, head)  # whose memory it is
        self._num_rows = num_rows(head.weight)
        self._dtype = norm.weight.dtype
        self._room = self._new_room()  # that nobody was given

    def of(self, x: torch.Tensor) -> torch.Tensor:
        """[1, 1, H] contiguous, of the norm's dtype, in RAM -> [1, 1, vocabulary]: every bit as
        norm and head say it."""
        call = self.call(x)
        self.make_room()
        self._kernel.finish(call)
        return call.out

    def call(self, x: torch.Tensor) -> TailCall:
        """What the compiled code is to be told for ``of``."""
        return tail_call(self._packed, x, self._room.logits, self._room.scores)

    def make_room(self) -> None:
        """The next call writes elsewhere than the last one."""
        self._room = self._new_room()

    def _new_room(self) -> _Room:
        with torch.inference_mode(False):  # so that writing to them is counted
            size = self._num_rows
            logits = torch.empty(1, 1, size, dtype=self._dtype, device="cpu")
            return _Room(logits, torch.empty(1, size, dtype=torch.float32, device="cpu"))


class _LoneNorm:
    """Stands for a norm's ``forward``; more than one token goes the module's own way."""

    def __init__(self, kernel: Kernel, packed: bytes, module: Any) -> None:
        self._kernel, self._packed = kernel, packed
        self._size, self._dtype = module.weight.numel(), module.weight.dtype
        self._stock = stand_before(module, self.forward)
        self._watch = Watch([module], [], [])

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        x = args[0] if len(args) == 1 and not kwargs else None
        if isinstance(x, torch.Tensor) and self._fits(x):
            return _norm_alone(self._kernel, self._packed, x)
        return self._stock(*args, **kwargs)

    def _fits(self, x: torch.Tensor) -> bool:
        if x.numel() != self._size or x.dtype is not self._dtype or not x.is_cpu:
            return False
        return self._watch.is_unchanged() and not torch.is_grad_enabled()


def _norm_alone(kernel: Kernel, packed: bytes, x: torch.Tensor) -> torch.Tensor:
    """Of one token."""
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    x = x.contiguous()
    kernel.finish(tail_call(packed, x, out))
    return out


@torch.no_grad()
def _computes_the_same(kernel: Kernel, packed: bytes, module: Any) -> bool:
    """Up to the last digits, for tokens that are not around 0: others subtract the mean."""
    generator = torch.Generator().manual_seed(0)
    for scale in SCALES:
        x = (torch.randn(1, 1, module.weight.numel(), generator=generator) + 1) * scale
        x = x.to(module.weight.dtype)
        said, least = module(x), torch.finfo(x.dtype).smallest_normal
        if not torch.allclose(_norm_alone(kernel, packed, x), said, rtol=_LAST_DIGITS, atol=least):
            return False
    return True
