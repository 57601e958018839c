"""Slots in device memory, with a few to spare: a load need not wait until its victim has left."""

from __future__ import annotations

from collections import deque

import torch

from moe_infinity.devices.base import Device, Mark

_ALIGNMENT = 256  # bytes; what device memory is read in, and more than any vector


class _Room:
    """Memory of one slot, and the marks after which it may be written to."""

    __slots__ = ("memory", "ready")

    def __init__(self, memory: torch.Tensor) -> None:
        self.memory = memory
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
        self._class_of: list[int] = []
        self._rooms: list[_Room] = []
        self._spare: list[deque[_Room]] = []
        self.num_bytes = 0
        for number, (count, size) in enumerate(zip(slots_per_class, slot_bytes, strict=True)):
            size = -(-size // _ALIGNMENT) * _ALIGNMENT
            whole = device.allocate((count + num_spare) * size)
            self.num_bytes += whole.numel()
            rooms = [_Room(each) for each in torch.split(whole, size)]
            self._rooms += rooms[:count]
            self._spare.append(deque(rooms[count:]))
            self._class_of += [number] * count

    def memory(self, slot: int) -> torch.Tensor:
        """[slot_bytes] uint8 of what the slot holds."""
        return self._rooms[slot].memory

    def renew(self, slot: int, left: list[Mark]) -> list[Mark]:
        """Give the slot other memory for what is loaded now. left: after which what it held is
        needed no more. Returns the marks after which the new memory may be written to."""
        spare = self._spare[self._class_of[slot]]
        old = self._rooms[slot]
        old.ready = left
        spare.append(old)
        new = self._rooms[slot] = spare.popleft()
        return new.ready

    def close(self) -> None:
        self._rooms.clear()
        self._spare.clear()
