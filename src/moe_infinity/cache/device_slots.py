"""Slots in device memory, with a few to spare: a load need not wait until its victim has left."""

from __future__ import annotations

from collections import deque

import torch

from moe_infinity.devices.base import Device, Mark

_ALIGNMENT = 256  # bytes; what device memory is read in, and more than any vector
_SEGMENTS = 8  # in which a size class's memory is had, and given back


class _Room:
    """Memory of one slot in one of its class's segments, and the marks after which it may be
    written to."""

    __slots__ = ("memory", "ready", "segment")

    def __init__(self, memory: torch.Tensor, segment: int) -> None:
        self.memory = memory
        self.segment = segment
        self.ready: list[Mark] = []


class DeviceSlots:
    """Memory for slots that are numbered through size classes, as a Directory numbers them.

    Which memory a slot has changes with what is loaded into it: the victim's is copied back or
    read on, and becomes a spare when that is over.
    """

    def __init__(
        self,
        device: Device,
        slots_per_class: tuple[int, ...],
        slot_bytes: tuple[int, ...],
        num_spare: int,
    ) -> None:
        """num_spare: for each class. Raises BudgetError if the device has no room."""
        self.slots_per_class = slots_per_class
        self._class_of: list[int] = []
        self._rooms: list[_Room | None] = []  # by slot; None: given back
        self._spare: list[deque[_Room]] = []
        self._num_segments = 0
        for number, (count, size) in enumerate(zip(slots_per_class, slot_bytes, strict=True)):
            rooms = self._allocate(device, count + num_spare, size)
            self._rooms += rooms[:count]
            self._spare.append(deque(rooms[count:]))
            self._class_of += [number] * count

    def _allocate(self, device: Device, count: int, slot_bytes: int) -> list[_Room]:
        size = -(-slot_bytes // _ALIGNMENT) * _ALIGNMENT
        rooms: list[_Room] = []
        most = max(1, -(-count // _SEGMENTS))
        for first in range(0, count, most):
            here = min(count - first, most)
            whole = device.allocate(here * size)
            rooms += [_Room(each, self._num_segments) for each in torch.split(whole, size)]
            self._num_segments += 1
        return rooms

    def give_back(self) -> set[int]:
        """Let go of one segment's memory; nothing may be computed from it or copied to it. Returns
        the slots that have none any more. Of a class one segment stays; empty: no more can go."""
        for segment in reversed(range(self._num_segments)):
            mine = {s for s, room in enumerate(self._rooms) if room and room.segment == segment}
            classes = {self._class_of[slot] for slot in mine}
            if classes and self._has_others(classes.pop(), segment):
                break
        else:
            return set()
        for slot in mine:
            self._rooms[slot] = None
        for spare in self._spare:
            for room in [each for each in spare if each.segment == segment]:
                spare.remove(room)
                mine |= self._take_for(spare)
        return mine

    def _has_others(self, size_class: int, segment: int) -> bool:
        pairs = zip(self._rooms, self._class_of, strict=True)
        return any(r and r.segment != segment for r, number in pairs if number == size_class)

    def _take_for(self, spare: deque[_Room]) -> set[int]:
        """A slot's memory becomes a spare: there have to be as many as before."""
        size_class = next(number for number, each in enumerate(self._spare) if each is spare)
        for slot in reversed(range(len(self._rooms))):
            room = self._rooms[slot]
            if room is not None and self._class_of[slot] == size_class:
                spare.append(room)
                self._rooms[slot] = None
                return {slot}
        return set()

    def memory(self, slot: int) -> torch.Tensor:
        """[slot_bytes] uint8 of what the slot holds."""
        room = self._rooms[slot]
        assert room is not None, f"slot {slot} has no memory any more"
        return room.memory

    def renew(self, slot: int, left: list[Mark]) -> list[Mark]:
        """Give the slot other memory for what is loaded now. left: after which what it held is
        needed no more. Returns the marks after which the new memory may be written to."""
        spare = self._spare[self._class_of[slot]]
        old = self._rooms[slot]
        assert old is not None, f"slot {slot} has no memory any more"
        old.ready = left
        spare.append(old)
        new = self._rooms[slot] = spare.popleft()
        return list(new.ready)

    def close(self) -> None:
        self._rooms.clear()
        self._spare.clear()
