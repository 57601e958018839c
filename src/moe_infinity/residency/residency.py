"""What an event makes the cache load and evict: waves, victims, prefill streaming.

Pure decisions: the live tier and the simulator drive this same object, one with bytes and a
clock, the other with neither. Every decision depends on the order of calls, never on time.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from moe_infinity.policies.base import CachePolicy
from moe_infinity.residency.directory import Directory, State
from moe_infinity.residency.room import Room, RoomFinder
from moe_infinity.residency.running import Load, Lookup, Running
from moe_infinity.stats import Counters
from moe_infinity.tracing.event import Event
from moe_infinity.types import ExpertKey, Phase

# The next layer's experts are streamed ahead when this share of the current layer was needed.
_STREAM_AHEAD_COVERAGE = 0.75


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
        self.room = RoomFinder(directory, policy)
        self._running: Running | None = None
        self._pass = 0
        self._layer = -1  # of the last event in this pass
        self._following: dict[int, int] = {}  # layer: the one that ran after it last time
        layers = directory.class_of_layer
        self._quota = [
            slots // max(1, layers.count(c)) for c, slots in enumerate(directory.slots_per_class)
        ]

    def begin_pass(self, phase: Phase) -> None:
        self.counters.phase = phase
        self._pass += 1
        self._layer = -1
        # Some layers do not run in every pass (an encoder's, another modality's): what was loaded
        # ahead for those would otherwise be waited for without end.
        for key in [key for key, due in self.room.ahead.items() if due < self._pass]:
            del self.room.ahead[key]
            self.counters.waste(key.layer)
        self.policy.begin_pass(phase)

    def serve_hits(self, events: Sequence[Event]) -> list[Lookup] | None:
        """Whole decode events at once, if all of their members are here: the same as begin_event to
        end_event of each. None: nothing was done."""
        if any(event.phase != "decode" for event in events):
            return None
        members = [self.directory.flats(event.layer, event.experts) for event in events]
        if not all(map(self.directory.are_resident, members)):
            return None
        found = []
        for event in events:
            self._notice(event)
            disproved = self._settle_ahead(event.layer, event.keys)
            self.room.leave_ring(event.keys)
            found.append(Lookup(event.keys, [], [], disproved))
        self.counters.look_up(sum(map(len, members)), 0, 0)
        return found

    def begin_event(self, event: Event) -> Lookup:
        """Look all members up, pin those that are here, tell the policy. Evicts nothing."""
        self._notice(event)
        misses, late, hits = self.directory.by_state(
            event.keys, self.directory.flats(event.layer, event.experts)
        )
        for key in hits + late:
            self.directory.pin(key)
        self.counters.look_up(len(hits), len(late), len(misses))
        disproved = self._settle_ahead(event.layer, hits + late)
        run = Running(event, event.phase == "prefill", deque(misses))
        run.wave = hits + late
        run.uncomputed = len(run.wave)
        self._running = run
        if run.streaming:
            self._keep_hottest(run)
        else:
            self.room.leave_ring(run.wave)
        return Lookup(hits, late, misses, disproved)

    def advise(self, forecast: NDArray[np.float64] | None) -> None:
        """Tell the policy what is foreseen, [W, L, E]; before the running event's victims go."""
        if forecast is not None:
            self.policy.on_forecast(forecast)

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

    def clear(self, slots: Collection[int] | None = None) -> None:
        """Evict what is in these slots, or in all; between events, with nothing pinned."""
        for key in self.directory.keys_in(State.RESIDENT):
            if slots is None or self.directory.slot(key) in slots:
                self._evict(key)

    def abort_event(self) -> None:
        """Give up the running event and every load; all transfers have to be over. Nothing stays
        pinned, in flight or protected, wherever the exception struck that led here."""
        for key in self.room.ahead:
            self.counters.waste(key.layer)
        for key in self.directory.abandon():
            self.policy.on_evict(key)
        self.room.reset()
        self._running = None

    def complete(self, key: ExpertKey) -> None:
        self.directory.complete(key)

    def fail(self, key: ExpertKey) -> None:
        """A load failed or was cancelled; what the running event needs waits to be loaded anew."""
        self.directory.fail(key)
        self._forget(key)
        run = self._running
        if run is not None and key in run.wave:
            run.wave.remove(key)
            run.uncomputed -= 1
            run.waiting = deque(sorted([*run.waiting, key]))
            if not run.streaming and run.uncomputed == 0:
                self._release(run)

    def stream_ahead(self) -> list[Load]:
        """Begin loads of the next layer's experts behind the running prefill event."""
        run = self._running
        if run is None or not run.streaming or run.waiting:
            return []
        layer = self._following.get(run.event.layer, run.event.layer + 1)
        shape = self.directory.shape
        if not run.event.layer < layer < shape.num_layers or not self._covers_most(run.event):
            return []
        coming = (ExpertKey(layer, e) for e in range(shape.experts_per_layer[layer]))
        return self._begin_ahead(coming, lambda key: self.room.in_ring(key, spare_ahead=True))

    def prefetch(self, keys: Iterable[ExpertKey], layer: int) -> list[Load]:
        """Begin loads of keys a predictor asked for, as far as a ring's worth of slots goes."""
        chosen: dict[int, deque[ExpertKey]] = {}  # by size class: all at once, for it costs

        def find_room(key: ExpertKey) -> Room | None:
            size_class = self.directory.class_of(key)
            if self.directory.num_free(size_class):
                return Room(None)
            if size_class not in chosen:
                most = self.room.ring_slots[size_class]
                chosen[size_class] = self.room.victims(size_class, most, layer, spare_ahead=True)
            victims = chosen[size_class]
            return Room(victims.popleft()) if victims else None

        return self._begin_ahead(keys, find_room)

    def _begin_ahead(
        self, keys: Iterable[ExpertKey], find_room: Callable[[ExpertKey], Room | None]
    ) -> list[Load]:
        loads: list[Load] = []
        waiting = self._running.waiting if self._running else ()
        for key in keys:
            if self.room.spares_none(self.directory.class_of(key)):
                continue
            if self.directory.state(key) is not State.ABSENT or key in waiting:
                continue
            room = find_room(key)
            if room is None:
                break
            self.room.ahead[key] = self._pass + (key.layer <= self._layer)
            loads.append(self._begin(key, room.victim, proactive=True))
        return loads

    def _notice(self, event: Event) -> None:
        assert self._running is None, "the previous event was not ended"
        self.policy.on_event(event)
        if event.layer > self._layer:
            self._following[self._layer] = event.layer
        self._layer = event.layer

    def _settle_ahead(self, layer: int, members: Sequence[ExpertKey]) -> list[ExpertKey]:
        """The router has spoken on ``layer``: what was loaded ahead for it is used or wasted."""
        in_flight: list[ExpertKey] = []
        for key in sorted(key for key in self.room.ahead if key.layer == layer):
            del self.room.ahead[key]
            if key not in members:
                self.counters.waste(layer)
                if self.directory.state(key) is State.IN_FLIGHT:
                    in_flight.append(key)
        return in_flight

    def _covers_most(self, event: Event) -> bool:
        total = self.directory.shape.experts_per_layer[event.layer]
        return len(event.experts) >= _STREAM_AHEAD_COVERAGE * total

    def _admit_wave(self, run: Running) -> list[Load]:
        """One wave at a time: victims must not depend on which member was computed first."""
        if run.wave_begun and run.uncomputed:
            return []
        run.wave_begun = True
        size_class = self.directory.class_of_layer[run.event.layer]
        num_free = self.directory.num_free(size_class)
        wanted = len(run.waiting)
        victims = self.room.victims(size_class, max(0, wanted - num_free), run.event.layer)
        loads = []
        for _ in range(min(wanted, num_free + len(victims))):
            victim = None if self.directory.num_free(size_class) else victims.popleft()
            loads.append(self._begin(run.waiting.popleft(), victim))
        return loads

    def _admit_stream(self, run: Running) -> list[Load]:
        loads: list[Load] = []
        size_class = self.directory.class_of_layer[run.event.layer]
        while run.waiting:
            key = run.waiting[0]
            keeps_slot = key in run.keepers and self.directory.num_free(size_class) > 0
            room = Room(None) if keeps_slot else self.room.in_ring(key, spare_ahead=False)
            if room is None:
                break
            loads.append(self._begin(run.waiting.popleft(), room.victim))
        return loads

    def _begin(self, key: ExpertKey, victim: ExpertKey | None, proactive: bool = False) -> Load:
        if victim is not None:
            self._evict(victim)
        slot = self.directory.begin_load(key)
        self.policy.on_insert(key)
        self.counters.load(key.layer, proactive)
        return Load(key, slot, victim, proactive)

    def _evict(self, key: ExpertKey) -> None:
        self.directory.evict(key)
        self._forget(key)

    def _forget(self, key: ExpertKey) -> None:
        """``key`` has lost its slot."""
        if key in self.room.ahead:
            self.counters.waste(key.layer)
        self.room.forget(key)
        self.policy.on_evict(key)

    def _keep_hottest(self, run: Running) -> None:
        """While slots are free, the layer's most routed-to experts keep theirs (fair share)."""
        layer = run.event.layer
        size_class = self.directory.class_of_layer[layer]
        most = min(self._quota[size_class], self.directory.num_free(size_class))
        hottest = np.argsort(-run.event.counts, kind="stable")[:most]
        run.keepers = {ExpertKey(layer, int(e)) for e in hottest if run.event.counts[e]}
        self.room.leave_ring(run.keepers)

    def _release(self, run: Running) -> None:
        for key in run.wave:
            self.directory.unpin(key)
        run.wave.clear()
