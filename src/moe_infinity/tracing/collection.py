"""The collection of past requests' activation matrices, and finding those most alike.

As published (Xue et al., arXiv 2401.14361): bounded; when it is full a newcomer replaces the most
similar one, which keeps it recent and diverse. Matching is incremental: one row per layer.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from moe_infinity.tracing.state_tensors import load_state, save_state
from moe_infinity.types import ExpertShape

_FORM = "eamc"
_TINY = 1e-12


class EAMCollection:
    """At most ``capacity`` rEAMs. L: layers, E: experts, C: entries, two phases each."""

    def __init__(self, shape: ExpertShape, capacity: int) -> None:
        self.shape = shape
        self.capacity = capacity
        self.size = 0
        grid = (shape.num_layers, shape.num_experts)
        self.entries = np.zeros((capacity, 2, *grid), dtype=np.float32)
        # The same with entries last: a query's row update reads K rows of C numbers.
        self.by_expert = np.zeros((2, *grid, capacity), dtype=np.float32)
        self.norms = np.zeros((2, shape.num_layers, capacity), dtype=np.float32)  # squared, by row

    def add(self, counts: NDArray[np.float32]) -> int:
        """Take in a finished rEAM [2, L, E]; returns its place, the most similar one's if full."""
        at = self.size
        if at == self.capacity:
            at = int(np.argmax(self._similarities(counts)))
        else:
            self.size += 1
        self._put(at, counts)
        return at

    def save(self, path: Path, fingerprint: str) -> None:
        save_state(path, _FORM, {"entries": self.entries[: self.size]}, self.shape, fingerprint)

    def load(self, path: Path, fingerprint: str) -> None:
        """Replace the entries by a file's, the latest ones if it holds more. Raises TraceError."""
        expected = {"entries": ("n", *self.entries.shape[1:])}
        entries = load_state(path, _FORM, self.shape, fingerprint, expected)["entries"]
        kept = entries[-self.capacity :]
        self.size = len(kept)
        for at, counts in enumerate(kept):
            self._put(at, counts)

    def _put(self, at: int, counts: NDArray[np.float32]) -> None:
        self.entries[at] = counts
        self.by_expert[..., at] = counts
        self.norms[..., at] = (counts * counts).sum(axis=2)

    def _similarities(self, counts: NDArray[np.float32]) -> NDArray[np.float32]:
        """[C] cosine of flattened matrices, both phases in one."""
        flat = self.entries[: self.size].reshape(self.size, -1)
        norms = self.norms[..., : self.size].sum(axis=(0, 1)) * (counts * counts).sum()
        cosines: NDArray[np.float32] = (flat @ counts.ravel()) / np.sqrt(norms + _TINY)
        return cosines


class Query:
    """A running request's match against every entry, row by row.

    Only rows seen so far count on either side. Prefill is compared with prefill and decode with
    decode; ``similarities`` weighs them by the passes of each, the prompt counting as
    ``_SEED_PASSES`` of decode, so that a decode phase that has just begun is led by it.
    """

    _SEED_PASSES = 8.0

    def __init__(self, collection: EAMCollection) -> None:
        self._of = collection
        shape, capacity = collection.shape, collection.capacity
        self._counts = np.zeros((2, shape.num_layers, shape.num_experts), dtype=np.float32)
        self._dots = np.zeros((2, capacity), dtype=np.float32)
        self._own_norms = [0.0, 0.0]
        self._norms = np.zeros((2, capacity), dtype=np.float32)  # of entries, over rows seen
        self._inverse = np.zeros((2, capacity), dtype=np.float32)  # 1 / their roots
        self._seen = np.zeros((2, shape.num_layers), dtype=bool)
        self._num_events = [0, 0]

    @property
    def counts(self) -> NDArray[np.float32]:
        """[2, L, E] the request's own rEAM so far."""
        return self._counts

    def add(
        self, phase: int, layer: int, experts: NDArray[np.int64], counts: NDArray[np.float32]
    ) -> None:
        """One layer's routing: ``experts`` [K] and the tokens each received."""
        row = self._counts[phase, layer]
        before = row[experts]
        row[experts] = before + counts
        self._own_norms[phase] += float(counts.dot(2 * before + counts))
        self._dots[phase] += counts.dot(self._of.by_expert[phase, layer].take(experts, axis=0))
        self._num_events[phase] += 1
        if not self._seen[phase, layer]:
            self._seen[phase, layer] = True
            self._norms[phase] += self._of.norms[phase, layer]
            self._inverse[phase] = 1 / np.sqrt(self._norms[phase] + _TINY)

    def similarities(self) -> NDArray[np.float32]:
        """[C] 0 to 1, for the entries there are."""
        decoded = self._num_events[1] / self._of.shape.num_layers
        weights = (self._SEED_PASSES if self._num_events[0] else 0.0, decoded)
        total = np.zeros(self._of.size, dtype=np.float32)
        for phase in (0, 1):
            if weights[phase]:
                total += self._cosines(phase, weights[phase] / sum(weights))
        return total

    def _cosines(self, phase: int, share: float) -> NDArray[np.float32]:
        size = self._of.size
        scale = np.float32(share / math.sqrt(self._own_norms[phase] + _TINY))
        cosines: NDArray[np.float32] = self._dots[phase, :size] * self._inverse[phase, :size]
        cosines *= scale
        return cosines
