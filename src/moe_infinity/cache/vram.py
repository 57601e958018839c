"""Disk to RAM to a device's memory, computed there: moves the bytes residency/ decides about."""

from __future__ import annotations

from moe_infinity.cache.base import Compute
from moe_infinity.cache.beside import Beside
from moe_infinity.cache.device_layout import device_layout
from moe_infinity.cache.device_slots import DeviceSlots
from moe_infinity.cache.driven import DrivenHierarchy, numbered
from moe_infinity.cache.host_tier import HostTier
from moe_infinity.cache.uploads import Uploads
from moe_infinity.checkpoint.base import ExpertStore
from moe_infinity.devices.base import Device, Mark
from moe_infinity.kernels.base import Views
from moe_infinity.kernels.formats import is_viewable, part_views
from moe_infinity.residency.directory import State
from moe_infinity.residency.meters import PaysMeter
from moe_infinity.residency.miss_split import MissSplit
from moe_infinity.residency.runner import EventRunner, Settled
from moe_infinity.residency.running import Load
from moe_infinity.tracing.event import Event
from moe_infinity.types import ExpertKey, Phase, Priority, TierName


class VramHierarchy(DrivenHierarchy):
    """Slots on a device over a tier of slots in RAM over an expert store.

    A load is settled when its copy was put on a stream: the computation waits for that on the
    device, the host only for the disk. So no decision depends on how long a copy takes.
    """

    tier_names = ("vram", "ram", "disk")

    def __init__(
        self,
        store: ExpertStore,
        runner: EventRunner,
        host: HostTier,
        slots: DeviceSlots,
        device: Device,
        pays: PaysMeter | None = None,
    ) -> None:
        """The computation of what the processor takes over is set by ``share_misses``."""
        super().__init__(store, runner, pays)
        self.device = device
        self._host = host
        self._slots = slots
        self.uploads = Uploads(device)
        self._down = device.new_stream("down")
        self._coming: dict[ExpertKey, Priority] = {}  # begun, and not yet settled
        self._unwanted: set[ExpertKey] = set()  # of them, what was cancelled while it was read
        self._cancelled: list[ExpertKey] = []  # settled without having arrived
        self._free_after: dict[ExpertKey, list[Mark]] = {}  # of coming ones: of their memory
        self._uploaded: dict[int, Mark] = {}  # by slot: when what was copied to it is there
        self._awaited: set[int] = set()  # slots for whose mark the computation waits already
        self.layouts = {key: device_layout(spec) for key, spec in store.specs.items()}
        self._numbers = numbered({key: each.spec for key, each in self.layouts.items()})
        self._views: dict[int, tuple[int, int, Views]] = {}  # by slot: layout, address, views
        self._beside: Beside | None = None

    @property
    def faults(self) -> tuple[str, ...]:
        own = (self._host.arena.fault, getattr(self._host.shelf.policy, "fault", None))
        return super().faults + tuple(fault for fault in own if fault)

    @property
    def host(self) -> HostTier:
        return self._host

    @property
    def lossy(self) -> tuple[str, ...]:
        """What another way of computing misses may change, for reports."""
        return ("misses computed on the CPU",) if self._beside is not None else ()

    def share_misses(self, split: MissSplit) -> None:
        """Let the processor compute some misses from RAM instead of copying them."""
        self._beside = Beside(split, self.residency, self._host, self.store)
        self.meters.append(split.pays)
        self.runner.choose_misses = self._beside.choose

    def get_ready(self) -> None:
        self._host.arena.touch_ahead()

    @property
    def slots(self) -> DeviceSlots:
        return self._slots

    def is_idle(self) -> bool:
        """Whether nothing is on its way, and nothing loaded ahead awaits its verdict."""
        return not self._coming and not self.residency.room.ahead

    def taken_over(self) -> None:
        """The device has changed its slots by itself, in the order of its computation, and the
        directory says how by now."""
        self._uploaded.clear()
        self._awaited.clear()
        self._host.shelf.reset(self.residency.directory.states == State.RESIDENT)

    def begin_request(self) -> None:
        self._host.shelf.policy.begin_request()
        super().begin_request()

    def end_request(self) -> None:
        self._host.shelf.policy.end_request()
        super().end_request()

    def begin_pass(self, phase: Phase, *seen: object) -> None:
        self._host.shelf.begin_pass(phase)
        self._host.fill(self.counters)
        super().begin_pass(phase, *seen)  # type: ignore[arg-type]

    def run_event(self, event: Event, compute: Compute, *foreseen: object) -> None:
        self._host.shelf.observe(event)
        super().run_event(event, compute, *foreseen)  # type: ignore[arg-type]

    def complete_event(self, event: Event) -> None:
        assert self._computing is not None, "no event is running"
        if self._beside is not None:
            self.counters.now.on_cpu += self._beside.compute(self._computing)

    def tier_of(self, key: ExpertKey) -> TierName:
        if self.residency.directory.state(key) is State.RESIDENT:
            return "vram"
        return "ram" if self._host.holds(key) else "disk"

    def start(self, loads: list[Load], priority: Priority) -> None:
        """Ask first: what a victim pushes out of RAM must not be what is wanted from there."""
        here = [load for load in loads if self._host.ask(load.key, priority, self.counters)]
        launched = self.device.compute.mark()
        for load in loads:
            self._coming[load.key] = priority
            self._free_after[load.key] = self._make_room(load, launched)
        for load in here:
            self._upload(load.key)

    def cancel(self, key: ExpertKey) -> None:
        if not self.uploads.is_queued(key):
            if key in self._free_after:  # it is not here yet, or waits for room
                self._unwanted.add(key)
                self._host.cancel(key)
            return
        last = self.uploads.cancel(key)
        if last is not None:
            self._uploaded[self.residency.directory.slot(key)] = last
            self._host.guard(key, last)
        self._host.shelf.given_back(key)
        self._cancelled.append(key)

    def promote(self, key: ExpertKey) -> None:
        self._coming[key] = Priority.DEMAND
        if self.uploads.is_queued(key):
            self.uploads.promote(key)
        elif key in self._free_after:
            self._host.promote(key)

    def collect(self) -> list[Settled]:
        settled = [Settled(key, arrived=False) for key in self._cancelled]
        self._cancelled.clear()
        for each in self._host.collect(self.counters):
            if each.arrived and each.key not in self._unwanted:
                self._upload(each.key)
                continue
            if each.arrived:
                self._host.shelf.given_back(each.key)
            settled.append(each._replace(arrived=False))
        for key, mark in self.uploads.take_begun():
            self._uploaded[self.residency.directory.slot(key)] = mark
            self._host.guard(key, mark)
            self._host.shelf.risen(key)
            settled.append(Settled(key, arrived=True))
        for key, *_ in settled:
            del self._coming[key]
            self._free_after.pop(key, None)
            self._unwanted.discard(key)
        return settled

    def wait(self) -> None:
        """The host waits for the disk; for room in RAM that uploads take, if nothing is read."""
        if self._host.is_reading:
            self.count_wait(self._host.wait())
        else:
            self.uploads.wait()

    def compute(self, keys: list[ExpertKey]) -> None:
        for slot in map(self.residency.directory.slot, keys):
            if slot not in self._awaited and slot in self._uploaded:
                self.device.compute.after(self._uploaded[slot])
                self._awaited.add(slot)
        super().compute(keys)

    def views_of(self, key: ExpertKey) -> Views:
        slot, layout = self.residency.directory.slot(key), self._numbers[key]
        memory = self._slots.memory(slot)
        kept = self._views.get(slot)
        if kept is not None and kept[:2] == (layout, memory.data_ptr()):
            return kept[2]
        spec = self.layouts[key].spec
        views = part_views(spec, memory)
        if is_viewable(spec):  # copies must not outlive the call: they are in no budget
            self._views[slot] = (layout, memory.data_ptr(), views)
        return views

    def count_activity(self) -> None:
        busy_s, num_bytes = self._host.take_activity()
        self.counters.now.read_busy_s += busy_s
        self.counters.now.read_bytes += num_bytes
        self.count_wait(self.device.take_stall_s())

    def drain(self) -> None:
        self._host.drain()
        self.uploads.drain()
        self._down.mark().wait()

    def forget_transfers(self) -> None:
        for pending in (self._coming, self._unwanted, self._cancelled, self._free_after):
            pending.clear()
        if self._beside is not None:
            self._beside.forget()
        self._uploaded.clear()  # whoever comes next waits for nothing: all copies are over
        self._awaited.clear()
        self._host.shelf.reset(self.residency.directory.states == State.RESIDENT)

    def check_integrity(self) -> None:
        self.residency.directory.check_integrity()
        self._host.check_integrity()
        in_flight = set(self.residency.directory.keys_in(State.IN_FLIGHT))
        assert in_flight == self._coming.keys(), (
            f"in flight without a load, or the reverse: {in_flight ^ self._coming.keys()}"
        )
        above = [k for k in self.residency.directory.keys_in(State.RESIDENT) if self._is_lost(k)]
        assert not above, f"in both tiers, and the shelf does not know: {above}"

    def close(self) -> None:
        self._abort()
        self.device.close()
        self._host.close()
        self._slots.close()

    def _is_lost(self, key: ExpertKey) -> bool:
        return self._host.holds(key) and not self._host.shelf.lies_above(key)

    def _make_room(self, load: Load, launched: Mark) -> list[Mark]:
        """New memory for the load's slot. Returns the marks after which it may be written to."""
        left = [launched]
        uploaded = self._uploaded.pop(load.slot, None)
        if uploaded is not None:
            left.append(uploaded)
        if load.victim is not None:
            left += self._send_down(load.victim, load.slot, uploaded)
        self._awaited.discard(load.slot)
        return self._slots.renew(load.slot, left)

    def _send_down(self, victim: ExpertKey, slot: int, uploaded: Mark | None) -> list[Mark]:
        """Copy a victim back to RAM, if it has to be. Returns the marks of that copy."""
        place = self._host.take_back(victim)
        if place is None:
            return []
        target, guard = place
        for mark in (guard, uploaded):
            if mark is not None:
                self._down.after(mark)
        memory = self._slots.memory(slot)
        for start, num_bytes, there in self.layouts[victim].segments:
            self._down.copy(target[start : start + num_bytes], memory[there : there + num_bytes])
        copied = self._down.mark()
        self._host.guard(victim, copied)
        self.counters.demote(victim.layer)
        return [copied]

    def _upload(self, key: ExpertKey) -> None:
        source, guard = self._host.source(key)
        after = self._free_after.pop(key)
        if guard is not None:
            after.append(guard)
        memory = self._slots.memory(self.residency.directory.slot(key))
        pieces = [
            (memory[there : there + num_bytes], source[start : start + num_bytes])
            for start, num_bytes, there in self.layouts[key].segments
        ]
        self.uploads.begin(key, pieces, self._coming[key], after)
