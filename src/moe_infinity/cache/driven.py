"""What every hierarchy does alike: events through the runner, meters, undoing what broke off."""

from __future__ import annotations

import threading
import time
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from moe_infinity.cache.base import Compute, Hierarchy
from moe_infinity.checkpoint.base import ExpertStore
from moe_infinity.errors import CancelledError
from moe_infinity.kernels.base import Views
from moe_infinity.predictors.base import Embeddings, Foresight, TokenIds
from moe_infinity.residency.directory import Directory, State
from moe_infinity.residency.meters import PaysMeter, StallMeter
from moe_infinity.residency.runner import Carrier, EventRunner
from moe_infinity.stats import Counters
from moe_infinity.tracing.event import Event
from moe_infinity.types import ExpertKey, Phase, TierName


@dataclass(slots=True)
class _Spent:
    """By the events of a pass, from the end of the one before the first."""

    stall_s: float = 0.0
    wall_s: float = 0.0
    num_events: int = 0


class DrivenHierarchy(Hierarchy, Carrier):
    """The uppermost tier, that a device computes from, driven by one EventRunner.

    The computing thread owns the runner's decisions. A subclass carries them out: it moves bytes
    (``start`` to ``wait``), says where an expert lies (``views_of``) and stops all movement
    (``drain``).
    """

    tier_names: ClassVar[tuple[TierName, ...]]  # the uppermost first

    def __init__(
        self, store: ExpertStore, runner: EventRunner, pays: PaysMeter | None = None
    ) -> None:
        """pays: decides whether looking ahead is worth it; None: whoever asked for it wants it."""
        self.runner = runner
        self.residency = runner.residency
        self.cancelled = threading.Event()  # set by another thread; seen before experts are told of
        self.store = store
        self._computing: Compute | None = None  # of the running event
        self._is_clean = True  # False while an event runs, or was given up halfway
        self._layer_bytes = _layer_bytes_of(store)
        self._stalls = StallMeter()
        self._pays = pays
        self.meters = [] if pays is None else [pays]
        self._stalled_s = 0.0  # in the running event
        self._event_ended_s: float | None = None  # of decode
        self._of_pass = _Spent()

    @abstractmethod
    def views_of(self, key: ExpertKey) -> Views:
        """The parts of a resident expert where they lie."""

    @abstractmethod
    def drain(self) -> None:
        """Give up every transfer and wait until none touches a slot any more."""

    @abstractmethod
    def count_activity(self) -> None:
        """Add to the counters what the links did since the last call."""

    @abstractmethod
    def untouched_bytes(self) -> int:
        """Of slots in RAM, what costs no memory yet."""

    @property
    def counters(self) -> Counters:
        return self.residency.counters

    @property
    def faults(self) -> tuple[str, ...]:
        """What failed and was replaced: the policy, the predictor."""
        members = (self.residency.policy, self.runner.planner.predictor)
        found = (getattr(member, "fault", None) for member in members)
        return tuple(fault for fault in found if fault)

    @property
    def lossy(self) -> tuple[str, ...]:
        """What of the cache's ways may change logits, for reports."""
        return ()

    def complete_event(self, event: Event) -> None:
        """The runner is done with it: what is left of its members is computed now."""

    def get_ready(self) -> None:
        """Everything else of the model is in memory: slots may be made ready."""

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
            self.complete_event(event)
            self.count_activity()
            self._count_stall(event.phase)

    def run_hits(self, events: Sequence[Event], spent_s: Sequence[float]) -> bool:
        with self._undone_if_interrupted():
            if self.cancelled.is_set():
                raise CancelledError("the request was cancelled")
            were_hits = self.runner.run_hits(events, self)
            if were_hits:
                now = self.counters.now
                now.compute_s += sum(spent_s)
                now.computed_bytes += sum(map(self._event_bytes, events))
                self.count_activity()
                self._count_stall("decode", len(events))
        return were_hits

    def count_compute(self, seconds: float) -> None:
        self.counters.now.compute_s += seconds

    def _event_bytes(self, event: Event) -> int:
        """Of its members' weights."""
        of_each = self._layer_bytes[event.layer]
        if of_each is not None:
            return of_each * len(event.experts)
        return sum(self.store.specs[key].weight_bytes for key in event.keys)

    @property
    def outlook(self) -> Foresight | None:
        return self.runner.outlook if self.looks_ahead() else None

    def foresee(
        self, layer: int, scores: NDArray[np.float32], chosen: Sequence[ExpertKey] = ()
    ) -> None:
        with self._undone_if_interrupted():
            self.runner.foresee(layer, self.counters.phase, scores, self, chosen)

    def tiers(self) -> list[dict[str, list[int]]]:
        """For every layer, the experts in each tier."""
        layers = []
        for layer, count in enumerate(self.residency.directory.shape.experts_per_layer):
            found: dict[str, list[int]] = {name: [] for name in self.tier_names}
            for expert in range(count):
                found[self.tier_of(ExpertKey(layer, expert))].append(expert)
            layers.append(found)
        return layers

    @property
    def directories(self) -> tuple[Directory, ...]:
        """Of every tier that has slots, the uppermost first."""
        return (self.residency.directory,)

    def tier_map(self) -> NDArray[np.uint8]:
        """[L, E] where every expert is: 0 on disk, 1 in RAM, 2 on the device. From any thread."""
        shape = self.residency.directory.shape
        heights = np.zeros((shape.num_layers, shape.num_experts), dtype=np.uint8)
        for height, directory in enumerate(reversed(self.directories), start=1):
            heights.ravel()[directory.states == State.RESIDENT] = height
        return heights

    def resident_flat(self) -> list[int]:
        """Flat keys (layer * num_experts + expert) that are resident now."""
        directory = self.residency.directory
        return [int(k) for k in (directory.states == State.RESIDENT).nonzero()[0]]

    def looks_ahead(self) -> bool:
        return self._stalls.is_worth_it and (self._pays is None or self._pays.is_on)

    def is_quiet(self) -> bool:
        return self.runner.is_quiet(self)

    def compute(self, keys: list[ExpertKey]) -> None:
        if self.cancelled.is_set():
            raise CancelledError("the request was cancelled")
        assert self._computing is not None, "no event is running"
        start = time.perf_counter()
        spent_s = self._computing(keys, [self.views_of(key) for key in keys])
        now = self.counters.now
        now.compute_s += time.perf_counter() - start if spent_s is None else spent_s
        for key in keys:
            now.computed_bytes += self.store.specs[key].weight_bytes

    def ended_event(self) -> None:
        """Time that passes from now on is no event's."""
        self._event_ended_s = None

    def count_reads(self, busy_s: float, num_bytes: int) -> None:
        """Reads were under way for so long, and so many bytes arrived."""
        self.counters.now.read_busy_s += busy_s
        self.counters.now.read_bytes += num_bytes

    def count_wait(self, stall_s: float) -> None:
        """The computation has waited for a load."""
        self._stalled_s += stall_s
        self.counters.now.stall_s += stall_s

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
            for meter in self.meters:
                meter.spend(spent.wall_s, spent.num_events, spent.stall_s)

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
        self.drain()
        self.runner.abort()
        self.forget_transfers()
        self._is_clean = True

    @abstractmethod
    def forget_transfers(self) -> None:
        """After ``drain`` and the runner's: nothing is in flight, and no place is noted."""


def _layer_bytes_of(store: ExpertStore) -> dict[int, int | None]:
    """By layer the bytes of each expert's weights; None where they differ."""
    sizes: dict[int, set[int]] = {}
    for key, spec in store.specs.items():
        sizes.setdefault(key.layer, set()).add(spec.weight_bytes)
    return {layer: found.pop() if len(found) == 1 else None for layer, found in sizes.items()}
