"""Hooks on the model that tell its experts which step they are in."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from moe_infinity.types import Phase


@dataclass(frozen=True)
class Step:
    """One forward pass: its phase and which tokens of its [rows, length] grid are real."""

    number: int
    phase: Phase
    num_rows: int
    length: int
    is_real: NDArray[np.bool_] | None = None  # [rows * length]; None: all are

    def real_tokens(self, num_tokens: int) -> NDArray[np.bool_] | None:
        """The mask if it is about these tokens; a layer that sees others (images) has none."""
        return self.is_real if num_tokens == self.num_rows * self.length else None

    def request_rows(self, num_tokens: int) -> NDArray[np.int64]:
        """[num_tokens] row of the batch of each token."""
        if num_tokens != self.num_rows * self.length:
            return np.zeros(num_tokens, dtype=np.int64)
        return np.repeat(np.arange(self.num_rows), self.length)


class StepTap:
    """Follows the top-level model's forward calls; ``step`` is the one that is running."""

    def __init__(
        self, model: nn.Module, on_begin: Callable[[Step], None], on_end: Callable[[], None]
    ) -> None:
        self.step = Step(0, "prefill", 1, 1)
        self._on_begin = on_begin
        self._on_end = on_end
        self._handles = [
            model.register_forward_pre_hook(self._before, with_kwargs=True),
            model.register_forward_hook(self._after, with_kwargs=True, always_call=True),
        ]

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        tokens = args[0] if args else kwargs.get("input_ids")
        if tokens is None:
            tokens = kwargs["inputs_embeds"][..., 0]
        if kwargs.get("decoder_input_ids") is not None:
            tokens = kwargs["decoder_input_ids"]
        rows, length = tokens.shape
        phase: Phase = "decode" if length == 1 else "prefill"
        mask = _real(kwargs.get("attention_mask"), rows, length)
        self.step = Step(self.step.number + 1, phase, rows, length, mask)
        self._on_begin(self.step)

    def _after(self, *_: Any) -> None:
        self._on_end()


def _real(mask: Any, rows: int, length: int) -> NDArray[np.bool_] | None:
    """The last ``length`` columns of a [rows, context] mask; None if nothing is masked."""
    if not isinstance(mask, torch.Tensor) or mask.dim() != 2 or mask.shape[0] != rows:
        return None
    if mask.shape[1] < length:
        return None
    real = mask[:, -length:].bool().reshape(-1).numpy(force=True)
    return None if real.all() else real
