"""The device tier over RAM: right bytes whatever the link does, capacities that add up."""

import mmap
import weakref
from collections.abc import Iterable

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from moe_infinity.cache.device_memory import DeviceMemory
from moe_infinity.cache.vram import VramHierarchy
from moe_infinity.checkpoint.direct_io import allocate
from moe_infinity.devices.simulated import SimulatedDevice
from moe_infinity.errors import BudgetError, ReadError
from moe_infinity.residency.directory import State
from moe_infinity.tracing.event import Event
from moe_infinity.types import ExpertKey, Phase, Priority
from support.guesses import Guesses
from support.routing import event, grid
from support.stores import (
    ScriptedStore,
    TurnedClock,
    memory_store,
    run_checked,
    vram_hierarchy,
)

SHAPE = grid(3, 24, top_k=3)
STORE = memory_store(SHAPE)
TOTAL = SHAPE.num_total
SLOT_BYTES = STORE.slot_bytes
SLOW_GBPS = SLOT_BYTES / 1e9  # one expert a second


def run(hierarchy: VramHierarchy, each: Event) -> list[ExpertKey]:
    return run_checked(hierarchy, each, STORE)


def random_events(seed: int, count: int) -> Iterable[Event]:
    """Layers in any order, several times in a row, decode and prefill."""
    rng = np.random.default_rng(seed)
    for step in range(count):
        layer = int(rng.integers(3))
        phase: Phase = "prefill" if rng.random() < 0.3 else "decode"
        size = int(rng.integers(18, 25)) if phase == "prefill" else int(rng.integers(1, 6))
        chosen = rng.choice(24, size, replace=False)
        yield event(layer, sorted(chosen.tolist()), 24, phase, step)


def decode(layer: int, *experts: int) -> Event:
    return event(layer, list(experts), 24, "decode", 0)


# A load that gets another slot than its victim had, for one is free.
@example(40, 24, 2, 24.0, "next_use", True, 141)
@settings(max_examples=25)
@given(
    num_slots=st.sampled_from([1, 5, 16, 24, 40, 72]),
    num_ram_slots=st.sampled_from([1, 2, 7, 24, 40, 72]),
    num_spare=st.integers(0, 3),
    link_gbps=st.sampled_from([SLOW_GBPS, 24.0]),
    policy=st.sampled_from(["next_use", "lru"]),
    guessing=st.booleans(),
    seed=st.integers(0, 999),
)
def test_compute_gets_the_right_bytes(
    num_slots: int,
    num_ram_slots: int,
    num_spare: int,
    link_gbps: float,
    policy: str,
    guessing: bool,
    seed: int,
) -> None:
    rng = np.random.default_rng(seed)
    clock = TurnedClock()
    device = SimulatedDevice(link_gbps, clock)
    guesses = Guesses(SHAPE, rng) if guessing else None
    slots = (num_slots, num_ram_slots, policy, guesses, device)
    with vram_hierarchy(SHAPE, STORE, *slots, num_spare=num_spare) as hierarchy:
        hierarchy.begin_request()
        for each in random_events(seed, 25):
            hierarchy.begin_pass(each.phase)
            run(hierarchy, each)
            clock.at_s += float(rng.choice([0.0, 0.3, 2.0]))
        hierarchy.end_request()
        assert not hierarchy.residency.directory.pins.any()


@pytest.mark.parametrize("num_slots", [12, 24, 48])
def test_capacities_add_up(num_slots: int) -> None:
    """Once everything lies in one of both tiers, nothing is read from the disk again."""
    with vram_hierarchy(SHAPE, STORE, num_slots, TOTAL - num_slots + 4) as hierarchy:
        events = [decode(layer, e, e + 1, e + 2) for layer in range(3) for e in range(0, 24, 3)]
        for each in events:
            run(hierarchy, each)
        counters = hierarchy.counters.decode
        assert counters.disk_loads == TOTAL
        assert counters.demoted_bytes > 0
        for each in events * 2:
            run(hierarchy, each)
        assert counters.disk_loads == TOTAL
        assert counters.ram_hits > 0


def test_what_ram_holds_whole_is_never_copied_back() -> None:
    with vram_hierarchy(SHAPE, STORE, 12, TOTAL) as hierarchy:
        for each in random_events(1, 40):
            run(hierarchy, each)
        counters = hierarchy.counters
        assert counters.decode.demoted_bytes == counters.prefill.demoted_bytes == 0
        assert counters.decode.disk_loads + counters.prefill.disk_loads <= TOTAL


def test_what_is_still_on_its_way_back_is_waited_for() -> None:
    device = SimulatedDevice(SLOW_GBPS, TurnedClock())
    with vram_hierarchy(SHAPE, STORE, 3, 4, device=device, num_spare=3) as hierarchy:
        run(hierarchy, decode(0, 0, 1, 2))
        device._busy_until_s["down"] = 100.0
        run(hierarchy, decode(0, 3, 4, 5))
        back = [e for e in (0, 1, 2) if hierarchy.tier_of(ExpertKey(0, e)) == "ram"]
        assert back and hierarchy.counters.decode.demoted_bytes
        run(hierarchy, decode(0, *back))


def test_no_decision_depends_on_the_link() -> None:
    def decisions(link_gbps: float) -> list[list[int]]:
        device = SimulatedDevice(link_gbps, TurnedClock())
        with vram_hierarchy(SHAPE, STORE, 16, TOTAL, "next_use", device=device) as hierarchy:
            for key in STORE.specs:  # nothing waits for the disk
                hierarchy.host.ask(key, Priority.DEMAND, hierarchy.counters)
                hierarchy.wait()
                assert [each.key for each in hierarchy.host.collect(hierarchy.counters)] == [key]
                hierarchy.host.shelf.given_back(key)
            taken = []
            for each in random_events(3, 40):
                run(hierarchy, each)
                taken.append(hierarchy.resident_flat())
            return taken

    assert decisions(SLOW_GBPS) == decisions(1000.0)


def test_a_demand_copy_waits_for_two_chunks_of_a_prefetch_at_most() -> None:
    clock = TurnedClock()
    device = SimulatedDevice(SLOW_GBPS, clock)
    guesses = Guesses(SHAPE)
    with vram_hierarchy(SHAPE, STORE, 40, TOTAL, predictor=guesses, device=device) as hierarchy:
        for key in STORE.specs:
            hierarchy.host.ask(key, Priority.DEMAND, hierarchy.counters)
            hierarchy.wait()
            hierarchy.host.collect(hierarchy.counters)
            hierarchy.host.shelf.given_back(key)
        guesses.wanted = {ExpertKey(1, 1), ExpertKey(1, 2)}
        hierarchy.begin_pass("decode")
        run(hierarchy, decode(0, 0))  # 1 s for its own; both are asked for behind it
        before_s, chunk_s = clock.at_s, hierarchy.memory.uploads.chunk_bytes / SLOT_BYTES
        run(hierarchy, decode(2, 5))
        assert clock.at_s - before_s <= 1.0 + 2 * chunk_s + 1e-9
        run(hierarchy, decode(1, 1, 2))


def test_a_disproved_prefetch_is_cancelled_between_chunks() -> None:
    device = SimulatedDevice(SLOW_GBPS, TurnedClock())
    guesses, store = Guesses(SHAPE), ScriptedStore(STORE)
    store.hold(ExpertKey(1, 1))
    with vram_hierarchy(SHAPE, store, 40, TOTAL, predictor=guesses, device=device) as hierarchy:
        guesses.wanted = {ExpertKey(1, 1)}
        hierarchy.begin_pass("decode")
        run(hierarchy, decode(0, 0))
        store.release(ExpertKey(1, 1))
        while not hierarchy.memory.uploads.is_queued(ExpertKey(1, 1)):
            hierarchy.wait()  # for the disk
            hierarchy.runner.take_in(hierarchy)
        guesses.wanted = set()
        run(hierarchy, decode(1, 7))
        run(hierarchy, decode(2, 7))
        assert hierarchy.residency.directory.state(ExpertKey(1, 1)) is State.ABSENT
        assert hierarchy.counters.decode.wasted_loads == 1
        run(hierarchy, decode(1, 1))


def test_what_is_computed_from_is_not_overwritten_yet() -> None:
    device = SimulatedDevice(24.0, TurnedClock())
    with vram_hierarchy(SHAPE, STORE, 3, TOTAL, device=device, num_spare=0) as hierarchy:
        run(hierarchy, decode(0, 0, 1, 2))
        device.compute.lag_s = 7.0  # what was launched for these three takes so long
        before_s = device.now_s()
        run(hierarchy, decode(1, 0, 1, 2))
        assert device.now_s() >= before_s + 7.0


def test_memory_that_was_given_up_still_waits() -> None:
    """A slot's new memory is waited for by whoever gets it next, if its first load never comes."""
    device = SimulatedDevice(24.0, TurnedClock())
    with vram_hierarchy(SHAPE, STORE, 3, TOTAL, device=device, num_spare=1) as hierarchy:
        memory, key = hierarchy.memory, ExpertKey(0, 0)
        memory.reserve({key: 0})
        pending = device.new_stream("down")
        pending.copy(torch.zeros(SLOT_BYTES, dtype=torch.uint8), memory.slots.memory(0))
        memory._free_after[key].append(pending.mark())
        memory.give_up(key)
        memory.reserve({ExpertKey(0, 1): 0})
        left = [mark.at_s for room in memory.slots._spare for mark in room[0].ready]
        assert pending.mark().at_s in left
        memory.give_up(ExpertKey(0, 1))


def test_a_failed_read_leaves_nothing_behind() -> None:
    store = ScriptedStore(STORE)
    store.errors[ExpertKey(0, 1)] = [ReadError("the disk failed")]
    with vram_hierarchy(SHAPE, store, 8, 12) as hierarchy:
        with pytest.raises(ReadError):
            run(hierarchy, decode(0, 0, 1, 2))
        hierarchy.check_integrity()
        assert not hierarchy.residency.directory.pins.any()
        assert not hierarchy.host.shelf.directory.pins.any()
        run(hierarchy, decode(0, 0, 1, 2))


def test_memory_that_cannot_be_pinned_is_said_and_used() -> None:
    device = SimulatedDevice(24.0, TurnedClock(), pins=False)
    with vram_hierarchy(SHAPE, STORE, 8, 12, device=device) as hierarchy:
        run(hierarchy, decode(0, 0, 1, 2))
        assert any(fault.startswith("pinned memory: the system gave") for fault in hierarchy.faults)


def test_a_cache_that_held_every_expert_streams_once_it_has_given_slots_back() -> None:
    with vram_hierarchy(SHAPE, STORE, TOTAL, TOTAL) as hierarchy:
        prompts = [event(layer, list(range(24)), 24, "prefill", 0) for layer in range(3)]
        for each in prompts:
            run(hierarchy, each)
        assert hierarchy.shrink() > 0
        for each in prompts * 2:
            run(hierarchy, each)


class _Watched(SimulatedDevice):
    """Knows which of what was allocated on it is still held by anyone."""

    def __init__(self) -> None:
        super().__init__(24.0, TurnedClock())
        self.given: list[weakref.ref[mmap.mmap]] = []

    def allocate(self, num_bytes: int) -> torch.Tensor:
        memory = allocate(num_bytes)
        self.given.append(weakref.ref(memory))
        return torch.frombuffer(memory, dtype=torch.uint8)[:num_bytes]


def test_memory_given_back_is_held_by_nobody() -> None:
    """Nor by views of a slot that has other memory since, and was not computed from that yet."""
    device, rng = _Watched(), np.random.default_rng(0)
    with vram_hierarchy(SHAPE, STORE, 8, TOTAL, device=device, num_spare=8) as hierarchy:
        memory, key = hierarchy.memory, ExpertKey(0, 0)
        assert isinstance(memory, DeviceMemory)
        for _ in range(60):
            memory.reserve({key: int(rng.integers(8))})
            if rng.random() < 0.3:
                memory.views_of(key)
            memory.give_up(key)
        while memory.give_back():
            rooms = [*filter(None, memory.slots._rooms), *memory.slots._spare[0]]
            held = {number for number, given in enumerate(device.given) if given() is not None}
            assert held == {room.segment for room in rooms}
            del rooms


def test_a_device_without_room_is_refused() -> None:
    device = SimulatedDevice(24.0, TurnedClock(), memory_bytes=3 * SLOT_BYTES)
    with (
        pytest.raises(BudgetError, match="expected at most the"),
        vram_hierarchy(SHAPE, STORE, 8, 12, device=device),
    ):
        pass
