"""The model's own next routers, asked early: this router's input plus the mean change to theirs.

Gate reuse began with Mixtral-Offloading (arXiv 2312.17238); the correction is DALI's (arXiv
2602.03495), learned while running. Exact: it only loads ahead.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from moe_infinity.predictors.base import ExpertPredictor, Foresight
from moe_infinity.tracing.event import Event
from moe_infinity.types import ExpertShape

DEPTH = 3
# A router's early word on an expert is judged by its lead: how far its score lies above the line
# between chosen and not, in standard deviations of the scores. Leads are sorted into bins, apart
# for experts in recent use, which come true more often: those are resident mostly, and it is the
# others that have to be loaded.
_BINS, _WIDEST = 32, 2.0
_FADING, _RECENT = 0.8, (0.05, 0.5)  # uses fade per pass; what is below the first is out of use
_CLASSES = len(_RECENT) + 1
_PRIOR = 20.0  # observations that the start values of a bin are worth


class Predictor(ExpertPredictor):
    """Chance by lead: how often experts with such a lead, d layers early, came to be used."""

    foresight = Foresight("residual", DEPTH)

    def __init__(self, shape: ExpertShape, seed: int = 0) -> None:
        super().__init__(shape, seed)
        self._scores: NDArray[np.float64] = np.zeros(self.grid)
        centres = (np.arange(_BINS) + 0.5) / _BINS * 2 * _WIDEST - _WIDEST
        start = 1 / (1 + np.exp(-3 * (centres - 0.2)))
        start = np.tile(start, _CLASSES)
        self._seen = np.full((DEPTH, len(start)), _PRIOR)
        self._used = np.stack([_PRIOR * start * 0.9**d for d in range(DEPTH)])
        self._uses = np.zeros(self.grid)  # fading
        # By layer: what was said of it, by distance: bins [T, E]
        self._guessed: dict[int, dict[int, NDArray[np.int64]]] = {}

    def begin_request(self) -> None:
        self._guessed.clear()
        self._scores = np.zeros(self.grid)
        self._uses[:] = 0

    def observe(self, event: Event) -> None:
        """Learn how far each lead can be trusted; what was said of this layer is spent."""
        used = np.zeros(self.grid[1])
        used[event.experts] = 1
        for distance, bins in self._guessed.pop(event.layer, {}).items():
            if len(bins) == 1:  # of several tokens it is not known whose experts these are
                size = _BINS * _CLASSES
                self._seen[distance] += np.bincount(bins[0], minlength=size)
                self._used[distance] += np.bincount(bins[0], used, minlength=size)
        self._scores[event.layer] = 0
        self._uses[event.layer] = self._uses[event.layer] * _FADING + used

    def foresee(self, layer: int, scores: NDArray[np.float32]) -> None:
        """scores [T, D, E]; a later saying about a layer replaces an earlier one."""
        reach = min(scores.shape[1], DEPTH, self.grid[0] - layer - 1)
        if reach <= 0:
            return
        coming = slice(layer + 1, layer + 1 + reach)
        recency = np.searchsorted(_RECENT, self._uses[coming])  # [D, E]
        bins = _bins_of(scores[:, :reach], self.shape.top_k) + recency * _BINS  # [T, D, E]
        rates = self._used[:reach] / self._seen[:reach]
        chance = rates[np.arange(reach)[:, None], bins]  # [T, D, E]
        self._scores[coming] = chance[0] if len(chance) == 1 else 1 - (1 - chance).prod(axis=0)
        for distance in range(reach):
            guessed = self._guessed.setdefault(layer + 1 + distance, {})
            guessed[distance] = bins[:, distance]

    def predict(self) -> NDArray[np.float64] | None:
        return self._scores


def _bins_of(scores: NDArray[np.float32], top_k: int) -> NDArray[np.int64]:
    """[T, D, E] scores -> the bins of their leads; experts that a layer lacks (-inf) come last."""
    if top_k >= scores.shape[2]:
        return np.full(scores.shape, _BINS - 1)
    ranked = np.partition(scores, (-top_k - 1, -top_k), axis=2)
    line = 0.5 * (ranked[..., -top_k - 1 : -top_k] + ranked[..., -top_k : 1 - top_k or None])
    finite = np.isfinite(scores)
    known = scores if finite.all() else np.where(finite, scores, line)
    spread = known.std(axis=2, keepdims=True) + 1e-9
    leads = (known - line) / spread
    places = (leads + _WIDEST) * (_BINS / (2 * _WIDEST))
    bins: NDArray[np.int64] = np.clip(places, 0, _BINS - 1).astype(np.int64)
    bins[~finite] = 0
    return bins
