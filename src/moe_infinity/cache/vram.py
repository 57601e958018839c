"""Disk to RAM to a device's memory, computed there: moves the bytes residency/ decides about."""

from __future__ import annotations

import contextlib

from moe_infinity.cache.base import Compute
from moe_infinity.cache.beside import Beside
from moe_infinity.cache.device_memory import DeviceMemory
from moe_infinity.cache.device_pool import DevicePool
from moe_infinity.cache.driven import DrivenHierarchy
from moe_infinity.cache.host_tier import HostTier
from moe_infinity.checkpoint.base import ExpertStore
from moe_infinity.kernels.base import Views
from moe_infinity.residency.directory import Directory, State
from moe_infinity.residency.meters import PaysMeter
from moe_infinity.residency.miss_split import MissSplit
from moe_infinity.residency.runner import EventRunner, Settled
from moe_infinity.residency.running import Load
from moe_infinity.tracing.event import Event
from moe_infinity.types import ExpertKey, Phase, Priority, TierName


class VramHierarchy(DrivenHierarchy):
    """Slots on a device, or on several, over a tier of slots in RAM over an expert store.

    A load is settled when its copy was put on a stream: the computation waits for that on the
    device, the host only for the disk. So no decision depends on how long a copy takes.
    """

    tier_names = ("vram", "ram", "disk")
    tokens_at_once = 0  # launches are not waited for; how one is cut depends on all its experts

    def __init__(
        self,
        store: ExpertStore,
        runner: EventRunner,
        host: HostTier,
        memory: DeviceMemory | DevicePool,
        pays: PaysMeter | None = None,
    ) -> None:
        """The computation of what the processor takes over is set by ``share_misses``."""
        super().__init__(store, runner, pays)
        self.memory = memory
        self.device = memory.devices[0]  # the model's own
        self._host = host
        self._coming: dict[ExpertKey, Priority] = {}  # begun, and not yet settled
        self._unwanted: set[ExpertKey] = set()  # of them, what was cancelled while it was read
        self._cancelled: list[ExpertKey] = []  # settled without having arrived
        self._beside: Beside | None = None

    @property
    def faults(self) -> tuple[str, ...]:
        own = (self._host.arena.fault, getattr(self._host.shelf.policy, "fault", None))
        return super().faults + tuple(fault for fault in own if fault)

    @property
    def directories(self) -> tuple[Directory, ...]:
        return (self.residency.directory, self._host.shelf.directory)

    @property
    def host(self) -> HostTier:
        return self._host

    @property
    def lossy(self) -> tuple[str, ...]:
        """What another way of computing misses may change, for reports."""
        beside = ("misses computed on the CPU",) if self._beside is not None else ()
        return beside + self.memory.lossy

    def share_misses(self, split: MissSplit) -> None:
        """Let the processor compute some misses from RAM instead of copying them."""
        self._beside = Beside(split, self.residency, self._host, self.store)
        self.meters.append(split.pays)
        self.runner.choose_misses = self._beside.choose

    def get_ready(self) -> None:
        self._host.arena.touch_ahead()

    def untouched_bytes(self) -> int:
        return self._host.arena.untouched_bytes()

    def shrink(self, device: int = 0) -> int:
        """Give some of a device's memory back, between events. Returns how many slots went; 0:
        what is left is needed."""
        self._abort()
        gone = self.memory.give_back(device)
        self.residency.clear(gone)
        self.residency.directory.retire(gone)
        self.residency.room.measure()
        self._start_anew()
        return len(gone)

    def is_idle(self) -> bool:
        """Whether nothing is on its way, and nothing loaded ahead awaits its verdict."""
        return not self._coming and not self.residency.room.ahead

    def forget_slots(self) -> None:
        """What the slots hold is not known any more."""
        self.residency.abort_event()
        self.residency.clear()
        self._start_anew()

    def taken_over(self) -> None:
        """The device has changed its slots by itself, in the order of its computation, and the
        directory says how by now."""
        self.ended_event()
        self._start_anew()

    def begin_request(self) -> None:
        self._host.skip_time()
        self._host.shelf.policy.begin_request()
        super().begin_request()

    def end_request(self) -> None:
        self._host.shelf.policy.end_request()
        super().end_request()

    def begin_pass(self, phase: Phase, *seen: object) -> None:
        self._host.shelf.begin_pass(phase)
        with self._undone_if_interrupted():
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
        for load in loads:
            if load.victim is not None:
                self._send_down(load.victim)
        self._coming |= dict.fromkeys((load.key for load in loads), priority)
        self.memory.reserve({load.key: load.slot for load in loads})
        for load in here:
            self._upload(load.key)

    def cancel(self, key: ExpertKey) -> None:
        if self.memory.is_reserved(key):  # it is not here yet, or waits for room
            self._unwanted.add(key)
            self._host.cancel(key)
        elif self.memory.uploads.is_queued(key):
            last = self.memory.uploads.cancel(key)
            if last is not None:
                self.memory.arrived(key, last)
                self._host.guard(key, last)
            self._host.shelf.given_back(key)
            self._cancelled.append(key)

    def promote(self, key: ExpertKey) -> None:
        self._coming[key] = Priority.DEMAND
        if self.memory.is_reserved(key):
            self._host.promote(key)
        else:
            self.memory.uploads.promote(key)

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
        for key, mark in self.memory.uploads.take_settled():
            self.memory.arrived(key, mark)
            self._host.guard(key, mark)
            self._host.shelf.risen(key)
            settled.append(Settled(key, arrived=True))
        for key, arrived, _ in settled:
            del self._coming[key]
            self._unwanted.discard(key)
            if not arrived:
                self.memory.give_up(key)
        return settled

    def wait(self) -> None:
        """The host waits for the disk; for room in RAM that uploads take, if nothing is read."""
        if self._host.is_reading:
            self.count_wait(self._host.wait())
        else:
            self.memory.uploads.wait()

    def compute(self, keys: list[ExpertKey]) -> None:
        """What is there is launched before the computation waits for what is on its way."""
        here = [key for key in keys if self.memory.is_there(key)]
        coming = [key for key in keys if key not in here]
        for some in filter(None, (here, coming)):
            self.memory.await_all(some)
            super().compute(some)

    def views_of(self, key: ExpertKey) -> Views:
        return self.memory.views_of(key)

    def count_activity(self) -> None:
        self.count_reads(*self._host.take_activity())
        self.count_wait(self.memory.take_stall_s())

    def drain(self) -> None:
        self._host.drain()
        self.memory.drain()

    def forget_transfers(self) -> None:
        for pending in (self._coming, self._unwanted, self._cancelled):
            pending.clear()
        if self._beside is not None:
            self._beside.forget()
        self._start_anew()

    def _start_anew(self) -> None:
        """Every copy is over, and the directory says what is where."""
        directory = self.residency.directory
        here = directory.keys_in(State.RESIDENT)
        self.memory.hold({key: directory.slot(key) for key in here})
        self._host.shelf.reset(directory.states == State.RESIDENT)

    def check_integrity(self) -> None:
        self.residency.directory.check_integrity()
        self._host.check_integrity()
        in_flight = set(self.residency.directory.keys_in(State.IN_FLIGHT))
        assert in_flight == self._coming.keys(), (
            f"in flight without a load, or the reverse: {in_flight ^ self._coming.keys()}"
        )
        held = self.residency.directory.keys_in(State.RESIDENT) + list(in_flight)
        self.memory.check_integrity({key: self.residency.directory.slot(key) for key in held})
        above = [k for k in self.residency.directory.keys_in(State.RESIDENT) if self._is_lost(k)]
        assert not above, f"in both tiers, and the shelf does not know: {above}"

    def close(self) -> None:
        with contextlib.ExitStack() as closing:  # all of it, also of a device that was lost
            closing.callback(self.memory.close)
            closing.callback(self._host.close)
            for device in self.memory.devices:
                closing.callback(device.close)
            closing.callback(self._abort)

    def _is_lost(self, key: ExpertKey) -> bool:
        return self._host.holds(key) and not self._host.shelf.lies_above(key)

    def _send_down(self, victim: ExpertKey) -> None:
        host = self._host.take_back(victim)
        copied = self.memory.send_down(victim, host)
        if copied is not None:
            self._host.taken_back(victim, copied)
            self.counters.demote(victim.layer)

    def _upload(self, key: ExpertKey) -> None:
        # A prompt needs most of what is loaded ahead, and the host seldom looks in between.
        in_chunks = self.counters.phase == "decode"
        self.memory.upload(key, self._host.source(key), self._coming[key], in_chunks)
