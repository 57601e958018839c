"""Past passes, searched by the running one: by its tokens' meaning, then by its path so far.

Knows nothing of predictions. C: passes kept, L: layers, E: experts, H: hidden size.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from moe_infinity.types import ExpertShape

_EPSILON = 1e-12


class Match(NamedTuple):
    """The past pass most like the running one, its experts in falling probability."""

    entry: int
    score: float  # cosine
    order: NDArray[np.int64]  # [L, E] experts by rank
    mass: NDArray[np.float32]  # [L, E] probability up to a rank


class MapStore:
    """Pairs (embedding, map) and the similarity of one running pass to each of them.

    float32, 25 MB of maps at 1000 x 48 x 128, touched only as it fills: 16 bits would halve that,
    but a layer's products would take 0.24 ms instead of 0.014. Half as wide on disk.
    """

    def __init__(self, shape: ExpertShape, capacity: int, first_layers: int) -> None:
        grid = (shape.num_layers, shape.num_experts)
        self._maps = np.zeros((capacity, *grid), dtype=np.float32)
        self._lengths = np.zeros((shape.num_layers, capacity), dtype=np.float32)  # squared, by row
        self._meanings = np.zeros((capacity, 0), dtype=np.float32)  # [C, H] of length 1
        self._first_share = min(1.0, first_layers / shape.num_layers)
        self.size = 0
        self.num_seen = -1  # layers of the running pass; -1: there is none
        self._match: Match | None = None
        self._map = np.zeros(grid, dtype=np.float32)  # of the running pass
        self._meaning = np.zeros(0, dtype=np.float32)

    def begin(self, embedding: NDArray[np.float32]) -> NDArray[np.float32]:
        """A pass starts. embedding [H]; returns [size] cosines with those of past passes."""
        self._map = np.zeros_like(self._map)
        self.num_seen = 0
        self._meaning = embedding / (np.linalg.norm(embedding) + _EPSILON)
        self._dots = np.zeros(self.size, dtype=np.float32)
        self._theirs = np.zeros(self.size, dtype=np.float32)
        self._own = 0.0
        self._semantic = np.zeros(0, dtype=np.float32)
        if self.size:
            self._semantic = self._meanings[: self.size] @ self._meaning
        return self._semantic

    def follow(self, layer: int, row: NDArray[np.float32]) -> NDArray[np.float32]:
        """One more layer [E] is seen; returns [size] cosines over all layers seen so far."""
        self.num_seen += 1
        self._map[layer] = row
        self._dots += self._maps[: self.size, layer] @ row
        self._theirs += self._lengths[layer, : self.size]
        self._own += float(row @ row)
        return self._path_scores()

    def match(self, similar: NDArray[np.float32]) -> Match:
        """The entry of the best of [size] cosines."""
        entry = int(np.argmax(similar))
        score = float(similar[entry])
        if self._match is None or self._match.entry != entry:
            table = self._maps[entry]
            order = np.argsort(-table, axis=1, kind="stable")
            mass = np.take_along_axis(table, order, axis=1).cumsum(axis=1)
            self._match = Match(entry, score, order, mass)
        return self._match._replace(score=score)

    def drop(self) -> None:
        """Forget the running pass, if there is one."""
        self.num_seen = -1

    def keep(self) -> None:
        """End the running pass, storing what was seen of it.

        A full store gives up the pass most like it (fMoE's RDY).
        """
        if self.num_seen <= 0:
            return self.drop()
        at = self.size
        if at == len(self._maps):
            near = self._first_share * self._semantic
            at = int(np.argmax(near + (1 - self._first_share) * self._path_scores()))
        elif not at:
            self._meanings = np.zeros((len(self._maps), len(self._meaning)), dtype=np.float32)
        self._maps[at], self._meanings[at] = self._map, self._meaning
        self._measure(at, at + 1)
        self.size = max(self.size, at + 1)
        self._match = None
        self.drop()

    def arrays(self) -> dict[str, NDArray[np.float16]]:
        kept = {"maps": self._maps, "meanings": self._meanings}
        return {name: array[: self.size].astype(np.float16) for name, array in kept.items()}

    def restore(self, maps: NDArray[np.float16], meanings: NDArray[np.float16]) -> None:
        self.size = min(len(maps), len(self._maps))
        self._maps[: self.size] = maps[-self.size :]
        self._meanings = np.zeros((len(self._maps), meanings.shape[1]), dtype=np.float32)
        self._meanings[: self.size] = meanings[-self.size :]
        self._measure(0, self.size)

    def _path_scores(self) -> NDArray[np.float32]:
        cosines: NDArray[np.float32] = self._dots / (np.sqrt(self._theirs * self._own) + _EPSILON)
        return cosines

    def _measure(self, first: int, end: int) -> None:
        self._lengths[:, first:end] = (self._maps[first:end] ** 2).sum(axis=2).T
