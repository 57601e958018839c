"""The paper's predictor: past requests that activated alike say what this one will use.

Xue et al., MoE-Infinity (arXiv 2401.14361): match the running request's activation matrix against
a collection of finished ones by cosine similarity and sum the best.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from moe_infinity.predictors.base import ExpertPredictor, Memory
from moe_infinity.tracing.collection import EAMCollection, Query
from moe_infinity.tracing.eam import counts_by_row
from moe_infinity.tracing.event import Event
from moe_infinity.tracing.trace import PHASES
from moe_infinity.types import ExpertShape

CAPACITY = 120  # the paper: enough for all its models
_BEST = 4
_EPSILON = 1e-6


class Predictor(ExpertPredictor):
    """Chances from the ``_BEST`` most similar past requests, rows normalised to top-k uses."""

    memory = Memory(per_expert=20 * CAPACITY)

    def __init__(self, shape: ExpertShape, seed: int = 0, capacity: int = CAPACITY) -> None:
        super().__init__(shape, seed)
        self.collection = EAMCollection(shape, capacity)
        self._queries: dict[int, Query] = {}  # by row of the batch
        self._matched: tuple[int, ...] = ()
        self._scores: NDArray[np.float64] | None = None

    def begin_request(self) -> None:
        self._queries.clear()
        self._matched, self._scores = (), None

    def observe(self, event: Event) -> None:
        for row, counts in counts_by_row(event).items():
            query = self._queries.get(row)
            if query is None:
                query = self._queries[row] = Query(self.collection)
            experts = np.flatnonzero(counts)
            used = counts[experts].astype(np.float32)
            query.add(PHASES.index(event.phase), event.layer, experts, used)

    def predict(self) -> NDArray[np.float64] | None:
        if not self.collection.size:
            return None
        best = tuple(at for query in self._queries.values() for at in self._best(query))
        if best and best != self._matched:
            self._matched = best
            self._scores = self._chances(best)
        return self._scores

    def end_request(self) -> None:
        for query in self._queries.values():
            if query.counts[1].any():
                self.collection.add(query.counts)
        self._queries.clear()

    def save(self, path: Path) -> None:
        if self.collection.size:
            self.collection.save(path, self.fingerprint)

    def load(self, path: Path) -> None:
        self.collection.load(path, self.fingerprint)

    def _best(self, query: Query) -> list[int]:
        similarities = query.similarities()
        count = min(_BEST, len(similarities))
        chosen = np.argpartition(-similarities, count - 1)[:count]
        return sorted(int(at) for at in chosen)

    def _chances(self, entries: tuple[int, ...]) -> NDArray[np.float64]:
        total = self.collection.entries[list(entries), 1].sum(axis=0, dtype=np.float64)
        rows = total.sum(axis=1, keepdims=True) + _EPSILON
        rows_in_batch = max(1, len(self._queries))
        chances: NDArray[np.float64] = np.minimum(
            1.0, total / rows * self.shape.top_k * rows_in_batch
        )
        return chances
