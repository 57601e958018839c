"""RAM beneath a device: who writes to a slot waits for whoever still copies to or from it."""

import torch

from moe_infinity.cache.host_tier import HostTier
from moe_infinity.cache.pinned import PinnedArena
from moe_infinity.cache.transfer import TransferEngine
from moe_infinity.checkpoint.direct_io import ALIGNMENT_BYTES as PAGE
from moe_infinity.devices.simulated import SimulatedDevice
from moe_infinity.residency.shelf import Shelf
from moe_infinity.types import ExpertKey, Priority
from support.routing import grid, new_residency
from support.stores import (
    ScriptedStore,
    TurnedClock,
    expected_parts,
    found_parts,
    memory_store,
    wait_until,
)

SHAPE = grid(1, 8, top_k=2)
STORE = memory_store(SHAPE)
BUSY, BACK, DROPPED, WANTED = (ExpertKey(0, expert) for expert in range(4))


def test_a_cancelled_read_leaves_what_guards_its_slot() -> None:
    device = SimulatedDevice(1e-3, TurnedClock())
    store, counters = ScriptedStore(STORE), new_residency(SHAPE, [2]).counters
    below = new_residency(SHAPE, [2])
    arena = PinnedArena((2,), (STORE.slot_bytes,), device)
    host = HostTier(
        Shelf(below.directory, below.policy), arena, TransferEngine(store, 1, chunk_bytes=PAGE)
    )
    try:
        store.hold(BUSY)  # the only reader thread is kept from the others
        assert not host.ask(BUSY, Priority.PREFETCH, counters)
        store.wait_for_reads(1)
        place = host.take_back(BACK)
        assert place is not None
        down = device.new_stream("down")
        down.copy(place[0], torch.zeros(STORE.slot_bytes, dtype=torch.uint8))
        host.taken_back(BACK, down.mark())
        assert not host.ask(DROPPED, Priority.PREFETCH, counters)  # in the place of BACK
        host.cancel(DROPPED)
        assert [each.arrived for each in host.collect(counters)] == [False]
        assert not host.ask(WANTED, Priority.DEMAND, counters)
        store.release(BUSY)
        arrived: list[ExpertKey] = []
        wait_until(
            lambda: arrived.extend(e.key for e in host.collect(counters)) or WANTED in arrived
        )
        device.close()  # whatever was on its way has come
        views = host.views_of(WANTED, STORE.specs[WANTED])
        assert found_parts(views) == expected_parts(STORE, WANTED)
        host.check_integrity()
    finally:
        host.close()


def test_what_nobody_asked_for_is_read_where_there_is_room() -> None:
    device = SimulatedDevice(24.0, TurnedClock())
    below = new_residency(SHAPE, [8])
    counters = new_residency(SHAPE, [8]).counters
    arena = PinnedArena((8,), (STORE.slot_bytes,), device)
    engine = TransferEngine(STORE, 2, chunk_bytes=PAGE)
    host = HostTier(Shelf(below.directory, below.policy), arena, engine)
    try:
        assert not host.ask(WANTED, Priority.DEMAND, counters)
        told = []
        while not all(map(host.holds, STORE.specs)):
            host.fill(counters)
            if host.is_reading:
                host.wait()
            told += host.collect(counters)
        assert [each.key for each in told] == [WANTED]
        assert counters.now.disk_loads == 8
        host.check_integrity()
    finally:
        host.close()
