"""Hooks on the model that tell its experts which step they are in."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.utils.hooks import RemovableHandle

from moe_infinity.model.own_hooks import own
from moe_infinity.types import Phase


@dataclass(frozen=True)
class Step:
    """One forward pass: its phase and which tokens of its [rows, length] grid are real.

    Of an encoder-decoder model, encoder and decoder each make steps of their own.
    """

    number: int
    phase: Phase
    num_rows: int
    length: int
    is_real: NDArray[np.bool_] | None = None  # [rows * length]; None: all are
    is_encoder: bool = False
    token_ids: NDArray[np.int64] | None = None  # [rows * length]; None: embeddings were given
    context: int = 0  # tokens attended to, as far as the mask says

    def real_tokens(self, num_tokens: int) -> NDArray[np.bool_] | None:
        """The mask if it is about these tokens; a layer that sees others (images) has none."""
        return self.is_real if num_tokens == self.num_rows * self.length else None

    def real_ids(self) -> NDArray[np.int64] | None:
        """[T] ids of the tokens that are not padding, where they are known."""
        if self.token_ids is None or self.is_real is None:
            return self.token_ids
        return self.token_ids[self.is_real]

    def request_rows(self, num_tokens: int) -> NDArray[np.int64]:
        """[num_tokens] row of the batch of each token."""
        if num_tokens != self.num_rows * self.length:
            return np.zeros(num_tokens, dtype=np.int64)
        return np.repeat(np.arange(self.num_rows), self.length)


class StepTap:
    """Follows the model's forward calls; ``step`` is the one that is running.

    An encoder-decoder model is followed in its two halves: ``generate`` calls the encoder alone.
    """

    def __init__(
        self, model: Any, on_begin: Callable[[Step], None], on_end: Callable[[], None]
    ) -> None:
        self.step = Step(0, "prefill", 1, 1)
        self._on_begin = on_begin
        self._on_end = on_end
        self._handles: list[RemovableHandle] = []
        if model.config.is_encoder_decoder:
            self._follow(model.get_encoder(), is_encoder=True)
            self._follow(model.get_decoder())
        else:
            self._follow(model)

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()

    def _follow(self, module: nn.Module, is_encoder: bool = False) -> None:
        before = partial(self._before, is_encoder)
        self._handles += [
            module.register_forward_pre_hook(before, with_kwargs=True),
            module.register_forward_hook(self._after, with_kwargs=True, always_call=True),
        ]

    def _before(
        self, is_encoder: bool, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        tokens = args[0] if args else kwargs.get("input_ids")
        ids = None
        if tokens is None:
            tokens = kwargs["inputs_embeds"][..., 0]
        else:
            ids = tokens.numpy(force=True).reshape(-1)
        rows, length = tokens.shape
        phase: Phase = "decode" if length == 1 and not is_encoder else "prefill"
        given = kwargs.get("attention_mask")
        mask = _real(given, rows, length)
        context = given.shape[-1] if isinstance(given, torch.Tensor) else length
        self.step = Step(self.step.number + 1, phase, rows, length, mask, is_encoder, ids, context)
        self._on_begin(self.step)

    @own
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
