"""fMoE's replacement: keep what is probable and was used often; recency does not count.

Yu et al., FineMoE (arXiv 2502.05370): evict the largest 1 / (p * freq); counts start anew when an
expert is evicted.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from moe_infinity.policies.base import CachePolicy
from moe_infinity.tracing.event import Event
from moe_infinity.types import ExpertKey, ExpertShape

_FLOOR = 1e-6


class Policy(CachePolicy):
    """Probability times frequency. p: predicted, else what the router last gave the expert."""

    wants_forecast = True

    def __init__(self, shape: ExpertShape, num_slots: int, seed: int = 0) -> None:
        super().__init__(shape, num_slots, seed)
        self._uses = np.zeros(self.grid)
        self._last = np.zeros(self.grid)  # share of the router weight in the layer's last event
        self._predicted: NDArray[np.float64] | None = None

    def begin_request(self) -> None:
        self._predicted = None

    def on_event(self, event: Event) -> None:
        self._uses[event.layer, event.experts] += 1
        weights = np.nan_to_num(np.abs(event.weights))
        total = weights.sum()
        shares = weights if total > 0 else event.counts.astype(np.float64)
        self._last[event.layer] = shares / max(shares.sum(), _FLOOR)

    def on_forecast(self, forecast: NDArray[np.float64]) -> None:
        self._predicted = forecast[0]

    def on_evict(self, key: ExpertKey) -> None:
        self._uses[key] = 0

    def keep_scores(self, layer: int) -> NDArray[np.float64]:
        chance = self._last if self._predicted is None else self._predicted
        return (chance + _FLOOR) * self._uses
