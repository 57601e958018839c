"""Disk to RAM, computed on the CPU: moves the bytes that residency/ decides about."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moe_infinity.cache.base import Compute, Hierarchy
from moe_infinity.cache.slots import SlotArena
from moe_infinity.cache.transfer import Transfer, TransferEngine, TransferState
from moe_infinity.checkpoint.base import ExpertStore
from moe_infinity.errors import CancelledError
from moe_infinity.kernels.base import Views
from moe_infinity.kernels.formats import is_viewable, part_views
from moe_infinity.predictors.base import Embeddings, TokenIds
from moe_infinity.residency.directory import State
from moe_infinity.residency.meters import PaysMeter, StallMeter
from moe_infinity.residency.runner import Carrier, EventRunner, Settled
from moe_infinity.residency.running import Load
from moe_infinity.stats import Counters
from moe_infinity.tracing.event import Event
from moe_infinity.types import ExpertKey, Part, Phase, Priority, TierName


@dataclass(slots=True)
class _Spent:
    """By the events of a pass, from the end of the one before the first."""

    stall_s: float = 0.0
    wall_s: float = 0.0
    num_events: int = 0


class RamHierarchy(Hierarchy, Carrier):
    """One tier of slots in RAM over an expert store.

    The computing thread owns the runner's decisions and drives transfers; workers only fill
    buffers. What has arrived is made resident by the computing thread, when it next looks.
    """

    def __init__(
        self,
        store: ExpertStore,
        runner: EventRunner,
        arena: SlotArena,
        engine: TransferEngine,
        pays: PaysMeter | None = None,
    ) -> None:
        """pays: decides whether looking ahead is worth it; None: whoever asked for it wants it."""
        self.runner = runner
        self.residency = runner.residency
        self.cancelled = threading.Event()  # set by another thread; seen before experts are told of
        self._store = store
        self._arena = arena
        self._engine = engine
        self._in_flight: dict[ExpertKey, Transfer] = {}
        self._computing: Compute | None = None  # of the running event
        self._is_clean = True  # False while an event runs, or was given up halfway
        self._layouts = _layouts_of(store)
        self._layer_bytes = _layer_bytes_of(store)
        if all(map(is_viewable, store.specs.values())):
            shape = runner.residency.directory.shape
            self.known = np.zeros((shape.num_layers, shape.num_experts), dtype=np.uint8)
        self._views: dict[int, tuple[int, Views]] = {}  # by slot: layout and views of what is there
        self._stalls = StallMeter()
        self._pays = pays
        self._stalled_s = 0.0  # in the running event
        self._event_ended_s: float | None = None  # of decode
        self._of_pass = _Spent()

    @property
    def counters(self) -> Counters:
        return self.residency.counters

    @property
    def faults(self) -> tuple[str, ...]:
        """What failed and was replaced: the policy, the predictor."""
        members = (self.residency.policy, self.runner.planner.predictor)
        found = (getattr(member, "fault", None) for member in members)
        return tuple(fault for fault in found if fault)

    def get_ready(self) -> None:
        """Everything else of the model is in memory: slots may be made ready."""
        self._arena.touch_ahead()

    def begin_request(self) -> None:
        self.runner.begin_request()

    def end_request(self) -> None:
        self.runner.end_request()

    def begin_pass(
        self, phase: Phase, embeddings: Embeddings = None, token_ids: TokenIds = None
    ) -> None:
        self._tell_meters()
        with self._undone_if_interrupted():
            self.runner.begin_pass(phase, self, embeddings, token_ids)

    def run_event(
        self, event: Event, compute: Compute, foreseen: NDArray[np.float32] | None = None
    ) -> None:
        with self._undone_if_interrupted():
            self._computing = compute
            self.runner.run(event, self, foreseen)
            self._count_activity()
            self._count_stall(event.phase)

    def run_hits(self, events: Sequence[Event], spent_s: Sequence[float]) -> None:
        if self.cancelled.is_set():
            raise CancelledError("the request was cancelled")
        with self._undone_if_interrupted():
            were_hits = self.runner.run_hits(events, self)
            if were_hits:
                now = self.counters.now
                now.compute_s += sum(spent_s)
                now.computed_bytes += sum(map(self._event_bytes, events))
                self._count_activity()
                self._count_stall("decode", len(events))
        if not were_hits:
            super().run_hits(events, spent_s)

    def _event_bytes(self, event: Event) -> int:
        """Of its members' weights."""
        of_each = self._layer_bytes[event.layer]
        if of_each is not None:
            return of_each * len(event.experts)
        return sum(self._store.specs[key].weight_bytes for key in event.keys)

    def foresee(self, layer: int, scores: NDArray[np.float32]) -> None:
        with self._undone_if_interrupted():
            self.runner.foresee(layer, self.counters.phase, scores, self)

    def tier_of(self, key: ExpertKey) -> TierName:
        return "ram" if self.residency.directory.state(key) is State.RESIDENT else "disk"

    def tiers(self) -> list[dict[str, list[int]]]:
        """For every layer, the experts in each tier."""
        layers = []
        for layer, count in enumerate(self.residency.directory.shape.experts_per_layer):
            found: dict[str, list[int]] = {"ram": [], "disk": []}
            for expert in range(count):
                found[self.tier_of(ExpertKey(layer, expert))].append(expert)
            layers.append(found)
        return layers

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

    def start(self, loads: list[Load], priority: Priority) -> None:
        for load in loads:
            if self.known is not None and load.victim is not None:
                self.known[load.victim.layer, load.victim.expert] = 0
            buffer = self._arena.buffer(load.slot)
            self._in_flight[load.key] = self._engine.submit(load.key, buffer, priority)

    def cancel(self, key: ExpertKey) -> None:
        self._engine.cancel(self._in_flight[key])

    def promote(self, key: ExpertKey) -> None:
        self._engine.promote(self._in_flight[key])

    def collect(self) -> list[Settled]:
        settled = []
        for transfer in self._engine.take_settled():
            del self._in_flight[transfer.key]
            arrived = transfer.state is TransferState.DONE
            error = transfer.error if transfer.priority is Priority.DEMAND else None
            settled.append(Settled(transfer.key, arrived, None if arrived else error))
        return settled

    def wait(self) -> None:
        stall_s = self._engine.wait_any()
        self._stalled_s += stall_s
        self.counters.now.stall_s += stall_s

    def looks_ahead(self) -> bool:
        return self._stalls.is_worth_it and (self._pays is None or self._pays.is_on)

    def is_quiet(self) -> bool:
        return self.runner.is_quiet(self)

    def compute(self, keys: list[ExpertKey]) -> None:
        if self.cancelled.is_set():
            raise CancelledError("the request was cancelled")
        assert self._computing is not None, "no event is running"
        start = time.perf_counter()
        spent_s = self._computing(keys, [self._views_of(key) for key in keys])
        now = self.counters.now
        now.compute_s += time.perf_counter() - start if spent_s is None else spent_s
        for key in keys:
            now.computed_bytes += self._store.specs[key].weight_bytes

    def _views_of(self, key: ExpertKey) -> Views:
        """Of most models all experts lie in their slots in the same way: a slot's views serve
        whichever is there."""
        slot, layout = self.residency.directory.slot(key), self._layouts[key]
        kept = self._views.get(slot)
        if kept is not None and kept[0] == layout:
            return kept[1]
        spec = self._store.specs[key]
        views = part_views(spec, self._arena.tensor(slot))
        if is_viewable(spec):  # copies must not outlive the call: they are in no budget
            self._views[slot] = (layout, views)
        return views

    def _count_activity(self) -> None:
        busy_s, num_bytes = self._engine.take_activity()
        self.counters.now.read_busy_s += busy_s
        self.counters.now.read_bytes += num_bytes

    def _count_stall(self, phase: Phase, num_events: int = 1) -> None:
        """Prompts stream whatever the cache holds: only decode says whether looking ahead pays."""
        now = time.perf_counter()
        if phase == "decode" and self._event_ended_s is not None:
            self._of_pass.stall_s += self._stalled_s
            self._of_pass.wall_s += now - self._event_ended_s
            self._of_pass.num_events += num_events
        self._event_ended_s = now if phase == "decode" else None
        self._stalled_s = 0.0

    def _tell_meters(self) -> None:
        """A pass at a time: the blocks that are run ahead are paid for by the first one's event."""
        spent, self._of_pass = self._of_pass, _Spent()
        if spent.num_events:
            self._stalls.spend(spent.stall_s, spent.wall_s, spent.num_events)
            if self._pays is not None:
                self._pays.spend(spent.wall_s, spent.num_events)

    @contextmanager
    def _undone_if_interrupted(self) -> Iterator[None]:
        if not self._is_clean:  # a second interrupt struck while the first was seen to
            self._abort()
        try:
            self._is_clean = False
            yield
            self._is_clean = True
        except BaseException:
            self._abort()
            raise

    def _abort(self) -> None:
        """Leave nothing pinned or in flight behind a failed event, wherever it was interrupted."""
        self._is_clean = False
        self._engine.drain()
        self.runner.abort()
        self._in_flight.clear()
        if self.known is not None:
            self.known[:] = 0
        self._is_clean = True


def _layouts_of(store: ExpertStore) -> dict[ExpertKey, int]:
    """Numbers that are equal for experts whose parts lie in the same places of their slots."""
    numbers: dict[tuple[Part, ...], int] = {}
    return {key: numbers.setdefault(spec.parts, len(numbers)) for key, spec in store.specs.items()}


def _layer_bytes_of(store: ExpertStore) -> dict[int, int | None]:
    """By layer the bytes of each expert's weights; None where they differ."""
    sizes: dict[int, set[int]] = {}
    for key, spec in store.specs.items():
        sizes.setdefault(key.layer, set()).add(spec.weight_bytes)
    return {layer: found.pop() if len(found) == 1 else None for layer, found in sizes.items()}
