"""First in, first out: evicts what was loaded longest ago. The trivial member of the family."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from moe_infinity.policies.base import CachePolicy
from moe_infinity.tracing.event import Event
from moe_infinity.types import ExpertKey, ExpertShape


class Policy(CachePolicy):
    """First in, first out."""

    def __init__(self, shape: ExpertShape, num_slots: int, seed: int = 0) -> None:
        super().__init__(shape, num_slots, seed)
        self._inserted = np.zeros(self.grid)
        self._clock = 0

    def on_event(self, event: Event) -> None:
        pass

    def on_insert(self, key: ExpertKey) -> None:
        self._clock += 1
        self._inserted[key] = self._clock

    def keep_scores(self, layer: int) -> NDArray[np.float64]:
        return self._inserted
