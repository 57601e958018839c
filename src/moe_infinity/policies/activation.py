"""The paper's replacement: keep what past requests that behaved alike will use, early layers most.

Xue et al., MoE-Infinity (arXiv 2401.14361): evict the smallest
p(e) = (pEAM[i][e] + eps) / sum_j pEAM[i][j] * (1 - i/L). The decay favours early layers because
they have the least time to be prefetched; demand-only it costs hits.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from moe_infinity.policies.base import CachePolicy
from moe_infinity.tracing.event import Event
from moe_infinity.types import ExpertShape

_EPSILON = 1e-8


class Policy(CachePolicy):
    """Activation-aware replacement; with no prediction at hand the request's own rEAM is used."""

    wants_forecast = True

    def __init__(self, shape: ExpertShape, num_slots: int, seed: int = 0) -> None:
        super().__init__(shape, num_slots, seed)
        self._own = np.zeros(self.grid)
        self._predicted: NDArray[np.float64] | None = None
        self._decay = (1 - np.arange(shape.num_layers) / shape.num_layers)[:, None]

    def begin_request(self) -> None:
        self._own[:] = 0
        self._predicted = None

    def on_event(self, event: Event) -> None:
        self._own[event.layer] += event.counts
        if event.phase == "prefill":
            self._predicted = None

    def on_forecast(self, forecast: NDArray[np.float64]) -> None:
        self._predicted = forecast[0]

    def keep_scores(self, layer: int) -> NDArray[np.float64]:
        matrix = self._own
        if self._predicted is not None:  # a predictor may speak of some layers only
            speaks = self._predicted.any(axis=1, keepdims=True)
            matrix = np.where(speaks, self._predicted, self._own)
        rows = matrix.sum(axis=1, keepdims=True) + _EPSILON * matrix.shape[1]
        shares: NDArray[np.float64] = (matrix + _EPSILON) / rows * self._decay
        return shares
