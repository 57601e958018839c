"""The offline optimum on a recorded routing: the misses no cache of this size can avoid.

Belady's rule (L. A. Belady, 1966), event by event: an event is looked up whole, then its misses
are admitted, and the residents needed again last make room. Forced admission, equal sizes.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

_NEVER = 2**62


def optimal_misses(
    events: Sequence[tuple[int, NDArray[np.int16]]],
    num_slots: int,
    num_experts: int,
    initial: Iterable[int] = (),
) -> list[int]:
    """Misses of every event. events: (layer, distinct experts), in order.

    initial: flat keys (layer * num_experts + expert) resident at the start. Of an event larger than the cache, what does not fit is missed and passes through.
    """
    keys = [layer * num_experts + experts.astype(np.int64) for layer, experts in events]
    next_use, first_use = _next_uses(keys)
    # key -> index of the event that needs it next
    resident = {key: first_use.get(key, _NEVER) for key in initial}
    heap = [(-when, key) for key, when in resident.items()]  # stale where resident differs
    heapq.heapify(heap)
    misses = []
    for members, needed in zip(keys, next_use, strict=True):
        wanted = members.tolist()
        missing = [key for key in wanted if key not in resident]
        misses.append(len(missing))
        _make_room(resident, heap, num_slots - len(missing), set(wanted))
        for key, when in zip(wanted, needed, strict=True):
            if key in resident or len(resident) < num_slots:
                resident[key] = when
                heapq.heappush(heap, (-when, key))
    return misses


def _make_room(
    resident: dict[int, int], heap: list[tuple[int, int]], limit: int, members: set[int]
) -> None:
    """Evict non-members needed last until at most ``limit`` keys are left."""
    spared = []
    while len(resident) > max(limit, 0) and heap:
        when, key = heapq.heappop(heap)
        if resident.get(key) != -when:
            continue
        if key in members:
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
