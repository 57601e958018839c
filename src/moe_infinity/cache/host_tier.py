"""RAM between the disk and a device: slots that a device copies from."""

from __future__ import annotations

from collections import deque

import torch

from moe_infinity.cache.pinned import PinnedArena
from moe_infinity.cache.transfer import Transfer, TransferEngine, TransferState
from moe_infinity.devices.base import Mark
from moe_infinity.kernels.base import Views
from moe_infinity.kernels.formats import part_views
from moe_infinity.residency.directory import State
from moe_infinity.residency.runner import Settled
from moe_infinity.residency.running import Load
from moe_infinity.residency.shelf import Found, Shelf
from moe_infinity.stats import Counters
from moe_infinity.types import ExpertKey, ExpertSpec, Priority

_FILL_AT_ONCE = 4  # experts that nobody asked for: a demand read waits for a chunk of each


class HostTier:
    """Carries out what a Shelf decides. One thread drives it.

    A slot that copies read from or write to is guarded by a mark: the next who writes to it waits
    for that, a reader thread by itself, a stream without the host.
    """

    def __init__(self, shelf: Shelf, arena: PinnedArena, engine: TransferEngine) -> None:
        self.shelf = shelf
        self.arena = arena
        self._engine = engine
        self._in_flight: dict[ExpertKey, Transfer] = {}
        self._waiting: deque[tuple[ExpertKey, Priority]] = deque()  # for room
        self._dropped: list[ExpertKey] = []  # cancelled before they had a slot
        self._guards: dict[int, Mark] = {}  # by slot
        self._filling: set[ExpertKey] = set()  # in flight without being asked for
        self._to_fill: deque[ExpertKey] = deque()
        self._plan_filling()

    @property
    def is_reading(self) -> bool:
        return bool(self._in_flight)

    def ask(self, key: ExpertKey, priority: Priority, counters: Counters) -> bool:
        """Want ``key``; whether it is here now. If not, ``collect`` will name it."""
        found, load = self.shelf.ask(key)
        if found is Found.HERE:
            counters.now.ram_hits += 1
            return True
        if found is Found.NO_ROOM:
            self._waiting.append((key, priority))
        elif load is not None:
            counters.read(key.layer)
            self._read(load, priority)
        else:
            self._filling.discard(key)
            if priority is Priority.DEMAND:
                self.promote(key)
        return False

    def fill(self, counters: Counters) -> None:
        """Where there is room for every expert, read some of those that nobody asked for yet, while
        the disk has nothing else to do."""
        if self._in_flight:
            return
        for _ in range(min(_FILL_AT_ONCE, len(self._to_fill))):
            load = self.shelf.fetch(self._to_fill.popleft())
            if load is not None:
                counters.read(load.key.layer)
                self._filling.add(load.key)
                self._read(load, Priority.PREFETCH)

    def collect(self, counters: Counters) -> list[Settled]:
        """What was asked for and has arrived, or will not, since the last call."""
        settled = [Settled(key, arrived=False) for key in self._dropped]
        self._dropped.clear()
        for transfer in self._engine.take_settled():
            del self._in_flight[transfer.key]
            was_asked = transfer.key not in self._filling
            self._filling.discard(transfer.key)
            if transfer.state is TransferState.DONE:
                self.shelf.complete(transfer.key)
                settled += [Settled(transfer.key, arrived=True)] if was_asked else []
                continue
            self.shelf.fail(transfer.key)
            if not was_asked:
                continue
            error = transfer.error if transfer.priority is Priority.DEMAND else None
            settled.append(Settled(transfer.key, False, error))
        for _ in range(len(self._waiting)):
            key, priority = self._waiting.popleft()
            if self.ask(key, priority, counters):
                settled.append(Settled(key, arrived=True))
        return settled

    def promote(self, key: ExpertKey) -> None:
        if key in self._in_flight:
            self._engine.promote(self._in_flight[key])
            return
        raised = [(k, Priority.DEMAND if k == key else p) for k, p in self._waiting]
        self._waiting = deque(sorted(raised, key=lambda each: each[1]))

    def cancel(self, key: ExpertKey) -> None:
        """Load no more of what was asked for; ``collect`` will say that it has not arrived."""
        if key in self._in_flight:
            self._engine.cancel(self._in_flight[key])
            return
        self._waiting = deque(each for each in self._waiting if each[0] != key)
        self._dropped.append(key)

    def wait(self) -> float:
        """Until a read has settled; returns the seconds it took."""
        return self._engine.wait_any()

    def source(self, key: ExpertKey) -> tuple[torch.Tensor, Mark | None]:
        """The bytes of a resident expert, and what a copy of them has to wait for."""
        slot = self.shelf.directory.slot(key)
        return self.arena.tensor(slot), self._guards.get(slot)

    def views_of(self, key: ExpertKey, spec: ExpertSpec) -> Views:
        """The parts of a resident expert where they lie; waits for what is copied back there."""
        slot = self.shelf.directory.slot(key)
        guard = self._guards.get(slot)
        if guard is not None:
            guard.wait()
        views = part_views(spec, self.arena.tensor(slot))
        views.on_host = True
        return views

    def guard(self, key: ExpertKey, mark: Mark) -> None:
        """A copy from or to the expert's slot is over when ``mark`` is reached."""
        self._guards[self.shelf.directory.slot(key)] = mark

    def take_back(self, key: ExpertKey) -> tuple[torch.Tensor, Mark | None] | None:
        """Where the bytes of an expert that leaves the device belong, and what their copy has to
        wait for; say that they are ``taken_back``. None: nothing is to be copied."""
        load = self.shelf.take_back(key)
        if load is None:
            return None
        self.arena.buffer(load.slot)
        return self.arena.tensor(load.slot), self._guards.get(load.slot)

    def taken_back(self, key: ExpertKey, mark: Mark) -> None:
        """Their copy is on a stream; it is over when ``mark`` is reached."""
        self.guard(key, mark)
        self.shelf.complete(key)

    def skip_time(self) -> None:
        self._engine.skip_time()

    def take_activity(self) -> tuple[float, int]:
        return self._engine.take_activity()

    def holds(self, key: ExpertKey) -> bool:
        return self.shelf.directory.state(key) is State.RESIDENT

    def drain(self) -> None:
        """Give up every read and everything that waits for room."""
        self._engine.drain()
        for pending in (self._in_flight, self._waiting, self._dropped, self._filling):
            pending.clear()
        self._plan_filling()

    def check_integrity(self) -> None:
        self.shelf.check_integrity()
        in_flight = set(self.shelf.directory.keys_in(State.IN_FLIGHT))
        assert in_flight == self._in_flight.keys(), (
            f"in flight without a transfer, or the reverse: {in_flight ^ self._in_flight.keys()}"
        )

    def close(self) -> None:
        """Copies have to be over."""
        self._engine.close()
        self.drain()
        self.arena.close()

    def _plan_filling(self) -> None:
        directory = self.shelf.directory
        self._to_fill.clear()
        if directory.num_slots >= directory.shape.num_total:
            counts = enumerate(directory.shape.experts_per_layer)
            self._to_fill.extend(ExpertKey(layer, e) for layer, n in counts for e in range(n))

    def _read(self, load: Load, priority: Priority) -> None:
        guard = self._guards.get(load.slot)  # stays: a read that is cancelled waits for nothing
        buffer = self.arena.buffer(load.slot)
        after = None if guard is None or guard.is_reached() else guard.wait
        self._in_flight[load.key] = self._engine.submit(load.key, buffer, priority, after)
