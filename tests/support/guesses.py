"""Predictors that say what a test tells them."""

from collections.abc import Callable, Mapping

import numpy as np

from moe_infinity.predictors.base import ExpertPredictor
from moe_infinity.tracing.event import Event
from moe_infinity.types import ExpertKey, ExpertShape


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


class Guesses(ExpertPredictor):
    """Says what it is told to. ``on_observe`` runs inside an event, right after its look-up;
    ``on_predict`` once wrong prefetches are cancelled and the first demand loads submitted."""

    def __init__(self, shape: ExpertShape, rng: np.random.Generator | None = None) -> None:
        super().__init__(shape)
        self.rng = rng
        self.wanted: set[ExpertKey] = set()
        self.on_observe: Callable[[Event], object] = lambda event: None
        self.on_predict: Callable[[], object] = lambda: None

    def observe(self, event: Event) -> None:
        self.on_observe(event)

    def predict(self) -> np.ndarray:
        self.on_predict()
        scores = np.zeros((self.shape.num_layers, self.shape.num_experts))
        if self.rng is not None:
            scores = self.rng.random(scores.shape) ** 4
        for key in self.wanted:
            scores[key] = 1.0
        return scores
