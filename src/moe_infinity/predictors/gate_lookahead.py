"""The model's own next routers, asked early: on a layer's output, after the next layer's norm.

Gate reuse began with Mixtral-Offloading (arXiv 2312.17238); the norm is what most families do
between the two (compare Speculating Experts, arXiv 2603.19289). Exact: it only loads ahead.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from moe_infinity.predictors.base import ExpertPredictor, Foresight
from moe_infinity.tracing.event import Event
from moe_infinity.types import ExpertShape

DEPTH = 3
# Chance that the expert ranked r by an early router is used, at distance 1: start values of what
# is measured while running.
_START = 0.7
_MEMORY = 0.02


class Predictor(ExpertPredictor):
    """Chance by rank: how often the r-th choice of a router asked d layers early came true."""

    foresight = Foresight("next_norm", DEPTH)

    def __init__(self, shape: ExpertShape, seed: int = 0) -> None:
        super().__init__(shape, seed)
        self._scores: NDArray[np.float64] = np.zeros(self.grid)
        ranks = np.arange(shape.num_experts)
        near = np.where(ranks < shape.top_k, _START, 0.3 * 0.5 ** (ranks - shape.top_k))
        self._truth = np.stack([near * 0.9**d for d in range(DEPTH)])  # [D, E] by rank
        self._guessed: dict[int, dict[int, NDArray[np.int64]]] = {}  # layer: distance: [T, E]

    def begin_request(self) -> None:
        self._guessed.clear()
        self._scores = np.zeros(self.grid)

    def observe(self, event: Event) -> None:
        """Learn how far each rank can be trusted; what was said of this layer is spent."""
        used = np.zeros(self.grid[1])
        used[event.experts] = 1
        for distance, ranked in self._guessed.pop(event.layer, {}).items():
            if len(ranked) == 1:
                truth = self._truth[distance]
                truth += _MEMORY * (used[ranked[0]] - truth)
        self._scores[event.layer] = 0

    def foresee(self, layer: int, scores: NDArray[np.float32]) -> None:
        """scores [T, D, E]; a later saying about a layer replaces an earlier one."""
        for distance in range(scores.shape[1]):
            coming = layer + 1 + distance
            if coming >= self.grid[0]:
                break
            ranked = np.argsort(-scores[:, distance], axis=1, kind="stable")  # [T, E]
            chance = np.zeros((len(ranked), self.grid[1]))
            np.put_along_axis(chance, ranked, self._truth[distance][None], axis=1)
            self._scores[coming] = 1 - (1 - chance).prod(axis=0)
            self._guessed.setdefault(coming, {})[distance] = ranked

    def predict(self) -> NDArray[np.float64] | None:
        return self._scores
