"""Expert memory of several devices as one pool of slots: each copies over its own link.

Knows which device a slot and an expert lie on; who is loaded and evicted when is decided elsewhere,
over the slots of all.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

from moe_infinity.cache.device_memory import DeviceMemory, HostBytes
from moe_infinity.devices.base import Device, Mark
from moe_infinity.devices.choice import computing_on
from moe_infinity.kernels.base import Views
from moe_infinity.types import ExpertKey, Priority


class DevicePool:
    """What a DeviceMemory is to its hierarchy, over several. A Directory numbers the slots of all
    through its size classes; those of a class take turns, so that all links begin at once."""

    def __init__(self, memories: Sequence[DeviceMemory]) -> None:
        """memories: the model's own device first; each numbers its slots by itself."""
        self.memories = tuple(memories)
        self.devices: tuple[Device, ...] = tuple(each.device for each in memories)
        self._places = _in_turns([each.slots.slots_per_class for each in memories])
        self._lies_on: dict[ExpertKey, DeviceMemory] = {}  # of every expert that is here or coming
        self.uploads = _PoolUploads(self.memories, self._lies_on)

    @property
    def lossy(self) -> tuple[str, ...]:
        kinds = {device.rounding for device in self.devices}
        return ("experts on GPUs of different kinds",) if len(kinds) > 1 else ()

    def reserve(self, slots: Mapping[ExpertKey, int]) -> None:
        for number, mine in self._by_device(slots).items():
            self.memories[number].reserve(mine)
            self._lies_on |= dict.fromkeys(mine, self.memories[number])

    def is_reserved(self, key: ExpertKey) -> bool:
        memory = self._lies_on.get(key)
        return memory is not None and memory.is_reserved(key)

    def upload(
        self, key: ExpertKey, host: HostBytes, priority: Priority, in_chunks: bool = True
    ) -> None:
        self._lies_on[key].upload(key, host, priority, in_chunks)

    def arrived(self, key: ExpertKey, mark: Mark) -> None:
        self._lies_on[key].arrived(key, mark)

    def give_up(self, key: ExpertKey) -> None:
        self._lies_on.pop(key).give_up(key)

    def send_down(self, key: ExpertKey, host: HostBytes | None) -> Mark | None:
        return self._lies_on.pop(key).send_down(key, host)

    def is_there(self, key: ExpertKey) -> bool:
        return self._lies_on[key].is_there(key)

    def await_all(self, keys: Iterable[ExpertKey]) -> None:
        """Each device's computation waits for what lies there."""
        for key in keys:
            self._lies_on[key].await_all((key,))

    def views_of(self, key: ExpertKey) -> Views:
        memory = self._lies_on[key]
        views = memory.views_of(key)
        views.device = self.memories.index(memory)
        return views

    def take_stall_s(self) -> float:
        """Of the one that waited longest: they wait at the same time."""
        return max(memory.take_stall_s() for memory in self.memories)

    def drain(self) -> None:
        for memory in self.memories:
            with computing_on(memory.device):  # which is named, should it be lost
                memory.drain()

    def hold(self, slots: Mapping[ExpertKey, int]) -> None:
        self._lies_on.clear()
        found = self._by_device(slots)
        for number, memory in enumerate(self.memories):
            mine = found.get(number, {})
            memory.hold(mine)
            self._lies_on.update(dict.fromkeys(mine, memory))

    def give_back(self, device: int = 0) -> set[int]:
        gone = {(device, slot) for slot in self.memories[device].give_back()}
        return {slot for slot, place in enumerate(self._places) if place in gone}

    def close(self) -> None:
        self._lies_on.clear()
        for memory in self.memories:
            memory.close()

    def check_integrity(self, slots: Mapping[ExpertKey, int]) -> None:
        """Raise AssertionError unless every expert lies where ``slots`` says."""
        places = {key: self._places[slot] for key, slot in slots.items()}
        found = {
            key: (number, slot)
            for number, memory in enumerate(self.memories)
            for key, slot in memory.slot_of.items()
        }
        assert found == places, f"on other devices than said: {found.items() ^ places.items()}"
        assert found.keys() == self._lies_on.keys(), f"lost: {found.keys() ^ self._lies_on.keys()}"

    def _by_device(self, slots: Mapping[ExpertKey, int]) -> dict[int, dict[ExpertKey, int]]:
        found: dict[int, dict[ExpertKey, int]] = defaultdict(dict)
        for key, slot in slots.items():
            number, there = self._places[slot]
            found[number][key] = there
        return found


class _PoolUploads:
    """What ``Uploads`` is to a hierarchy, over those of several devices."""

    def __init__(
        self, memories: Sequence[DeviceMemory], lies_on: Mapping[ExpertKey, DeviceMemory]
    ) -> None:
        self._all = [memory.uploads for memory in memories]
        self._lies_on = lies_on

    def is_queued(self, key: ExpertKey) -> bool:
        return key in self._lies_on and self._lies_on[key].uploads.is_queued(key)

    def promote(self, key: ExpertKey) -> None:
        self._lies_on[key].uploads.promote(key)

    def cancel(self, key: ExpertKey) -> Mark | None:
        return self._lies_on[key].uploads.cancel(key)

    def take_settled(self) -> list[tuple[ExpertKey, Mark]]:
        return [settled for uploads in self._all for settled in uploads.take_settled()]

    def wait(self) -> None:
        """For one link that is busy: what others finished meanwhile is seen then."""
        busy = next((uploads for uploads in self._all if uploads.is_busy), None)
        if busy is not None:
            busy.wait()


def _in_turns(slots_per_class: Sequence[tuple[int, ...]]) -> list[tuple[int, int]]:
    """By slot of the pool the device and its own slot: of every class each device's share, evenly
    among the others'. slots_per_class: of each device."""
    places: list[tuple[int, int]] = []
    firsts = [0] * len(slots_per_class)
    for counts in zip(*slots_per_class, strict=True):
        turns = [
            ((turn + 0.5) / count, number, firsts[number] + turn)
            for number, count in enumerate(counts)
            for turn in range(count)
        ]
        places += [(number, slot) for _, number, slot in sorted(turns)]
        firsts = [first + count for first, count in zip(firsts, counts, strict=True)]
    return places
