"""How often a router's early word on an expert comes true, by how sure it sounds.

An expert's lead is how far its score lies above the line between chosen and not, in standard
deviations of the scores. Leads are sorted into bins, apart for experts in recent use, which come
true more often: those are resident mostly, and it is the others that have to be loaded.
T: tokens, D: distances (layers ahead, less one), E: experts.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moe_infinity.tracing.state_tensors import Dims

_BINS, _WIDEST = 32, 2.0
_RECENT = (0.05, 0.5)  # fading uses; what is below the first is out of use
_CLASSES = len(_RECENT) + 1
_PRIOR = 20.0  # observations that the start values of a bin are worth


class LeadTable:
    """Observations and uses by distance and bin."""

    def __init__(self, depth: int) -> None:
        centres = (np.arange(_BINS) + 0.5) / _BINS * 2 * _WIDEST - _WIDEST
        start = np.tile(1 / (1 + np.exp(-3 * (centres - 0.2))), _CLASSES)
        self._seen = np.full((depth, len(start)), _PRIOR)
        self._used = np.stack([_PRIOR * start * 0.9**d for d in range(depth)])

    def bins(
        self, scores: NDArray[np.float32], uses: NDArray[np.float64], top_k: int
    ) -> NDArray[np.int64]:
        """[T, D, E] scores and [D, E] fading uses -> [T, D, E] bins."""
        recency: NDArray[np.int64] = np.searchsorted(_RECENT, uses)
        return _bins_of(scores, top_k) + recency * _BINS

    def chances(self, bins: NDArray[np.int64]) -> NDArray[np.float64]:
        """[T, D, E] how often such leads came true."""
        rates = self._used / self._seen
        found: NDArray[np.float64] = rates[np.arange(bins.shape[1])[:, None], bins]
        return found

    def learn(self, distance: int, bins: NDArray[np.int64], used: NDArray[np.float64]) -> None:
        """bins [E] of one token's layer; used: [E] 1 where the expert was."""
        size = self._seen.shape[1]
        self._seen[distance] += np.bincount(bins, minlength=size)
        self._used[distance] += np.bincount(bins, used, minlength=size)

    def arrays(self) -> dict[str, NDArray[Any]]:
        return {"seen": self._seen, "used": self._used}

    def dims(self) -> dict[str, Dims]:
        """Of ``arrays``, for ``load_state``."""
        return {name: array.shape for name, array in self.arrays().items()}

    def restore(self, arrays: Mapping[str, NDArray[Any]]) -> None:
        self._seen, self._used = arrays["seen"], arrays["used"]


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
