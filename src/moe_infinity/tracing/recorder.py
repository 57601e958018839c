"""Keeps the distinct experts of each event of a request, for the offline optimum and traces."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from moe_infinity.tracing.event import Event
from moe_infinity.types import Phase

# Each costs about 1 KB while the offline optimum is found. Beyond this the report says less: the
# memory budget is hard.
_MAX_EVENTS = 20_000
_MAX_RECENT = 4096  # of all requests: seconds of decode, for those who watch


class Access(NamedTuple):
    """One event, reduced to what a cache sees of it."""

    phase: Phase
    layer: int
    experts: NDArray[np.int64]  # distinct, ascending


@dataclass(slots=True)
class Recorder:
    """Records accesses until it is full; then the record is incomplete and says so.

    recent: the last ones, of whatever request; num_recorded: how many there ever were.
    """

    max_events: int = _MAX_EVENTS
    accesses: list[Access] = field(default_factory=list)
    is_complete: bool = True
    recent: deque[Access] = field(default_factory=lambda: deque(maxlen=_MAX_RECENT))
    num_recorded: int = 0

    def record(self, event: Event) -> None:
        access = Access(event.phase, event.layer, event.experts)
        self.recent.append(access)
        self.num_recorded += 1
        if len(self.accesses) >= self.max_events:
            self.is_complete = False
            return
        self.accesses.append(access)

    def since(self, num_seen: int) -> tuple[list[Access], int]:
        """What was recorded after the first ``num_seen``, as far as it is kept, and how many there
        are by now. From any thread."""
        num_recorded, kept = self.num_recorded, list(self.recent)
        return kept[max(0, len(kept) - max(0, num_recorded - num_seen)) :], num_recorded

    def clear(self) -> None:
        self.accesses.clear()
        self.is_complete = True
