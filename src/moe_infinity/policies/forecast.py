"""Evicts by a forecast of several steps, whoever makes it: needed last goes first.

The eviction half of SeqMoE (arXiv 2609.12978): with an oracle's forecast of W steps it is Belady's
rule cut off at W; without any forecast it is LRU.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from moe_infinity.policies.base import CachePolicy
from moe_infinity.tracing.event import Event
from moe_infinity.types import ExpertShape


class Policy(CachePolicy):
    """Expected events to the next use; what the forecast does not reach is ranked by last use."""

    wants_forecast = True

    def __init__(self, shape: ExpertShape, num_slots: int, seed: int = 0) -> None:
        super().__init__(shape, num_slots, seed)
        self._cycles = np.zeros(self.grid)
        self._last_use = np.zeros(self.grid)
        self._clock = 0
        self._ids = np.arange(shape.num_layers, dtype=np.float64)
        self._reach = 0

    def begin_request(self) -> None:
        self._cycles[:] = 0
        self._reach = 0

    def on_event(self, event: Event) -> None:
        self._clock += 1
        self._last_use[event.layer, event.experts] = self._clock

    def on_forecast(self, forecast: NDArray[np.float64]) -> None:
        """[W, L, E]: expected full cycles before the next use, W where none is foreseen."""
        chance = np.clip(forecast, 0.0, 1.0)
        unused = np.cumprod(1 - chance, axis=0)
        self._cycles = unused.sum(axis=0)
        self._reach = len(forecast)

    def keep_scores(self, layer: int) -> NDArray[np.float64]:
        num_layers = self.shape.num_layers
        recency = self._last_use / (self._clock + 1)  # below one event
        way = (self._ids - layer - 1) % num_layers + 1
        foreseen = self._cycles * num_layers + way[:, None]
        beyond = (self._reach + 1) * num_layers + 1.0
        return recency - np.where(self._cycles >= self._reach, beyond, foreseen)
