"""EdgeMoE's predictor: which experts follow a pair of experts in the two layers before.

EdgeMoE (arXiv 2308.14352): a table of P(expert at layer n | experts at n-1 and n-2); pairs seen
too rarely leave the word to the layer before alone (transition.py).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from moe_infinity.predictors import transition
from moe_infinity.predictors._pair_table import PairTable
from moe_infinity.predictors.base import Memory
from moe_infinity.tracing.event import Event
from moe_infinity.tracing.state_tensors import load_state, save_state
from moe_infinity.types import ExpertShape

MIN_COUNT = 3  # uses of a pair before its followers count
MAX_PAIRS = 65_536  # 16 MB at 128 experts
_SMOOTHING = 4.0  # uses of a pair before they outweigh order 1
_MOST_TOKENS = 4  # of a batch: beyond, order 1 alone speaks
_FORM = "transition_pairs"


class Predictor(transition.Predictor):
    """Order 2, backing off to order 1. Only the next layer is predicted."""

    memory = Memory(per_pair=4, other=3 * 128 * MAX_PAIRS)

    def __init__(self, shape: ExpertShape, seed: int = 0, max_pairs: int = MAX_PAIRS) -> None:
        super().__init__(shape, seed)
        self._table = PairTable(shape.num_experts, max_pairs)
        self._most = _MOST_TOKENS * shape.top_k  # experts used in a layer, or pairs get too many
        self._before: NDArray[np.int64] | None = None  # experts of the layer before the last

    def begin_request(self) -> None:
        super().begin_request()
        self._before = None

    def observe(self, event: Event) -> None:
        last = self._last
        super().observe(event)
        follows = last is not None and (last[0] + 1) % self.grid[0] == event.layer
        if last is None or not follows or self._last is None or len(last[1]) > self._most:
            self._before = None
            return
        if self._before is not None:
            self._table.learn(self._pairs(*last, self._before), event.experts)
        self._before = last[1]

    def save(self, path: Path) -> None:
        arrays = {"follow": self._follow, "uses": self._uses, "total": self._total}
        arrays |= self._table.arrays()
        save_state(path, _FORM, arrays, self.shape, self.fingerprint)

    def load(self, path: Path) -> None:
        expected = self._dims() | self._table.dims()
        arrays = load_state(path, _FORM, self.shape, self.fingerprint, expected)
        self._follow, self._uses, self._total = (arrays[n] for n in ("follow", "uses", "total"))
        self._table.restore(arrays)

    def _combine(  # type: ignore[override]  # a function there, it needs the state here
        self, chances: NDArray[np.float64]
    ) -> NDArray[np.float64]:
        """[K, E] order 1 by each expert used last -> [E], sharpened by each pair seen enough."""
        if self._last is None or self._before is None:
            return super()._combine(chances)
        pairs = self._pairs(*self._last, self._before)
        uses, counts = self._table.look_up(pairs)  # [K*K], [K*K, E]
        order_1 = np.repeat(chances, len(self._before), axis=0)
        order_2 = (counts + _SMOOTHING * order_1) / (uses[:, None] + _SMOOTHING)
        sharpened = np.where(uses[:, None] >= MIN_COUNT, order_2, order_1)
        combined: NDArray[np.float64] = sharpened.mean(axis=0)
        return combined

    def _pairs(
        self, layer: int, experts: NDArray[np.int64], before: NDArray[np.int64]
    ) -> list[int]:
        keys = (layer * self.grid[1] + experts[:, None]) * self.grid[1] + before
        pairs: list[int] = keys.ravel().tolist()
        return pairs
