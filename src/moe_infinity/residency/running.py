"""What an event found, what it began, and what it still waits for."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from moe_infinity.tracing.event import Event
from moe_infinity.types import ExpertKey


@dataclass(frozen=True, slots=True)
class Load:
    """A load that has begun: its slot is taken, the bytes have yet to arrive."""

    key: ExpertKey
    slot: int
    victim: ExpertKey | None
    proactive: bool = False


@dataclass(slots=True)
class Lookup:
    """How an event's members were found, before anything was evicted for it."""

    hits: list[ExpertKey]
    late: list[ExpertKey]  # joined: their loads were in flight already
    misses: list[ExpertKey]
    disproved: list[ExpertKey]  # in flight ahead of this layer, but not routed to: cancel them


@dataclass(slots=True)
class Running:
    """The event being served."""

    event: Event
    streaming: bool
    waiting: deque[ExpertKey]  # misses that have no slot yet, ascending
    keepers: set[ExpertKey] = field(default_factory=set)
    wave: list[ExpertKey] = field(default_factory=list)  # pinned
    uncomputed: int = 0  # members of the wave still to compute
    wave_begun: bool = False
