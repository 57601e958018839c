"""The offline optimum on a recorded routing: the misses no cache of this size can avoid.

Belady's rule (L. A. Belady, 1966), event by event: an event is looked up whole, then its misses
are admitted, and the residents needed again last make room. Equal sizes. Forced admission: an event
that fits is resident whole when it is over; of a larger one, what is needed soonest stays. With
bypass a missed expert need not stay: it was computed from a place that counts as no slot.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from moe_infinity.tracing.trace import Trace

_NEVER = 2**62


def accesses_of(trace: Trace) -> list[tuple[int, NDArray[np.int64]]]:
    """(layer, distinct experts) of every event of a trace, in order."""
    return [(event.layer, event.experts) for each in trace.passes() for event in each.events]


def optimal_misses(
    events: Sequence[tuple[int, NDArray[np.int64]]],
    num_slots: int,
    num_experts: int,
    initial: Iterable[int] = (),
    bypass: bool = False,
) -> list[int]:
    """Misses of every event. events: (layer, distinct experts), in order.

    initial: flat keys (layer * num_experts + expert) resident at the start.
    """
    keys = [layer * num_experts + experts for layer, experts in events]
    next_use, first_use = _next_uses(keys)
    # key -> index of the event that needs it next
    resident = {key: first_use.get(key, _NEVER) for key in initial}
    heap = [(-when, key) for key, when in resident.items()]  # stale where resident differs
    heapq.heapify(heap)
    misses = []
    for members, needed in zip(keys, next_use, strict=True):
        wanted = members.tolist()
        misses.append(sum(key not in resident for key in wanted))
        for key, when in zip(wanted, needed, strict=True):
            resident[key] = when
            heapq.heappush(heap, (-when, key))
        staying = set(wanted) if len(wanted) <= num_slots and not bypass else set()
        _make_room(resident, heap, num_slots, staying)
    return misses


def _make_room(
    resident: dict[int, int], heap: list[tuple[int, int]], limit: int, staying: set[int]
) -> None:
    """Evict the keys needed last, ``staying`` aside, until at most ``limit`` are left."""
    spared = []
    while len(resident) > limit:
        when, key = heapq.heappop(heap)
        if resident.get(key) != -when:
            continue
        if key in staying:
            spared.append((when, key))
            continue
        del resident[key]
    for entry in spared:
        heapq.heappush(heap, entry)


def _next_uses(keys: list[NDArray[np.int64]]) -> tuple[list[list[int]], dict[int, int]]:
    """For every member of every event the event that needs it next; and each key's first."""
    coming: dict[int, int] = {}
    backwards: list[list[int]] = []
    for index in range(len(keys) - 1, -1, -1):
        members = keys[index].tolist()
        backwards.append([coming.get(key, _NEVER) for key in members])
        coming.update(dict.fromkeys(members, index))
    return backwards[::-1], coming
