"""What to prefetch: ranks a predictor's scores and bounds what is in flight. Moves no bytes."""

from __future__ import annotations

import numpy as np

from moe_infinity.predictors.base import ExpertPredictor
from moe_infinity.residency.directory import Directory, State
from moe_infinity.types import ExpertKey

# A prefetch has to be more likely right than wrong to be worth its bytes on a busy link.
_MIN_SCORE = 0.5


class PrefetchPlanner:
    """Turns scores over coming experts into an ordered list of keys worth loading ahead."""

    def __init__(self, predictor: ExpertPredictor, directory: Directory) -> None:
        self.predictor = predictor
        self.directory = directory
        shape = directory.shape
        counts = np.array(shape.experts_per_layer)[:, None]
        self._exists = np.arange(shape.num_experts) < counts  # [L, E]

    def plan(self, layer: int) -> list[ExpertKey]:
        """Absent keys worth loading, seen from ``layer``, best first; nearer layers win ties."""
        scores = self.predictor.predict()
        if scores is None:
            return []
        absent = (self.directory.states == State.ABSENT).reshape(scores.shape)
        worth = np.flatnonzero((absent & self._exists & (scores >= _MIN_SCORE)).ravel())
        num_layers, num_experts = scores.shape
        distance = (worth // num_experts - layer - 1) % num_layers
        order = np.lexsort((worth, distance, -scores.ravel()[worth]))
        return [self.directory.key(flat) for flat in worth[order]]
