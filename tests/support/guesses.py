"""A predictor that says what a test tells it."""

from collections.abc import Mapping

import numpy as np

from moe_infinity.predictors.base import ExpertPredictor
from moe_infinity.tracing.event import Event


class Guessing(ExpertPredictor):
    """``say`` sets the chances of (layer, expert); the others' are 0."""

    _said: np.ndarray | None = None

    def say(self, chances: Mapping[tuple[int, int], float]) -> None:
        self._said = np.zeros(self.grid)
        for key, chance in chances.items():
            self._said[key] = chance

    def observe(self, event: Event) -> None:
        pass

    def predict(self) -> np.ndarray | None:
        return self._said
