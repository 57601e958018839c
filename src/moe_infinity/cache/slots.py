"""The memory of a tier's slots: one page-aligned arena, equal slots within a size class."""

from __future__ import annotations

import itertools
from typing import NamedTuple

import torch

from moe_infinity.cache.touching import Toucher
from moe_infinity.checkpoint.direct_io import align_up, allocate


class _Place(NamedTuple):
    """Of a slot: its first byte in the arena, its size, its class, and where the class begins."""

    start: int
    size: int
    size_class: int
    class_start: int


class SlotArena:
    """Page-aligned slots, numbered through all size classes, of which low ones are used first.
    whole: their memory, uint8.

    Pages are touched, and so cost memory, only when something is first loaded into them, or shortly
    before (``touch_ahead``).
    """

    def __init__(self, slots_per_class: tuple[int, ...], slot_bytes: tuple[int, ...]) -> None:
        self._places: list[_Place] = []
        starts = [0]
        for number, (count, size) in enumerate(zip(slots_per_class, slot_bytes, strict=True)):
            begin, size = starts[-1], align_up(size)
            self._places += [_Place(begin + i * size, size, number, begin) for i in range(count)]
            starts.append(begin + count * size)
        self.num_bytes = starts[-1]
        memory = allocate(self.num_bytes)
        self._view = memoryview(memory)
        self.whole = torch.frombuffer(memory, dtype=torch.uint8)
        self._tensors = [self.whole[each.start : each.start + each.size] for each in self._places]
        at = self.whole.data_ptr()
        regions = [(at + start, end - start) for start, end in itertools.pairwise(starts)]
        self._toucher = Toucher(memory, regions)

    def touch_ahead(self) -> None:
        """From now on make pages ready in a thread of its own, which ``close`` ends."""
        self._toucher.start()

    def keep_lead(self, num_bytes: int) -> None:
        """So far ahead of what is used from now on, of each class."""
        self._toucher.keep_lead(num_bytes)

    def untouched_bytes(self) -> int:
        """Of the arena, what costs no memory yet."""
        return self._toucher.untouched_bytes()

    def close(self) -> None:
        """Let go of the memory; it is freed when the last view of a slot is. Idempotent."""
        self._toucher.close()
        self._tensors.clear()
        self.whole = self.whole[:0].clone()
        self._view = memoryview(b"")

    def places(self) -> list[tuple[int, int]]:
        """Where each slot begins in ``whole``, and its bytes."""
        return [(each.start, each.size) for each in self._places]

    def buffer(self, slot: int) -> memoryview:
        """Writable bytes of one slot, for something that is loaded."""
        place = self._places[slot]
        end = place.start + place.size
        self._toucher.use(place.size_class, end - place.class_start)
        return self._view[place.start : end]

    def tensor(self, slot: int) -> torch.Tensor:
        """The same bytes as a tensor, [slot_bytes] uint8."""
        return self._tensors[slot]
