"""The memory of a tier's slots: one page-aligned arena, equal slots within a size class."""

from __future__ import annotations

import torch

from moe_infinity.checkpoint.direct_io import align_up, allocate


class SlotArena:
    """Page-aligned slots, numbered through all size classes.

    Pages are touched, and so cost memory, only when something is first loaded into them.
    """

    def __init__(self, slots_per_class: tuple[int, ...], slot_bytes: tuple[int, ...]) -> None:
        self._places: list[tuple[int, int]] = []
        offset = 0
        for count, size in zip(slots_per_class, slot_bytes, strict=True):
            size = align_up(size)
            self._places += [(offset + i * size, size) for i in range(count)]
            offset += count * size
        self.num_bytes = offset
        memory = allocate(offset)
        self._view = memoryview(memory)
        whole = torch.frombuffer(memory, dtype=torch.uint8)
        self._tensors = [whole[start : start + size] for start, size in self._places]

    def close(self) -> None:
        """Let go of the memory; it is freed when the last view of a slot is. Idempotent."""
        self._tensors.clear()
        self._view = memoryview(b"")

    def buffer(self, slot: int) -> memoryview:
        """Writable bytes of one slot."""
        start, size = self._places[slot]
        return self._view[start : start + size]

    def tensor(self, slot: int) -> torch.Tensor:
        """The same bytes as a tensor, [slot_bytes] uint8."""
        return self._tensors[slot]
