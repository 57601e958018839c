"""Who is where: the state, slot and pins of every expert. Knows nothing of policies or bytes.

One owner: the thread that computes. Others may read its arrays, for display only.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

from moe_infinity.types import ExpertKey, ExpertShape

NO_SLOT = -1


class State(IntEnum):
    ABSENT = 0
    IN_FLIGHT = 1
    RESIDENT = 2


_STATES = tuple(State)  # by number: asked for several times per expert and event
# numpy takes ten times as long to compare with an enum.
_ABSENT, _IN_FLIGHT, _RESIDENT = map(int, State)


class Directory:
    """Slots of one tier, in size classes; every class serves the layers assigned to it.

    A load is two-phase: ``begin_load`` (slot taken, in flight) then ``complete`` or ``fail``.
    Only resident, unpinned keys can be evicted. Arrays are over flat keys, layer * E + expert.
    """

    def __init__(
        self, shape: ExpertShape, slots_per_class: tuple[int, ...], class_of_layer: tuple[int, ...]
    ) -> None:
        num_keys = shape.num_layers * shape.num_experts
        self.shape = shape
        self.slots_per_class = slots_per_class
        self.class_of_layer = class_of_layer
        self.states: NDArray[np.int8] = np.zeros(num_keys, dtype=np.int8)
        self.slots: NDArray[np.int32] = np.full(num_keys, NO_SLOT, dtype=np.int32)
        self.pins: NDArray[np.int16] = np.zeros(num_keys, dtype=np.int16)
        self._class_of_key = np.repeat(np.array(class_of_layer, dtype=np.int16), shape.num_experts)
        self._free: list[list[int]] = []
        self._retired: list[set[int]] = [set() for _ in slots_per_class]
        self._rebuild_free()

    @property
    def num_slots(self) -> int:
        """Of which some may be retired."""
        return sum(self.slots_per_class)

    @property
    def num_usable(self) -> int:
        return sum(self.usable_per_class)

    @property
    def usable_per_class(self) -> list[int]:
        pairs = zip(self.slots_per_class, self._retired, strict=True)
        return [slots - len(retired) for slots, retired in pairs]

    def retire(self, slots: Iterable[int]) -> None:
        """Take free slots out of use: their memory is gone."""
        wanted = set(slots)
        for free, retired in zip(self._free, self._retired, strict=True):
            mine = wanted.intersection(free)
            retired |= mine
            wanted -= mine
        assert not wanted, f"slots {sorted(wanted)} are not free"
        self._rebuild_free()

    def flat(self, key: ExpertKey) -> int:
        return key.layer * self.shape.num_experts + key.expert

    def flats(self, layer: int, experts: NDArray[np.int64]) -> NDArray[np.int64]:
        flats: NDArray[np.int64] = layer * self.shape.num_experts + experts
        return flats

    def key(self, flat: int) -> ExpertKey:
        return ExpertKey(*divmod(int(flat), self.shape.num_experts))

    def state(self, key: ExpertKey) -> State:
        state: State = _STATES[self.states[self.flat(key)]]
        return state

    def by_state(
        self, keys: list[ExpertKey], flat_keys: NDArray[np.int64]
    ) -> tuple[list[ExpertKey], list[ExpertKey], list[ExpertKey]]:
        """Those that are absent, in flight and resident; flat_keys: the same keys."""
        found: tuple[list[ExpertKey], ...] = ([], [], [])
        for key, number in zip(keys, self.states[flat_keys].tolist(), strict=True):
            found[number].append(key)
        return found[_ABSENT], found[_IN_FLIGHT], found[_RESIDENT]

    def are_resident(self, flat_keys: NDArray[np.int64]) -> bool:
        return bool((self.states[flat_keys] == _RESIDENT).all())

    def slot(self, key: ExpertKey) -> int:
        return int(self.slots[self.flat(key)])

    def class_of(self, key: ExpertKey) -> int:
        return self.class_of_layer[key.layer]

    def is_pinned(self, key: ExpertKey) -> bool:
        return bool(self.pins[self.flat(key)])

    def num_free(self, size_class: int) -> int:
        return len(self._free[size_class])

    def evictable(self, size_class: int) -> NDArray[np.int64]:
        """Flat keys, ascending, that are resident and unpinned in this size class."""
        loose = (self.states == _RESIDENT) & (self.pins == 0)
        if len(self.slots_per_class) > 1:
            loose &= self._class_of_key == size_class
        return np.flatnonzero(loose)

    def begin_load(self, key: ExpertKey) -> int:
        """Take the lowest free slot of the key's class; the key is in flight. Returns the slot."""
        flat = self.flat(key)
        assert self.states[flat] == _ABSENT, f"{key} is {self.state(key).name}, not absent"
        slot = heapq.heappop(self._free[self.class_of(key)])
        self.states[flat] = _IN_FLIGHT
        self.slots[flat] = slot
        return slot

    def complete(self, key: ExpertKey) -> None:
        """The bytes have arrived: in flight becomes resident."""
        flat = self.flat(key)
        assert self.states[flat] == _IN_FLIGHT, f"{key} is {self.state(key).name}"
        self.states[flat] = _RESIDENT

    def fail(self, key: ExpertKey) -> None:
        """The load failed or was cancelled: its slot is free again, its pins are gone."""
        flat = self.flat(key)
        assert self.states[flat] == _IN_FLIGHT, f"{key} is {self.state(key).name}"
        self.pins[flat] = 0
        self._vacate(key)

    def evict(self, key: ExpertKey) -> None:
        """Free the slot of a resident, unpinned key."""
        flat = self.flat(key)
        assert self.states[flat] == _RESIDENT, f"{key} is {self.state(key).name}"
        assert self.pins[flat] == 0, f"{key} is pinned {self.pins[flat]} times"
        self._vacate(key)

    def pin(self, key: ExpertKey) -> None:
        self.pins[self.flat(key)] += 1

    def unpin(self, key: ExpertKey) -> None:
        flat = self.flat(key)
        assert self.pins[flat] > 0, f"{key} is not pinned"
        self.pins[flat] -= 1

    @contextmanager
    def pinned(self, keys: Sequence[ExpertKey]) -> Iterator[None]:
        """Residents that nobody evicts before the end of the block."""
        for key in keys:
            self.pin(key)
        try:
            yield
        finally:
            for key in keys:
                self.unpin(key)

    def abandon(self) -> list[ExpertKey]:
        """Forget every load and every pin; what is resident stays. Returns the keys that were in
        flight. Puts right whatever an exception left half done, so it trusts only ``states``."""
        lost = self.keys_in(State.IN_FLIGHT)
        gone = self.states != _RESIDENT
        self.states[gone] = _ABSENT
        self.slots[gone] = NO_SLOT
        self.pins[:] = 0
        self._rebuild_free()
        return lost

    def take_slots(self, slots: NDArray[np.int32]) -> None:
        """Go on from who is where in another's ``slots``; nothing is in flight or pinned."""
        assert not (self.states == _IN_FLIGHT).any(), "a load is in flight"
        assert not self.pins.any(), "an expert is pinned"
        self.slots[:] = slots
        self.states[:] = np.where(slots == NO_SLOT, _ABSENT, _RESIDENT)
        self._rebuild_free()

    def keys_in(self, state: State) -> list[ExpertKey]:
        return [self.key(int(flat)) for flat in np.flatnonzero(self.states == int(state))]

    def check_integrity(self) -> None:
        """Prove that every slot is free or holds exactly one key; raises AssertionError."""
        for size_class, total in enumerate(self.slots_per_class):
            mine = self._class_of_key == size_class
            in_flight = int(((self.states == _IN_FLIGHT) & mine).sum())
            resident = int(((self.states == _RESIDENT) & mine).sum())
            free, retired = len(self._free[size_class]), len(self._retired[size_class])
            assert free + in_flight + resident + retired == total, (
                f"class {size_class}: free({free}) + in_flight({in_flight}) + "
                f"resident({resident}) + retired({retired}) != slots({total})"
            )
        held = self.slots[self.states != _ABSENT].tolist()
        idle = [slot for slots in (*self._free, *self._retired) for slot in slots]
        everyone = sorted(held + idle)
        assert everyone == list(range(self.num_slots)), "a slot is lost or held twice"
        absent = self.states == _ABSENT
        assert (self.slots[absent] == NO_SLOT).all(), "an absent expert has a slot"
        assert (self.pins[absent] == 0).all(), "an absent expert is pinned"
        assert (self.pins >= 0).all(), "an expert has a negative pin count"

    def _rebuild_free(self) -> None:
        held = set(self.slots[self.states != _ABSENT].tolist())
        starts = [0, *itertools.accumulate(self.slots_per_class)]
        self._free = [
            [slot for slot in range(start, end) if slot not in held | retired]
            for (start, end), retired in zip(itertools.pairwise(starts), self._retired, strict=True)
        ]

    def _vacate(self, key: ExpertKey) -> None:
        flat = self.flat(key)
        heapq.heappush(self._free[self.class_of(key)], int(self.slots[flat]))
        self.states[flat] = _ABSENT
        self.slots[flat] = NO_SLOT
