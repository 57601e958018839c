"""What an event makes the cache load and evict: waves, victims, prefill streaming.

Pure decisions: the live tier and the simulator drive this same object, one with bytes and a
clock, the other with neither. Every decision depends on the order of calls, never on time.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from moe_infinity.policies.base import CachePolicy
from moe_infinity.residency.directory import Directory, State
from moe_infinity.stats import Counters
from moe_infinity.tracing.event import Event
from moe_infinity.types import ExpertKey, Phase

# Prefill streams through at most this many slots, and never through more than an eighth of them:
# a few reads in flight keep an SSD busy, the rest stays with what decode has warmed.
_MAX_RING_SLOTS = 16
_RING_SHARE = 8
# The next layer's experts are streamed ahead when this share of the current layer was needed.
_STREAM_AHEAD_COVERAGE = 0.75


@dataclass(frozen=True, slots=True)
class Load:
    """A load that has begun: its slot is taken, the bytes have yet to arrive."""

    key: ExpertKey
    slot: int
    victim: ExpertKey | None
    proactive: bool = False


@dataclass(slots=True)
class Lookup:
    """How an event's members were found, before anything was evicted for it."""

    hits: list[ExpertKey]
    late: list[ExpertKey]  # joined: their loads were in flight already
    misses: list[ExpertKey]
    disproved: list[ExpertKey]  # in flight ahead of this layer, but not routed to: cancel them


class _Victim(NamedTuple):
    """Room for a load: the key to evict for it, None where a slot is free."""

    key: ExpertKey | None


@dataclass(slots=True)
class _Running:
    """The event being served."""

    event: Event
    streaming: bool
    waiting: deque[ExpertKey]  # misses that have no slot yet, ascending
    keepers: set[ExpertKey] = field(default_factory=set)
    wave: list[ExpertKey] = field(default_factory=list)  # pinned
    uncomputed: int = 0  # members of the wave still to compute
    wave_begun: bool = False


class Residency:
    """Drives one Directory and one CachePolicy through events.

    Decode: an event is looked up whole; misses are admitted by ascending id, in waves if they do
    not fit at once; nothing of a wave is released before all of it was computed.
    Prefill: an event touches most of a layer, so misses stream through a small ring of slots in
    ascending order and leave the other residents alone; while there are free slots, the experts
    most routed to keep theirs, up to the layer's fair share.
    """

    def __init__(self, directory: Directory, policy: CachePolicy, counters: Counters) -> None:
        self.directory = directory
        self.policy = policy
        self.counters = counters
        shares = [max(1, slots // _RING_SHARE) for slots in directory.slots_per_class]
        self.ring_slots = [min(_MAX_RING_SLOTS, share) for share in shares]
        self._rings: list[deque[ExpertKey]] = [deque() for _ in shares]
        self._proactive: set[ExpertKey] = set()  # loaded ahead, neither used nor disproved yet
        self._running: _Running | None = None
        layers = directory.class_of_layer
        self._quota = [
            slots // max(1, layers.count(c)) for c, slots in enumerate(directory.slots_per_class)
        ]

    def begin_pass(self, phase: Phase) -> None:
        self.counters.phase = phase
        self.policy.begin_pass(phase)

    def begin_event(self, event: Event) -> Lookup:
        """Look all members up, pin those that are here, tell the policy. Evicts nothing."""
        assert self._running is None, "the previous event was not ended"
        self.policy.on_event(event)
        found: dict[State, list[ExpertKey]] = {state: [] for state in State}
        for key in event.keys:
            found[self.directory.state(key)].append(key)
        hits, late, misses = found[State.RESIDENT], found[State.IN_FLIGHT], found[State.ABSENT]
        for key in hits + late:
            self.directory.pin(key)
        self.counters.look_up(len(hits), len(late), len(misses))
        disproved = self._settle_proactive(event.layer, set(hits + late))
        run = _Running(event, event.phase == "prefill", deque(misses))
        run.wave = hits + late
        run.uncomputed = len(run.wave)
        self._running = run
        if run.streaming:
            self._keep_hottest(run)
        else:
            self._leave_ring(run.wave)
        return Lookup(hits, late, misses, disproved)

    def skip(self, keys: set[ExpertKey]) -> None:
        """Do not load these misses of the running event: a miss rule leaves them out."""
        run = self._running
        assert run is not None, "no event is running"
        run.waiting = deque(key for key in run.waiting if key not in keys)

    def admit(self) -> list[Load]:
        """Begin the loads that can begin now, ascending; call again after each ``finish``."""
        run = self._running
        assert run is not None, "no event is running"
        if not run.waiting:
            return []
        loads = self._admit_stream(run) if run.streaming else self._admit_wave(run)
        for load in loads:
            self.directory.pin(load.key)
            run.wave.append(load.key)
        run.uncomputed += len(loads)
        return loads

    def finish(self, key: ExpertKey) -> None:
        """``key`` was computed for the running event."""
        run = self._running
        assert run is not None, "no event is running"
        run.uncomputed -= 1
        if run.streaming:
            run.wave.remove(key)
            self.directory.unpin(key)
        elif run.uncomputed == 0:
            self._release(run)

    @property
    def is_done(self) -> bool:
        """Whether every member of the running event was computed."""
        run = self._running
        return run is None or (run.uncomputed == 0 and not run.waiting)

    def end_event(self) -> None:
        assert self.is_done, "the event has members left to compute"
        self._running = None

    def abort_event(self) -> None:
        """Give up the running event: pins go, nothing loaded ahead is protected any longer."""
        if self._running is not None:
            self._release(self._running)
        self._running = None
        for key in self._proactive:
            self.counters.waste(key.layer)
        self._proactive.clear()

    def complete(self, key: ExpertKey) -> None:
        self.directory.complete(key)

    def fail(self, key: ExpertKey) -> None:
        """A load failed or was cancelled."""
        run = self._running
        if run is not None and key in run.wave:
            run.wave.remove(key)
            run.uncomputed -= 1
        self.directory.fail(key)
        self._forget(key)

    def stream_ahead(self) -> list[Load]:
        """Begin loads of the next layer's experts behind the running prefill event."""
        run = self._running
        if run is None or not run.streaming or run.waiting:
            return []
        layer = run.event.layer + 1
        shape = self.directory.shape
        if layer >= shape.num_layers or not self._covers_most(run.event):
            return []
        coming = (ExpertKey(layer, e) for e in range(shape.experts_per_layer[layer]))
        return self._begin_proactive(coming, self._ring_victim)

    def prefetch(self, keys: Iterable[ExpertKey], layer: int) -> list[Load]:
        """Begin loads of keys a predictor asked for, as far as a ring's worth of slots goes."""
        return self._begin_proactive(keys, lambda key: self._policy_victim(key, layer))

    def _begin_proactive(
        self, keys: Iterable[ExpertKey], find_victim: Callable[[ExpertKey], _Victim | None]
    ) -> list[Load]:
        loads: list[Load] = []
        for key in keys:
            ring_slots = self.ring_slots[self.directory.class_of_layer[key.layer]]
            if ring_slots < 2 or len(self._proactive) >= ring_slots:
                break
            if self.directory.state(key) is not State.ABSENT:
                continue
            found = find_victim(key)
            if found is None:
                break
            self._proactive.add(key)
            loads.append(self._begin(key, found.key, proactive=True))
        return loads

    def _settle_proactive(self, layer: int, members: set[ExpertKey]) -> list[ExpertKey]:
        """The router has spoken on ``layer``: what was loaded ahead for it is used or wasted."""
        in_flight = []
        for key in sorted(key for key in self._proactive if key.layer == layer):
            self._proactive.discard(key)
            if key not in members:
                self.counters.waste(layer)
                if self.directory.state(key) is State.IN_FLIGHT:
                    in_flight.append(key)
        return in_flight

    def _covers_most(self, event: Event) -> bool:
        total = self.directory.shape.experts_per_layer[event.layer]
        return len(event.experts) >= _STREAM_AHEAD_COVERAGE * total

    def _admit_wave(self, run: _Running) -> list[Load]:
        """One wave at a time: victims must not depend on which member was computed first."""
        if run.wave_begun and run.uncomputed:
            return []
        run.wave_begun = True
        size_class = self.directory.class_of_layer[run.event.layer]
        num_free = self.directory.num_free(size_class)
        wanted = len(run.waiting)
        victims = self._victims(size_class, max(0, wanted - num_free), run.event.layer)
        loads = []
        for _ in range(min(wanted, num_free + len(victims))):
            victim = None if self.directory.num_free(size_class) else victims.popleft()
            loads.append(self._begin(run.waiting.popleft(), victim))
        return loads

    def _admit_stream(self, run: _Running) -> list[Load]:
        loads: list[Load] = []
        while run.waiting:
            key = run.waiting[0]
            keeps_slot = key in run.keepers and self.directory.num_free(self._class(key)) > 0
            found = _Victim(None) if keeps_slot else self._ring_victim(key)
            if found is None:
                break
            loads.append(self._begin(run.waiting.popleft(), found.key))
        return loads

    def _ring_victim(self, key: ExpertKey) -> _Victim | None:
        """Room for a streamed expert, which joins the ring: a computed member of the ring, or,
        while the ring is short, a free slot or the policy's victim. None: wait."""
        size_class = self._class(key)
        ring = self._rings[size_class]
        victim: ExpertKey | None = None
        if len(ring) >= self.ring_slots[size_class]:
            victim = next((k for k in ring if self._is_reusable(k)), None)
            if victim is None:
                return None
        elif not self.directory.num_free(size_class):
            victims = self._victims(size_class, 1, key.layer)
            if not victims:
                return None
            victim = victims[0]
        if victim in ring:
            ring.remove(victim)
        ring.append(key)
        return _Victim(victim)

    def _policy_victim(self, key: ExpertKey, layer: int) -> _Victim | None:
        size_class = self._class(key)
        if self.directory.num_free(size_class):
            return _Victim(None)
        victims = self._victims(size_class, 1, layer)
        return _Victim(victims[0]) if victims else None

    def _victims(self, size_class: int, count: int, layer: int) -> deque[ExpertKey]:
        """Up to ``count`` keys to evict: what only streamed through, then by the policy's word;
        what was loaded ahead and not yet used goes only when nothing else is left."""
        if count == 0:
            return deque()
        loose = self.directory.evictable(size_class)
        passing = [k for k in self._rings[size_class] if self._is_reusable(k)][:count]
        ahead = [k for k in sorted(self._proactive) if self._is_evictable(k, size_class)]
        spoken_for = [self.directory.flat(k) for k in (*passing, *ahead)]
        others = np.setdiff1d(loose, spoken_for, assume_unique=True)
        wanted = min(count - len(passing), len(others))
        chosen = self.policy.victims(others, wanted, layer) if wanted > 0 else []
        ranked = passing + [self.directory.key(flat) for flat in chosen]
        return deque(ranked + ahead[: count - len(ranked)])

    def _begin(self, key: ExpertKey, victim: ExpertKey | None, proactive: bool = False) -> Load:
        if victim is not None:
            self._evict(victim)
        slot = self.directory.begin_load(key)
        self.policy.on_insert(key)
        self.counters.load(key.layer, proactive)
        return Load(key, slot, victim, proactive)

    def _evict(self, key: ExpertKey) -> None:
        if key in self._proactive:
            self.counters.waste(key.layer)
        self.directory.evict(key)
        self._forget(key)
        self.policy.on_evict(key)

    def _forget(self, key: ExpertKey) -> None:
        self._proactive.discard(key)
        self._leave_ring([key])

    def _leave_ring(self, keys: Iterable[ExpertKey]) -> None:
        for key in keys:
            ring = self._rings[self._class(key)]
            if key in ring:
                ring.remove(key)

    def _keep_hottest(self, run: _Running) -> None:
        """While slots are free, the layer's most routed-to experts keep theirs (fair share)."""
        layer = run.event.layer
        size_class = self.directory.class_of_layer[layer]
        room = min(self._quota[size_class], self.directory.num_free(size_class))
        hottest = np.argsort(-run.event.counts, kind="stable")[:room]
        run.keepers = {ExpertKey(layer, int(e)) for e in hottest if run.event.counts[e]}
        self._leave_ring(run.keepers)

    def _release(self, run: _Running) -> None:
        for key in run.wave:
            self.directory.unpin(key)
        run.wave.clear()

    def _is_evictable(self, key: ExpertKey, size_class: int) -> bool:
        flat = self.directory.flat(key)
        loose = self.directory.states[flat] == State.RESIDENT and self.directory.pins[flat] == 0
        return bool(loose) and self._class(key) == size_class

    def _is_reusable(self, key: ExpertKey) -> bool:
        return key not in self._proactive and self._is_evictable(key, self._class(key))

    def _class(self, key: ExpertKey) -> int:
        return self.directory.class_of_layer[key.layer]
