"""Keeps the distinct experts of each event of a request, for the offline optimum and traces."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from moe_infinity.tracing.event import Event
from moe_infinity.types import Phase

# Each costs about 1 KB while the offline optimum is found. Beyond this the report says less: the
# memory budget is hard.
_MAX_EVENTS = 20_000


@dataclass(frozen=True, slots=True)
class Access:
    """One event, reduced to what a cache sees of it."""

    phase: Phase
    layer: int
    experts: NDArray[np.int64]  # distinct, ascending


@dataclass(slots=True)
class Recorder:
    """Records accesses until it is full; then the record is incomplete and says so."""

    max_events: int = _MAX_EVENTS
    accesses: list[Access] = field(default_factory=list)
    is_complete: bool = True

    def record(self, event: Event) -> None:
        if len(self.accesses) >= self.max_events:
            self.is_complete = False
            return
        access = Access(event.phase, event.layer, event.experts)
        self.accesses.append(access)

    def clear(self) -> None:
        self.accesses.clear()
        self.is_complete = True
