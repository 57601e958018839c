"""The logits of a lone token in float32 too, where compiled code made both at once."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

_NAME = "_float_scores"


class _Made(NamedTuple):
    logits: torch.Tensor
    version: int  # of the logits, as they were made
    scores: torch.Tensor


def note_scores(said: Any, logits: torch.Tensor, scores: torch.Tensor) -> None:
    """To a model's output: its logits [1, 1, V], made outside of inference mode so that writing to
    them is counted, are scores [1, V]."""
    setattr(said, _NAME, _Made(logits, logits._version, scores))


def last_scores(said: Any) -> torch.Tensor:
    """Float32 [rows, V] of the last token's logits, for the caller to write to."""
    logits: torch.Tensor = said.logits
    made: _Made | None = getattr(said, _NAME, None)
    if made is not None and made.logits is logits and logits._version == made.version:
        setattr(said, _NAME, None)
        return made.scores
    # A copy: a long prompt's logits need not stay.
    return logits.select(1, -1).to(copy=True, dtype=torch.float32)
