"""Serves events: the order in which things are looked up, loaded, awaited and computed.

The live cache and the simulator drive this same object; they differ in the Carrier they give it.
Everything that depends on time comes in through ``Carrier.collect``: who replays what it returned
gets the same decisions.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import ClassVar, NamedTuple

import numpy as np
from numpy.typing import NDArray

from moe_infinity.predictors.base import Embeddings, Foresight, TokenIds
from moe_infinity.residency.directory import State
from moe_infinity.residency.planner import PrefetchPlanner
from moe_infinity.residency.residency import Residency
from moe_infinity.residency.running import Load, Lookup
from moe_infinity.tracing.event import Event
from moe_infinity.types import ExpertKey, Phase, Priority

_NO_KEYS = np.empty(0, dtype=np.int64)
# A miss rule: of the missing members of an event, those to load for it. The others are somebody
# else's to compute, and are loaded behind the event: or what is missed once would be for ever.
ChooseMisses = Callable[[Event, list[ExpertKey]], list[ExpertKey]]


class Settled(NamedTuple):
    """A load that is over. error: what a demand load failed with, raised to the event."""

    key: ExpertKey
    arrived: bool
    error: BaseException | None = None


class Carrier(ABC):
    """Carries out loads and computes experts; live with bytes, in the simulator with a clock."""

    # Of a prompt's experts found in memory as many are computed in one call as have these tokens
    # together, at least one: of few tokens an expert takes no longer than a call does.
    tokens_at_once: ClassVar[int] = 64

    @abstractmethod
    def start(self, loads: list[Load], priority: Priority) -> None:
        """Begin loads; what an evicted key's slot held may be overwritten."""

    @abstractmethod
    def cancel(self, key: ExpertKey) -> None:
        """Load no more of a key in flight; it settles soon, arrived or not."""

    @abstractmethod
    def promote(self, key: ExpertKey) -> None:
        """An event waits for a key that was loaded ahead."""

    @abstractmethod
    def collect(self) -> list[Settled]:
        """Loads that settled since the last call."""

    @abstractmethod
    def wait(self) -> None:
        """Until ``collect`` has something to say."""

    @abstractmethod
    def compute(self, keys: list[ExpertKey]) -> None:
        """Compute resident experts of the running event, in any order."""

    @abstractmethod
    def looks_ahead(self) -> bool:
        """Whether waiting takes enough of the time now for looking ahead to be worth its own."""


class EventRunner:
    """Brings every member of an event to be computed, once each."""

    def __init__(
        self,
        residency: Residency,
        planner: PrefetchPlanner,
        choose_misses: ChooseMisses | None = None,
    ) -> None:
        self.residency = residency
        self.planner = planner
        self.choose_misses = choose_misses
        self._pending: list[ExpertKey] = []  # members of the event that have a slot, uncomputed
        self._found: set[ExpertKey] = set()  # of them, those here or on their way when looked up

    def begin_request(self) -> None:
        self.residency.policy.begin_request()
        self.planner.predictor.begin_request()

    def end_request(self) -> None:
        self.residency.policy.end_request()
        self.planner.predictor.end_request()

    def begin_pass(
        self,
        phase: Phase,
        carrier: Carrier,
        embeddings: Embeddings = None,
        token_ids: TokenIds = None,
    ) -> None:
        """A forward pass starts: load ahead what its tokens alone say of its first layers."""
        self.residency.begin_pass(phase)
        if phase == "prefill":
            self.residency.room.protect(_NO_KEYS)
        self.planner.predictor.begin_pass(phase, embeddings, token_ids)
        if phase == "decode" and carrier.looks_ahead():
            self.take_in(carrier)
            self._load_ahead(self.residency.directory.shape.num_layers - 1, phase, carrier)

    def run(
        self, event: Event, carrier: Carrier, foreseen: NDArray[np.float32] | None = None
    ) -> None:
        """Serve one event whole: residents are computed first, arrivals as they come.

        foreseen: [T, D, E] what the next layers' routers say to this event's router input.
        """
        self.take_in(carrier)
        if not self._looks_ahead(carrier):
            self.residency.room.protect(_NO_KEYS)
            if served := self.residency.serve_hits([event]):
                self._learn_hit(event, served[0], carrier)
                carrier.compute(served[0].hits)
                return
        found = self.residency.begin_event(event)
        if self.residency.policy.wants_forecast:
            self._learn(event, found, foreseen, carrier)
            self.residency.advise(self.planner.forecast())
        skipped: set[ExpertKey] = set()
        if self.choose_misses is not None:
            skipped = set(found.misses).difference(self.choose_misses(event, found.misses))
            self.residency.skip(skipped)
        for key in found.disproved:
            carrier.cancel(key)
        for key in found.late:
            carrier.promote(key)
        self._pending = sorted(found.hits + found.late)
        self._found = set(self._pending)
        self._admit(carrier)
        if not self.residency.policy.wants_forecast:  # while the disk works
            self._learn(event, found, foreseen, carrier)
        self._load_ahead(event.layer, event.phase, carrier)
        self._serve(event, carrier)
        self.residency.end_event()
        behind = self.residency.prefetch(sorted(skipped), event.layer)
        if behind:
            carrier.start(behind, Priority.PREFETCH)

    def run_hits(self, events: Sequence[Event], carrier: Carrier) -> bool:
        """Serve decode events whose members were computed before, load nothing ahead; whether all
        of them only hit. If not, nothing was done."""
        self.take_in(carrier)
        looks_ahead = self._looks_ahead(carrier)
        if looks_ahead and self.outlook is None:
            return False
        if not looks_ahead:
            self.residency.room.protect(_NO_KEYS)
        served = self.residency.serve_hits(events)
        for event, found in zip(events, served or (), strict=served is not None):
            self._learn_hit(event, found, carrier)
        return served is not None

    def foresee(
        self,
        layer: int,
        phase: Phase,
        scores: NDArray[np.float32],
        carrier: Carrier,
        chosen: Sequence[ExpertKey] = (),
    ) -> None:
        """What the next layers' routers say [T, D, E] to a layer's router input or output. Its
        event was run; or its members are ``chosen`` and here, and it will be told as a hit."""
        if not carrier.looks_ahead():
            return
        self.take_in(carrier)
        self.planner.predictor.foresee(layer, scores)
        with self.residency.directory.pinned(chosen):
            self._load_ahead(layer, phase, carrier)

    @property
    def outlook(self) -> Foresight | None:
        """The planner's, where the policy needs no more than that."""
        return None if self.residency.policy.wants_forecast else self.planner.outlook

    def is_quiet(self, carrier: Carrier) -> bool:
        """Whether an event that only hits changes no slot: nobody looks ahead now."""
        return not self._looks_ahead(carrier)

    def abort(self) -> None:
        """Give up the running event; every transfer has to be over."""
        self.residency.abort_event()
        self._pending.clear()
        self._found.clear()

    def _learn_hit(self, event: Event, found: Lookup, carrier: Carrier) -> None:
        self.planner.observe(event, found)
        for key in found.disproved:
            carrier.cancel(key)

    def _learn(
        self,
        event: Event,
        found: Lookup,
        foreseen: NDArray[np.float32] | None,
        carrier: Carrier,
    ) -> None:
        self.planner.observe(event, found)
        if foreseen is not None and carrier.looks_ahead():
            self.planner.predictor.foresee(event.layer, foreseen)

    def _serve(self, event: Event, carrier: Carrier) -> None:
        """Until every member that was begun, or waits for a slot, is computed."""
        while not self.residency.is_done:
            self.take_in(carrier)
            self._admit(carrier)
            ready = self._next_ones(event, carrier) if event.phase == "prefill" else self._ready()
            if not ready:
                self.residency.policy.catch_up()
                carrier.wait()
                continue
            self._pending = [key for key in self._pending if key not in ready]
            carrier.compute(ready)
            for key in ready:
                self.residency.finish(key)

    def _looks_ahead(self, carrier: Carrier) -> bool:
        predictor = self.planner.predictor
        if self.residency.policy.wants_forecast:
            return True
        if predictor.is_silent:
            return False
        return predictor.foresight is None or carrier.looks_ahead()

    def _load_ahead(self, layer: int, phase: Phase, carrier: Carrier) -> None:
        if phase == "prefill":
            return  # it streams the next layer whole
        if self.planner.predictor.foresight is not None and not carrier.looks_ahead():
            self.residency.room.protect(_NO_KEYS)
            return
        coming = self.planner.plan(layer)
        self.residency.room.protect(coming.keep)
        loads = self.residency.prefetch(coming.load, layer)
        if loads:
            carrier.start(loads, Priority.PREFETCH)

    def _admit(self, carrier: Carrier) -> None:
        """Begin what can begin: members first, then what is worth loading ahead."""
        loads = self.residency.admit()
        if loads:
            carrier.start(loads, Priority.DEMAND)
            self._pending += [load.key for load in loads]
        ahead = self.residency.stream_ahead()
        if ahead:
            carrier.start(ahead, Priority.PREFETCH)

    def _ready(self) -> list[ExpertKey]:
        """Members that are here."""
        state = self.residency.directory.state
        return [key for key in self._pending if state(key) is State.RESIDENT]

    def _next_ones(self, event: Event, carrier: Carrier) -> list[ExpertKey]:
        """Of a prompt's members the next in order, so that which slot comes free when does not
        depend on the disk; with it those behind it, of few tokens, that were found when it was
        looked up, here or on their way. Nobody while one of them is not here."""
        group: list[ExpertKey] = []
        num_tokens = 0
        for key in self._pending:
            num_tokens += int(event.counts[key.expert])
            if group and (key not in self._found or num_tokens > carrier.tokens_at_once):
                break
            group.append(key)
            if key not in self._found:
                break
        state = self.residency.directory.state
        return group if all(state(key) is State.RESIDENT for key in group) else []

    def take_in(self, carrier: Carrier) -> None:
        """Make resident what has arrived. Raises the error of a load that an event waits for.

        A member whose prefetch failed, or was cancelled before the router asked for it again, is
        loaded once more on demand.
        """
        error: BaseException | None = None
        for settled in carrier.collect():
            if settled.arrived:
                self.residency.complete(settled.key)
                continue
            self.residency.fail(settled.key)
            if settled.key in self._pending:
                self._pending.remove(settled.key)
            error = error or settled.error
        if error is not None:
            raise error
