"""Predicts by which experts of one layer follow which of the layer before."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from moe_infinity.predictors.base import ExpertPredictor, Memory
from moe_infinity.tracing.event import Event
from moe_infinity.tracing.state_tensors import Dims, load_state, save_state
from moe_infinity.types import ExpertShape

_FORM = "transition"
_SMOOTHING = 4.0  # uses of an expert before its followers count more than the layer's average


class Predictor(ExpertPredictor):
    """Order 1: P(expert of layer i+1 | expert of layer i), averaged over the experts used.

    The first layer follows the last one of the token before. Only the next layer is predicted.
    """

    memory = Memory(per_pair=4)

    def __init__(self, shape: ExpertShape, seed: int = 0) -> None:
        super().__init__(shape, seed)
        num_layers, num_experts = self.grid
        # [L, E, E]: uses of the second expert in the layer after the first's
        self._follow = np.zeros((num_layers, num_experts, num_experts), dtype=np.float32)
        self._uses = np.zeros(self.grid, dtype=np.float32)
        self._total = np.zeros(self.grid, dtype=np.float32)
        self._last: tuple[int, NDArray[np.int64]] | None = None

    def begin_request(self) -> None:
        self._last = None

    def observe(self, event: Event) -> None:
        if event.phase == "prefill":
            self._last = None
            return
        layer, experts = event.layer, event.experts
        if self._last is not None and (self._last[0] + 1) % self.grid[0] == layer:
            before = self._last[0]
            self._follow[before, self._last[1][:, None], experts] += 1
            self._uses[before, self._last[1]] += 1
            self._total[layer, experts] += 1
        self._last = (layer, experts)

    def predict(self) -> NDArray[np.float64] | None:
        if self._last is None:
            return None
        layer, experts = self._last
        coming = (layer + 1) % self.grid[0]
        total = self._total[coming].astype(np.float64)
        average = total / max(total.sum() / self.shape.top_k, 1e-9)
        seen = self._uses[layer, experts][:, None]
        follow = self._follow[layer, experts]
        chances = (follow + _SMOOTHING * average) / (seen + _SMOOTHING)
        scores = np.zeros(self.grid)
        scores[coming] = np.minimum(1.0, self._combine(chances))
        return scores

    def save(self, path: Path) -> None:
        arrays = {"follow": self._follow, "uses": self._uses, "total": self._total}
        save_state(path, _FORM, arrays, self.shape, self.fingerprint)

    def load(self, path: Path) -> None:
        arrays = load_state(path, _FORM, self.shape, self.fingerprint, self._dims())
        self._follow, self._uses = arrays["follow"], arrays["uses"]
        self._total = arrays["total"]

    def _dims(self) -> dict[str, Dims]:
        arrays = {"follow": self._follow, "uses": self._uses, "total": self._total}
        return {name: array.shape for name, array in arrays.items()}

    @staticmethod
    def _combine(chances: NDArray[np.float64]) -> NDArray[np.float64]:
        """[K, E] what each expert used says -> [E], scaled back to the mass of one event."""
        sharpened: NDArray[np.float64] = chances.mean(axis=0)
        return sharpened
