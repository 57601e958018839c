"""Rotary positions of one token after the other."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

_AT_ONCE = 256
_MOVING_ROPE = ("dynamic", "longrope")  # whose frequencies depend on how long the context is


class Turns:
    """Cosines and sines of positions, made by the model's own module for many at a time."""

    def __init__(self, rotary: Any, is_moving: bool) -> None:
        """is_moving: they depend on the context too."""
        self._rotary = rotary
        self._is_moving = is_moving
        self.bypassed: list[nn.Module] = [] if is_moving else list(rotary.modules())
        self._made: tuple[torch.Tensor, torch.Tensor] | None = None
        self._start = 0
        self._numbers: list[torch.Tensor] = []  # the module's, when they were made
        self._versions: list[int] = []  # of those, then

    def of(self, x: torch.Tensor, position: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Of a position [1, 1], each [1, 1, rotary_dim], in the dtype of x."""
        if self._is_moving:
            made: tuple[torch.Tensor, torch.Tensor] = self._rotary(x, position)
            return made
        if not self._has(int(position), x.dtype):
            self._made = None  # until all of it is there, whatever interrupts
            self._start = int(position) // _AT_ONCE * _AT_ONCE
            self._numbers = list(self._rotary.buffers())
            self._versions = _versions_of(self._numbers)
            places = torch.arange(self._start, self._start + _AT_ONCE)
            self._made = self._rotary(x, places[None])
        assert self._made is not None
        cos, sin = self._made
        at = int(position) - self._start
        return cos.narrow(1, at, 1), sin.narrow(1, at, 1)

    def addresses_of(self, position: int, dtype: torch.dtype) -> tuple[int, int] | None:
        """Where they lie, contiguous, if they were made already."""
        if self._made is None or not self._has(position, dtype):
            return None
        cos, sin = self._made
        are_plain = cos.is_contiguous() and sin.is_contiguous() and sin.dtype is dtype
        if not are_plain or not cos.is_cpu:
            return None
        ahead_bytes = (position - self._start) * cos.shape[-1] * cos.element_size()
        return cos.data_ptr() + ahead_bytes, sin.data_ptr() + ahead_bytes

    def _has(self, position: int, dtype: torch.dtype) -> bool:
        if self._made is None or not 0 <= position - self._start < _AT_ONCE:
            return False
        return self._made[0].dtype is dtype and _versions_of(self._numbers) == self._versions


def _versions_of(numbers: list[torch.Tensor]) -> list[int]:
    return [0 if each.is_inference() else each._version for each in numbers]


def has_moving_rope(text: Any) -> bool:
    """Whether cosines and sines depend on the context too. text: a text model's config."""
    rope = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {}
    kinds = rope.values() if any(isinstance(v, dict) for v in rope.values()) else [rope]
    return any(isinstance(v, dict) and v.get("rope_type") in _MOVING_ROPE for v in kinds)
