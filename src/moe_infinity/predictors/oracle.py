"""Knows the future: the bound of what any predictor could win. Simulator only."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from moe_infinity.predictors.base import ExpertPredictor
from moe_infinity.tracing.event import Event
from moe_infinity.types import ExpertShape

_STEPS = 4  # events per layer that a forecast reaches


class Predictor(ExpertPredictor):
    """The true experts of every layer's coming events."""

    needs_future = True

    def __init__(self, shape: ExpertShape, seed: int = 0, num_steps: int = _STEPS) -> None:
        super().__init__(shape, seed)
        self._coming: list[list[NDArray[np.int64]]] = [[] for _ in range(shape.num_layers)]
        self._at = np.zeros(shape.num_layers, dtype=np.int64)
        self._num_steps = num_steps

    def set_future(self, events: Sequence[Event]) -> None:
        for event in events:
            self._coming[event.layer].append(event.experts)

    def observe(self, event: Event) -> None:
        self._at[event.layer] += 1

    def predict(self) -> NDArray[np.float64] | None:
        scores: NDArray[np.float64] = self._steps(1)[0]
        return scores

    def forecast(self) -> NDArray[np.float64] | None:
        return self._steps(self._num_steps)

    def _steps(self, count: int) -> NDArray[np.float64]:
        scores = np.zeros((count, *self.grid))
        for layer, events in enumerate(self._coming):
            start = int(self._at[layer])
            for step, experts in enumerate(events[start : start + count]):
                scores[step, layer, experts] = 1.0
        return scores
