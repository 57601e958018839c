"""Disk to RAM, computed on the CPU: moves the bytes that residency/ decides about."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import torch

from moe_infinity.cache.base import Compute, Hierarchy
from moe_infinity.cache.slots import SlotArena
from moe_infinity.cache.transfer import Transfer, TransferEngine, TransferState
from moe_infinity.checkpoint.base import ExpertStore
from moe_infinity.errors import CancelledError
from moe_infinity.kernels.formats import is_viewable, part_views
from moe_infinity.residency.directory import State
from moe_infinity.residency.planner import PrefetchPlanner
from moe_infinity.residency.residency import Load, Residency
from moe_infinity.stats import Counters
from moe_infinity.tracing.event import Event
from moe_infinity.types import ExpertKey, Phase, Priority, TierName

# A miss rule: of the missing members of an event, those to load.
ChooseMisses = Callable[[Event, list[ExpertKey]], list[ExpertKey]]


class RamHierarchy(Hierarchy):
    """One tier of slots in RAM over an expert store.

    The computing thread owns the residency and drives transfers; workers only fill buffers. What
    has arrived is made resident by the computing thread, when it next looks.
    """

    def __init__(
        self,
        store: ExpertStore,
        residency: Residency,
        planner: PrefetchPlanner,
        arena: SlotArena,
        engine: TransferEngine,
        choose_misses: ChooseMisses | None = None,
    ) -> None:
        self.residency = residency
        self.cancelled = threading.Event()  # set by another thread; seen between two experts
        self._store = store
        self._planner = planner
        self._arena = arena
        self._engine = engine
        self._choose_misses = choose_misses
        self._in_flight: dict[ExpertKey, Transfer] = {}
        self._pending: list[ExpertKey] = []  # members of the event that have a slot, uncomputed
        self._is_clean = True  # False while an event runs, or was given up halfway
        self._views: dict[ExpertKey, dict[str, list[torch.Tensor]]] = {}

    @property
    def counters(self) -> Counters:
        return self.residency.counters

    def begin_request(self) -> None:
        self.residency.policy.begin_request()
        self._planner.predictor.begin_request()

    def end_request(self) -> None:
        self.residency.policy.end_request()
        self._planner.predictor.end_request()

    def begin_pass(self, phase: Phase) -> None:
        self.residency.begin_pass(phase)

    def run_event(self, event: Event, compute: Compute) -> None:
        if not self._is_clean:  # a second interrupt struck while the first was seen to
            self._abort()
        try:
            self._is_clean = False
            self._run_event(event, compute)
            self._is_clean = True
        except BaseException:
            self._abort()
            raise

    def tier_of(self, key: ExpertKey) -> TierName:
        return "ram" if self.residency.directory.state(key) is State.RESIDENT else "disk"

    def resident_flat(self) -> list[int]:
        """Flat keys (layer * num_experts + expert) that are resident now."""
        directory = self.residency.directory
        return [int(k) for k in (directory.states == State.RESIDENT).nonzero()[0]]

    def check_integrity(self) -> None:
        self.residency.directory.check_integrity()
        in_flight = set(self.residency.directory.keys_in(State.IN_FLIGHT))
        assert in_flight == self._in_flight.keys(), (
            f"in flight without a transfer, or the reverse: {in_flight ^ self._in_flight.keys()}"
        )

    def close(self) -> None:
        self._engine.close()
        self._abort()  # what was in flight holds on to its slot
        self._arena.close()

    def _run_event(self, event: Event, compute: Compute) -> None:
        self._collect()
        found = self.residency.begin_event(event)
        self._planner.predictor.observe(event)
        if self._choose_misses is not None:
            wanted = self._choose_misses(event, found.misses)
            self.residency.skip(set(found.misses).difference(wanted))
        for key in found.disproved:
            self._engine.cancel(self._in_flight[key])
        for key in found.late:
            self._engine.promote(self._in_flight[key])
        self._pending = sorted(found.hits + found.late)
        self._admit()
        coming = self._planner.plan(event.layer)
        self._start(self.residency.prefetch(coming, event.layer), Priority.PREFETCH)
        while not self.residency.is_done:
            self._collect()
            self._admit()
            ready = self._next_ready(in_order=event.phase == "prefill")
            if ready is None:
                self.counters.now.stall_s += self._engine.wait_any()
                continue
            self._pending.remove(ready)
            self._compute(ready, compute)
            self.residency.finish(ready)
        self.residency.end_event()
        busy_s, num_bytes = self._engine.take_activity()
        self.counters.now.read_busy_s += busy_s
        self.counters.now.read_bytes += num_bytes

    def _admit(self) -> None:
        """Begin what can begin: members first, then what is worth loading ahead."""
        loads = self.residency.admit()
        self._start(loads, Priority.DEMAND)
        self._pending += [load.key for load in loads]
        self._start(self.residency.stream_ahead(), Priority.PREFETCH)

    def _start(self, loads: list[Load], priority: Priority) -> None:
        for load in loads:
            if load.victim is not None:
                self._views.pop(load.victim, None)
            buffer = self._arena.buffer(load.slot)
            self._in_flight[load.key] = self._engine.submit(load.key, buffer, priority)

    def _next_ready(self, in_order: bool) -> ExpertKey | None:
        """A member that is here. Prefill takes them in order, so that which slot comes free when
        does not depend on the disk; decode takes whichever is here first."""
        state = self.residency.directory.state
        for key in self._pending[:1] if in_order else self._pending:
            if state(key) is State.RESIDENT:
                return key
        return None

    def _collect(self) -> None:
        """Make resident what has arrived. Raises the error of a load that an event waits for.

        A member whose prefetch failed, or was cancelled before the router asked for it again, is
        loaded once more on demand.
        """
        error: BaseException | None = None
        for transfer in self._engine.take_settled():
            key = transfer.key
            del self._in_flight[key]
            if transfer.state is TransferState.DONE:
                self.residency.complete(key)
                continue
            self.residency.fail(key)
            if key in self._pending:
                self._pending.remove(key)
            if transfer.priority is Priority.DEMAND:
                error = error or transfer.error
        if error is not None:
            raise error

    def _compute(self, key: ExpertKey, compute: Compute) -> None:
        if self.cancelled.is_set():
            raise CancelledError("the request was cancelled")
        start = time.perf_counter()
        compute(key, self._views_of(key))
        self.counters.now.compute_s += time.perf_counter() - start
        self.counters.now.computed_bytes += self._store.specs[key].weight_bytes

    def _views_of(self, key: ExpertKey) -> dict[str, list[torch.Tensor]]:
        views = self._views.get(key)
        if views is None:
            spec = self._store.specs[key]
            views = part_views(spec, self._arena.tensor(self.residency.directory.slot(key)))
            if is_viewable(spec):  # copies must not outlive the call: they are in no budget
                self._views[key] = views
        return views

    def _abort(self) -> None:
        """Leave nothing pinned or in flight behind a failed event, wherever it was interrupted."""
        self._is_clean = False
        self._engine.drain()
        self.residency.abort_event()
        self._in_flight.clear()
        self._pending.clear()
        self._views.clear()  # an interrupted eviction may have left one of a lost slot
        self._is_clean = True
