"""Counts which experts came after a pair of experts, for a bounded number of pairs.

Pairs are plain numbers here; what they stand for is transition_pairs.py's. E: experts, N: pairs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moe_infinity.tracing.state_tensors import Dims

_MOST_USES = 30_000  # then a pair's counts are halved: they are 16 bits wide


class PairTable:
    """A row per pair, memory touched only as it fills; a full one drops the rarer half."""

    def __init__(self, num_experts: int, max_pairs: int) -> None:
        self._rows: dict[int, int] = {}  # by pair; in the order of rows
        self._counts = np.zeros((max_pairs, num_experts), dtype=np.uint16)
        self._uses = np.zeros(max_pairs, dtype=np.uint16)

    def __len__(self) -> int:
        return len(self._rows)

    def learn(self, pairs: list[int], experts: NDArray[np.int64]) -> None:
        """Distinct ``pairs`` were followed by distinct ``experts``."""
        if len(self._rows) + len(pairs) > len(self._uses):
            self._drop_rare()
        found = [self._rows.setdefault(pair, len(self._rows)) for pair in pairs]
        rows = np.array(found, dtype=np.int64)
        self._counts[rows[:, None], experts] += 1
        self._uses[rows] += 1
        full = rows[self._uses[rows] >= _MOST_USES]
        self._counts[full] //= 2
        self._uses[full] //= 2

    def look_up(self, pairs: list[int]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """[N] uses of each pair, 0 where it is unknown, and [N, E] uses of what came after."""
        rows = np.array([self._rows.get(pair, -1) for pair in pairs], dtype=np.int64)
        uses = np.where(rows >= 0, self._uses[rows], 0).astype(np.float64)
        return uses, np.where(rows[:, None] >= 0, self._counts[rows], 0).astype(np.float64)

    def arrays(self) -> dict[str, NDArray[Any]]:
        pairs = np.array(list(self._rows), dtype=np.int64)
        size = len(pairs)
        return {"pairs": pairs, "counts": self._counts[:size], "pair_uses": self._uses[:size]}

    def dims(self) -> dict[str, Dims]:
        """Of ``arrays``, for ``load_state``."""
        return {"pairs": ("n",), "counts": ("n", self._counts.shape[1]), "pair_uses": ("n",)}

    def restore(self, arrays: Mapping[str, NDArray[Any]]) -> None:
        pairs = arrays["pairs"][: len(self._uses)].tolist()
        self._rows = {pair: row for row, pair in enumerate(pairs)}
        self._counts[: len(pairs)] = arrays["counts"][: len(pairs)]
        self._uses[: len(pairs)] = arrays["pair_uses"][: len(pairs)]

    def _drop_rare(self) -> None:
        pairs = list(self._rows)
        by_use = np.argsort(-self._uses[: len(pairs)].astype(np.int64), kind="stable")
        kept = by_use[: len(self._uses) // 2]
        self._rows = {pairs[old]: new for new, old in enumerate(kept.tolist())}
        for array in (self._counts, self._uses):
            array[: len(kept)] = array[kept]
            array[len(kept) :] = 0
