"""Frequency over age: uses divided by the events since the last one."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from moe_infinity.policies.base import CachePolicy
from moe_infinity.tracing.event import Event
from moe_infinity.types import ExpertShape


class Policy(CachePolicy):
    """Least frequently-recently used: uses / (events since last use + 1)."""

    def __init__(self, shape: ExpertShape, num_slots: int, seed: int = 0) -> None:
        super().__init__(shape, num_slots, seed)
        self._uses = np.zeros(self.grid)
        self._last_use = np.zeros(self.grid)
        self._clock = 0

    def on_event(self, event: Event) -> None:
        self._clock += 1
        self._uses[event.layer, event.experts] += 1
        self._last_use[event.layer, event.experts] = self._clock

    def keep_scores(self, layer: int) -> NDArray[np.float64]:
        return self._uses / (self._clock - self._last_use + 1)

    def state_arrays(self) -> dict[str, NDArray[np.float64]]:
        clock = np.array([float(self._clock)])
        return {"uses": self._uses, "last_use": self._last_use, "clock": clock}

    def take_state(self, arrays: Mapping[str, NDArray[np.float64]]) -> None:
        self._uses[:], self._last_use[:] = arrays["uses"], arrays["last_use"]
        self._clock = int(arrays["clock"][0])
