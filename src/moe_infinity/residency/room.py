"""Who makes room for a load: the streaming rings, and the order in which residents may go.

Chooses and remembers; begins and evicts nothing itself. Knows nothing of events.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from moe_infinity.policies.base import CachePolicy
from moe_infinity.residency.directory import Directory, State
from moe_infinity.types import ExpertKey

# Prefill streams through at most this many slots, and never through more than an eighth of them:
# a few reads in flight keep an SSD busy, the rest stays with what decode has warmed.
_MAX_RING_SLOTS = 16
_RING_SHARE = 8
_FEWEST_RING_SLOTS = 2  # below this nothing is loaded ahead: one is needed for what streams now
FEWEST_SLOTS = _RING_SHARE * _FEWEST_RING_SLOTS  # of a size class, for anything to be loaded ahead


class Room(NamedTuple):
    """Room for a load: the key to evict for it, None where a slot is free."""

    victim: ExpertKey | None


class RoomFinder:
    """Finds room in one Directory by the word of one CachePolicy.

    Every size class has a ring: the few slots through which experts are streamed, oldest first.
    ahead: keys loaded before their event, neither used nor disproved yet. A load ahead never
    evicts another one; a member of an event does when nothing else is left. The same holds for
    residents that ``protect`` named last.
    """

    def __init__(self, directory: Directory, policy: CachePolicy) -> None:
        self.ring_slots: list[int] = []  # by class, as is what follows
        self._holds_all: list[bool] = []
        self.ahead: dict[ExpertKey, int] = {}  # to the pass in which its layer is due
        self._directory = directory
        self._policy = policy
        self._rings: list[deque[ExpertKey]] = [deque() for _ in directory.slots_per_class]
        self._protected: NDArray[np.int64] = np.empty(0, dtype=np.int64)
        self.measure()

    def measure(self) -> None:
        """Ask the directory how many slots there are: some may have been retired."""
        usable = self._directory.usable_per_class
        num_experts = [0] * len(usable)
        for layer, size_class in enumerate(self._directory.class_of_layer):
            num_experts[size_class] += self._directory.shape.experts_per_layer[layer]
        self.ring_slots = [min(_MAX_RING_SLOTS, max(1, n // _RING_SHARE)) for n in usable]
        self._holds_all = [n >= wanted for n, wanted in zip(usable, num_experts, strict=True)]

    def protect(self, flat_keys: NDArray[np.int64]) -> None:
        """These, in place of those named before, are expected to be used shortly."""
        self._protected = flat_keys

    def spares_none(self, size_class: int) -> bool:
        """Whether the ring is too short, or as full as it may be, for another load ahead."""
        ring_slots = self.ring_slots[size_class]
        return ring_slots < _FEWEST_RING_SLOTS or len(self.ahead) >= ring_slots

    def in_ring(self, key: ExpertKey, spare_ahead: bool) -> Room | None:
        """Room for a streamed expert, which joins the ring: its oldest member's or, while the ring
        is short, a free slot or the policy's victim's. None: wait. Where there is a slot for every
        expert it stays."""
        size_class = self._directory.class_of(key)
        if self._holds_all[size_class]:
            return Room(None)
        ring = self._rings[size_class]
        if len(ring) >= self.ring_slots[size_class]:
            room = self._oldest(ring, spare_ahead)
        else:
            room = self.by_policy(key, key.layer, spare_ahead)
        if room is not None:
            if room.victim is not None:
                self.leave_ring([room.victim])
            ring.append(key)
        return room

    def by_policy(self, key: ExpertKey, layer: int, spare_ahead: bool) -> Room | None:
        """A free slot or one victim's, seen from ``layer``. None: there is none now."""
        size_class = self._directory.class_of(key)
        if self._directory.num_free(size_class):
            return Room(None)
        victims = self.victims(size_class, 1, layer, spare_ahead)
        return Room(victims[0]) if victims else None

    def victims(
        self, size_class: int, count: int, layer: int, spare_ahead: bool = False
    ) -> deque[ExpertKey]:
        """Up to ``count`` keys to evict: what only streamed through, then by the policy's word;
        what was loaded ahead and not yet used goes only when nothing else is left."""
        if count == 0:
            return deque()
        loose = self._directory.evictable(size_class)
        passing = self.passing(size_class)[:count]
        ahead = [k for k in sorted(self.ahead) if self._is_loose(k, size_class)]
        spoken_for = [self._directory.flat(k) for k in (*passing, *ahead)]
        others = loose[~self._marked(spoken_for)[loose]] if spoken_for else loose
        expected = self._marked(self._protected)[others] if len(self._protected) else None
        free = others if expected is None else others[~expected]
        ranked = passing + self._chosen(free, count - len(passing), layer)
        if not spare_ahead and len(ranked) < count:
            if expected is not None:
                ranked += self._chosen(others[expected], count - len(ranked), layer)
            ranked += ahead
        return deque(ranked[:count])

    def passing(self, size_class: int) -> list[ExpertKey]:
        """Residents that only streamed through and go first, oldest first."""
        return [key for key in self._rings[size_class] if self._is_passing(key)]

    def take_passing(self, size_class: int, keys: Iterable[ExpertKey]) -> None:
        """These, in place of those there were, only streamed through."""
        self._rings[size_class] = deque(keys)

    def leave_ring(self, keys: Iterable[ExpertKey]) -> None:
        """These are residents like others from now on."""
        if not any(self._rings):
            return
        for key in keys:
            ring = self._rings[self._directory.class_of(key)]
            if ring and key in ring:
                ring.remove(key)

    def forget(self, key: ExpertKey) -> None:
        """``key`` has lost its slot."""
        self.ahead.pop(key, None)
        self.leave_ring([key])

    def reset(self) -> None:
        """Nothing is loaded ahead or expected any more, and rings hold only what is resident."""
        self.ahead.clear()
        self._protected = self._protected[:0]
        state = self._directory.state
        self._rings = [
            deque(key for key in ring if state(key) is State.RESIDENT) for ring in self._rings
        ]

    def _marked(self, flat_keys: Sequence[int] | NDArray[np.int64]) -> NDArray[np.bool_]:
        """[L * E] whether a flat key is among these."""
        among = np.zeros(len(self._directory.states), dtype=bool)
        among[flat_keys] = True
        return among

    def _chosen(self, loose: NDArray[np.int64], count: int, layer: int) -> list[ExpertKey]:
        wanted = min(count, len(loose))
        chosen = self._policy.victims(loose, wanted, layer) if wanted > 0 else ()
        return [self._directory.key(int(flat)) for flat in chosen]

    def _oldest(self, ring: deque[ExpertKey], spare_ahead: bool) -> Room | None:
        """The ring's first member that nothing pins. One in flight is waited for: who goes next
        must not depend on which load is faster."""
        for key in ring:
            if self._directory.is_pinned(key) or (spare_ahead and key in self.ahead):
                continue
            return Room(key) if self._directory.state(key) is State.RESIDENT else None
        return None

    def _is_passing(self, key: ExpertKey) -> bool:
        return key not in self.ahead and self._is_loose(key, self._directory.class_of(key))

    def _is_loose(self, key: ExpertKey, size_class: int) -> bool:
        resident = self._directory.state(key) is State.RESIDENT
        in_class = self._directory.class_of(key) == size_class
        return resident and in_class and not self._directory.is_pinned(key)
