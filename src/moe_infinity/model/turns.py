"""Rotary positions of one token after the other."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

_AT_ONCE = 256


class Turns:
    """Cosines and sines of positions, made by the model's own module for many at a time."""

    def __init__(self, rotary: Any, is_moving: bool) -> None:
        """is_moving: they depend on the context too."""
        self._rotary = rotary
        self._most = 1 if is_moving else _AT_ONCE
        self.bypassed: list[nn.Module] = [] if is_moving else list(rotary.modules())
        self._made: tuple[torch.Tensor, torch.Tensor] | None = None
        self._start = 0

    def of(self, x: torch.Tensor, position: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Of a position [1, 1], each [1, 1, rotary_dim], in the dtype of x."""
        at = int(position) - self._start
        if self._made is None or not 0 <= at < self._most or self._made[0].dtype is not x.dtype:
            self._start, at = int(position), 0
            places = torch.arange(self._start, self._start + self._most)
            self._made = self._rotary(x, places[None])
        cos, sin = self._made
        return cos[:, at : at + 1], sin[:, at : at + 1]
