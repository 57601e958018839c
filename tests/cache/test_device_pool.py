"""Several devices as one pool: the decisions of one device, right bytes, work for every link."""

from collections.abc import Callable, Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_infinity.cache.device_pool import DevicePool, _in_turns
from moe_infinity.cache.vram import VramHierarchy
from moe_infinity.devices.simulated import SimulatedDevice
from moe_infinity.residency.directory import State
from moe_infinity.tracing.event import Event
from moe_infinity.types import ExpertKey, Phase, Priority
from support.guesses import Guesses
from support.routing import event, grid
from support.stores import TurnedClock, memory_store, run_checked, vram_hierarchy

SHAPE = grid(3, 24, top_k=3)
STORE = memory_store(SHAPE)
TOTAL = SHAPE.num_total
SLOT_BYTES = STORE.slot_bytes
SLOW_GBPS = SLOT_BYTES / 1e9  # one expert a second


def devices(*links_gbps: float) -> list[SimulatedDevice]:
    """Of one machine."""
    first = SimulatedDevice(links_gbps[0], TurnedClock())
    return [first, *(SimulatedDevice(gbps, beside=first) for gbps in links_gbps[1:])]


def random_events(seed: int, count: int, prompt: tuple[int, int] = (18, 24)) -> list[Event]:
    """prompt: experts that a prefill event has, from and to."""
    rng = np.random.default_rng(seed)
    made = []
    for step in range(count):
        phase: Phase = "prefill" if rng.random() < 0.3 else "decode"
        least, most = prompt if phase == "prefill" else (1, 5)
        size = int(rng.integers(least, most + 1))
        chosen = sorted(rng.choice(24, size, replace=False).tolist())
        made.append(event(int(rng.integers(3)), chosen, 24, phase, step))
    return made


def pool_of(hierarchy: VramHierarchy) -> DevicePool:
    assert isinstance(hierarchy.memory, DevicePool)
    return hierarchy.memory


def fill_ram(hierarchy: VramHierarchy) -> None:
    """So that nothing waits for the disk."""
    for key in STORE.specs:
        hierarchy.host.ask(key, Priority.DEMAND, hierarchy.counters)
        hierarchy.wait()
        hierarchy.host.collect(hierarchy.counters)
        hierarchy.host.shelf.given_back(key)


@settings(max_examples=15)
@given(
    slots=st.sampled_from([(1, 1), (5, 1), (3, 13), (0, 9), (9, 0), (24, 20), (5, 7, 6), (40, 32)]),
    num_ram_slots=st.sampled_from([1, 2, 7, 24, 72]),
    num_spare=st.integers(0, 2),
    links_gbps=st.permutations([SLOW_GBPS, 0.3 * SLOW_GBPS, 24.0]),
    policy=st.sampled_from(["next_use", "lru"]),
    guessing=st.booleans(),
    seed=st.integers(0, 999),
)
def test_compute_gets_the_right_bytes(
    slots: tuple[int, ...],
    num_ram_slots: int,
    num_spare: int,
    links_gbps: Sequence[float],
    policy: str,
    guessing: bool,
    seed: int,
) -> None:
    rng = np.random.default_rng(seed)
    some = devices(*links_gbps[: len(slots)])
    given_slots = (slots, num_ram_slots, policy, Guesses(SHAPE, rng) if guessing else None)
    with vram_hierarchy(SHAPE, STORE, *given_slots, some, num_spare=num_spare) as hierarchy:
        hierarchy.begin_request()
        for number, each in enumerate(random_events(seed, 20)):
            hierarchy.begin_pass(each.phase)
            run_checked(hierarchy, each, STORE)
            some[0]._clock.wait_until(some[0].now_s() + float(rng.choice([0.0, 0.3, 2.0])))
            if number == 12:
                hierarchy.shrink(len(slots) - 1)
                hierarchy.check_integrity()
        hierarchy.end_request()
        assert not hierarchy.residency.directory.pins.any()


@pytest.mark.parametrize("policy", ["lru", "next_use", "lfu"])
@pytest.mark.parametrize("slots", [(10, 6), (4, 4, 8), (1, 15)])
def test_decisions_are_those_of_one_device(policy: str, slots: tuple[int, ...]) -> None:
    """Where nothing is loaded ahead: what comes ahead is there or not when it is asked for."""

    def taken(num_slots: int | tuple[int, ...], *links_gbps: float) -> list[object]:
        found: list[object] = []
        given_slots = (num_slots, TOTAL, policy, None, devices(*links_gbps))
        with vram_hierarchy(SHAPE, STORE, *given_slots) as hierarchy:
            fill_ram(hierarchy)
            for each in random_events(3, 40, prompt=(12, 17)):
                hierarchy.begin_pass(each.phase)
                run_checked(hierarchy, each, STORE)
                found.append(hierarchy.resident_flat())
            decode = hierarchy.counters.decode
            found.append((decode.hits, decode.misses, decode.demand_loads, decode.demoted_bytes))
        return found

    links = [24.0, SLOW_GBPS, 3.0][: len(slots)]
    assert taken(slots, *links) == taken(sum(slots), 24.0)


@given(
    st.integers(1, 3).flatmap(
        lambda num_classes: st.lists(
            st.lists(st.integers(0, 6), min_size=num_classes, max_size=num_classes).map(tuple),
            min_size=2,
            max_size=4,
        )
    )
)
def test_slots_of_a_class_are_those_of_each_devices_class(counts: list[tuple[int, ...]]) -> None:
    """As a Directory numbers the pool's and a DeviceMemory its own. counts: of each device."""

    def by_class(slots_per_class: Sequence[int]) -> list[int]:
        return [number for number, count in enumerate(slots_per_class) for _ in range(count)]

    places = _in_turns(counts)
    assert len(set(places)) == len(places) == sum(map(sum, counts))
    own = [by_class(each) for each in counts]
    assert [own[device][slot] for device, slot in places] == by_class(
        [sum(each) for each in zip(*counts, strict=True)]
    )


def test_every_device_has_its_share_from_the_start() -> None:
    both = devices(SLOW_GBPS, SLOW_GBPS)
    with vram_hierarchy(SHAPE, STORE, (12, 6), TOTAL, device=both) as hierarchy:
        fill_ram(hierarchy)
        run_checked(hierarchy, event(0, [0, 1, 2], 24), STORE)
        on_each = [len(memory.slot_of) for memory in pool_of(hierarchy).memories]
        assert on_each == [2, 1]
        # Two copies on one link and one on the other, at the same time.
        assert both[0].now_s() == pytest.approx(2 * sum(_copied_bytes()) / (SLOW_GBPS * 1e9))
        assert [device._busy_until_s["up"] > 0 for device in both] == [True, True]


def _copied_bytes() -> list[int]:
    """Of one expert, piece by piece."""
    with vram_hierarchy(SHAPE, STORE, 3, TOTAL) as hierarchy:
        layout = next(iter(hierarchy.memory.layouts.values()))
        return [segment.num_bytes for segment in layout.segments]


def test_victims_leave_over_the_link_of_the_device_they_lie_on() -> None:
    both = devices(SLOW_GBPS, SLOW_GBPS)
    with vram_hierarchy(SHAPE, STORE, (3, 3), 8, device=both, num_spare=3) as hierarchy:
        for first in range(0, 24, 3):
            run_checked(hierarchy, event(0, [first, first + 1, first + 2], 24), STORE)
        assert hierarchy.counters.decode.demoted_bytes > 0
        assert all(device._busy_until_s["down"] > 0 for device in both)


def test_what_one_device_sends_down_another_takes_up() -> None:
    """It waits for the other's copy, which ends long after it was begun."""
    first, second = devices(1000.0, 1000.0)
    with vram_hierarchy(SHAPE, STORE, (1, 1), 3, device=(first, second)) as hierarchy:
        second._busy_until_s["down"] = first._busy_until_s["down"] = 100.0
        places: dict[int, set[bool]] = {}
        for expert in (0, 1, 2, 3, 0, 2, 1, 3, 0):
            key = ExpertKey(0, expert)
            run_checked(hierarchy, event(0, [expert], 24), STORE)
            memories = pool_of(hierarchy).memories
            places.setdefault(expert, set()).add(key in memories[1].slot_of)
        assert any(len(where) == 2 for where in places.values()), "none has changed its device"
        assert hierarchy.counters.decode.demoted_bytes > 0


class TestShrinking:
    def hierarchy(self, run: Callable[[VramHierarchy], None]) -> None:
        with vram_hierarchy(SHAPE, STORE, (16, 16), TOTAL, device=devices(24.0, 24.0)) as hierarchy:
            for each in random_events(5, 20):
                run_checked(hierarchy, each, STORE)
            run(hierarchy)
            for each in random_events(6, 20):
                run_checked(hierarchy, each, STORE)

    def test_the_device_that_is_named_gives(self) -> None:
        def shrink(hierarchy: VramHierarchy) -> None:
            memories = pool_of(hierarchy).memories
            before = [len(memory.slot_of) for memory in memories]
            gone = hierarchy.shrink(1)
            assert 0 < gone < 16
            assert hierarchy.residency.directory.num_usable == 32 - gone
            after = [len(memory.slot_of) for memory in memories]
            assert after[0] == before[0]
            assert after[1] <= 16 - gone < before[1]

        self.hierarchy(shrink)

    def test_until_it_has_no_more_to_give(self) -> None:
        def shrink(hierarchy: VramHierarchy) -> None:
            while hierarchy.shrink(1):
                hierarchy.check_integrity()
            assert hierarchy.shrink(0) > 0

        self.hierarchy(shrink)


def test_a_prefetch_is_cancelled_on_its_own_device() -> None:
    guesses = Guesses(SHAPE)
    both = devices(SLOW_GBPS, SLOW_GBPS)
    with vram_hierarchy(SHAPE, STORE, (20, 20), TOTAL, "lru", guesses, both) as hierarchy:
        fill_ram(hierarchy)
        guesses.wanted = {ExpertKey(1, 1), ExpertKey(1, 2)}
        hierarchy.begin_pass("decode")
        run_checked(hierarchy, event(0, [0], 24), STORE)
        queued = {each for each in guesses.wanted if hierarchy.memory.uploads.is_queued(each)}
        on_each = [len(queued & memory.slot_of.keys()) for memory in pool_of(hierarchy).memories]
        assert on_each == [1, 1]
        for key in sorted(queued):
            hierarchy.cancel(key)
        guesses.wanted = set()
        run_checked(hierarchy, event(2, [7], 24), STORE)
        states = {hierarchy.residency.directory.state(key) for key in queued}
        assert states == {State.ABSENT}
        run_checked(hierarchy, event(1, [1, 2], 24), STORE)


@pytest.mark.parametrize("method", ["reserve", "upload", "send_down", "await_all", "views_of"])
def test_an_interrupt_halfway_leaves_nothing(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with vram_hierarchy(SHAPE, STORE, (3, 3), 5, device=devices(24.0, 24.0)) as hierarchy:
        events = random_events(7, 20)
        for each in events:
            run_checked(hierarchy, each, STORE)

        def struck(*args: object) -> None:
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(pool_of(hierarchy).memories[1], method, struck)
            with pytest.raises(KeyboardInterrupt):
                for each in events:
                    run_checked(hierarchy, each, STORE)
        hierarchy.check_integrity()
        assert not hierarchy.residency.directory.pins.any()
        for each in events:
            run_checked(hierarchy, each, STORE)


def test_devices_that_round_differently_are_named() -> None:
    both = devices(24.0, 24.0)
    with vram_hierarchy(SHAPE, STORE, (4, 4), TOTAL, device=both) as hierarchy:
        assert hierarchy.lossy == ()
        both[1].rounding = "another GPU"
        assert hierarchy.lossy == ("experts on GPUs of different kinds",)
