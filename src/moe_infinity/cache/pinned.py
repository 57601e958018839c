"""Slots in RAM that a device copies from at full speed: pinned, as far as the system lets us."""

from __future__ import annotations

import torch

from moe_infinity.cache.slots import SlotArena
from moe_infinity.config import format_bytes
from moe_infinity.devices.base import Device

# Pinning costs per call and per page; a copy may not reach over two regions, so these are whole
# slots.
_REGION_BYTES = 256 * 1024**2


class PinnedArena(SlotArena):
    """Pins a region of slots when the first of them is used.

    Under WSL2 half of RAM can be pinned at most, elsewhere a limit of the user's may stand in the
    way: what is refused stays pageable, and ``fault`` says so.
    """

    def __init__(
        self, slots_per_class: tuple[int, ...], slot_bytes: tuple[int, ...], device: Device
    ) -> None:
        super().__init__(slots_per_class, slot_bytes)
        self._device = device
        self._region_of, self._regions = self._divide()
        self._pinned: list[torch.Tensor] = []
        self._tried: set[int] = set()
        self.fault: str | None = None

    def buffer(self, slot: int) -> memoryview:
        self._pin(self._region_of[slot])
        return super().buffer(slot)

    def close(self) -> None:
        for region in self._pinned:
            self._device.unpin(region)
        self._pinned.clear()
        self._regions.clear()
        super().close()

    def _pin(self, number: int) -> None:
        if number in self._tried or self.fault is not None:
            return
        self._tried.add(number)
        region = self._regions[number]
        if self._device.pin(region):
            self._pinned.append(region)
            return
        done = format_bytes(sum(each.numel() for each in self._pinned))
        self.fault = (
            f"pinned memory: the system gave {done} and refused {format_bytes(region.numel())} "
            f"more; what is copied to the device from other memory takes longer"
        )

    def _divide(self) -> tuple[list[int], list[torch.Tensor]]:
        """Regions, and which one each slot is in."""
        numbers: list[int] = []
        bounds: list[list[int]] = []
        for start, size in self.places():
            if not bounds or start + size - bounds[-1][0] > _REGION_BYTES:
                bounds.append([start, start])
            bounds[-1][1] = start + size
            numbers.append(len(bounds) - 1)
        return numbers, [self.whole[start:end] for start, end in bounds]
