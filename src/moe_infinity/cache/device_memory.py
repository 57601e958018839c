"""The bytes of experts on a device: into slots, back to RAM, and who has to wait for whom.

Knows keys, slots and marks; who is loaded and evicted when is decided elsewhere.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch

from moe_infinity.cache.device_layout import DeviceLayout
from moe_infinity.cache.device_slots import DeviceSlots
from moe_infinity.cache.slot_views import SlotViews
from moe_infinity.cache.uploads import Uploads
from moe_infinity.devices.base import Device, Mark
from moe_infinity.kernels.base import Views
from moe_infinity.types import ExpertKey, Priority

HostBytes = tuple[torch.Tensor, Mark | None]  # of an expert's host slot, and what guards them


class DeviceMemory:
    """Slots and the two ways of copying. slot_of: of every expert that is here or coming.

    A load may get another slot than its victim had: each slot's memory remembers on its own what it
    has to wait for.
    """

    def __init__(
        self, layouts: Mapping[ExpertKey, DeviceLayout], slots: DeviceSlots, device: Device
    ) -> None:
        self.slots = slots
        self.device = device
        self.devices = (device,)
        self.lossy: tuple[str, ...] = ()
        self.uploads = Uploads(device)
        self.layouts = layouts
        self.slot_of: dict[ExpertKey, int] = {}
        self._compute = device.compute
        self._down = device.new_stream("down")
        self._free_after: dict[ExpertKey, list[Mark]] = {}  # of coming ones: of their memory
        self._leaving: dict[int, list[Mark]] = {}  # by slot: copies of what it held, back to RAM
        self._uploaded: dict[int, Mark] = {}  # by slot: when what was copied to it is there
        self._awaited: set[int] = set()  # slots for whose mark the computation waits already
        self._views = SlotViews({key: each.spec for key, each in layouts.items()})

    def reserve(self, slots: Mapping[ExpertKey, int]) -> None:
        """Memory for loads, in these slots; their victims are gone."""
        launched = self._compute.mark()
        for key, slot in slots.items():
            left = [launched, *self._leaving.pop(slot, ())]
            uploaded = self._uploaded.pop(slot, None)
            if uploaded is not None:
                left.append(uploaded)
            self._awaited.discard(slot)
            self.slot_of[key] = slot
            self._free_after[key] = self.slots.renew(slot, left)

    def is_reserved(self, key: ExpertKey) -> bool:
        """Whether it has memory, and no copy into it was asked for yet."""
        return key in self._free_after

    def upload(
        self, key: ExpertKey, host: HostBytes, priority: Priority, in_chunks: bool = True
    ) -> None:
        """Copy an expert into its reserved slot. in_chunks: see Uploads.begin."""
        source, guard = host
        after = self._free_after.pop(key)
        if guard is not None:
            after.append(guard)
        memory = self.slots.memory(self.slot_of[key])
        pieces = [
            (memory[there : there + num_bytes], source[start : start + num_bytes])
            for start, num_bytes, there in self.layouts[key].segments
        ]
        self.uploads.begin(key, pieces, priority, after, in_chunks)

    def arrived(self, key: ExpertKey, mark: Mark) -> None:
        """Its bytes are there when ``mark`` is reached."""
        self._uploaded[self.slot_of[key]] = mark

    def give_up(self, key: ExpertKey) -> None:
        """It will not come. Whoever gets the slot's memory next waits for what it would have."""
        slot = self.slot_of.pop(key)
        self._leaving.setdefault(slot, []).extend(self._free_after.pop(key, ()))

    def send_down(self, key: ExpertKey, host: HostBytes | None) -> Mark | None:
        """``key`` leaves its slot; its bytes go to host memory, if there is any for them. Returns
        the mark of that copy."""
        slot = self.slot_of.pop(key)
        if host is None:
            return None
        target, guard = host
        for mark in (guard, self._uploaded.get(slot)):
            if mark is not None:
                self._down.after(mark)
        memory = self.slots.memory(slot)
        for start, num_bytes, there in self.layouts[key].segments:
            self._down.copy(target[start : start + num_bytes], memory[there : there + num_bytes])
        copied = self._down.mark()
        self._leaving.setdefault(slot, []).append(copied)
        return copied

    def is_there(self, key: ExpertKey) -> bool:
        """Whether the computation need not wait for it."""
        slot = self.slot_of[key]
        mark = self._uploaded.get(slot)
        return mark is None or slot in self._awaited or mark.is_reached()

    def await_all(self, keys: Iterable[ExpertKey]) -> None:
        """Let the computation wait until these are there; the host goes on."""
        for slot in map(self.slot_of.__getitem__, keys):
            if slot not in self._awaited and slot in self._uploaded:
                self._compute.after(self._uploaded[slot])
                self._awaited.add(slot)

    def views_of(self, key: ExpertKey) -> Views:
        slot = self.slot_of[key]
        return self._views.of(key, slot, self.slots.memory(slot))

    def take_stall_s(self) -> float:
        """What the computation has waited since the last time."""
        return self.device.take_stall_s()

    def drain(self) -> None:
        """Copy no more of what is queued, and wait for what was begun."""
        self.uploads.drain()
        self._down.mark().wait()

    def hold(self, slots: dict[ExpertKey, int]) -> None:
        """These are here and nothing else; every copy is over, so nobody has to wait."""
        for pending in (self._free_after, self._leaving, self._uploaded, self._awaited):
            pending.clear()
        self.slot_of = slots

    def check_integrity(self, slots: Mapping[ExpertKey, int]) -> None:
        """Raise AssertionError unless every expert lies where ``slots`` says."""
        assert self.slot_of == slots, f"elsewhere: {self.slot_of.items() ^ slots.items()}"

    def close(self) -> None:
        self._views.clear()
        self.slots.close()

    def give_back(self, device: int = 0) -> set[int]:
        """Let some memory go, when nothing uses it. Returns the slots it was of. device: there is
        this one alone."""
        gone = self.slots.give_back()
        self._views.clear()  # also of slots that have other memory by now, and were not computed
        return gone
