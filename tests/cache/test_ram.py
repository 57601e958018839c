"""The RAM tier: right bytes, each member once, errors that leave nothing behind."""

import threading
from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_infinity.cache.ram import RamHierarchy
from moe_infinity.cache.touching import DECODE_LEAD_BYTES, LEAD_BYTES
from moe_infinity.errors import CancelledError, ReadError
from moe_infinity.policies.base import CachePolicy
from moe_infinity.residency.directory import State
from moe_infinity.tracing.event import Event
from moe_infinity.types import ExpertKey, Phase
from support.guesses import Guesses
from support.routing import Driver, event, grid, new_residency, random_decode
from support.stores import (
    ScriptedStore,
    memory_store,
    ram_hierarchy,
    run_checked,
    wait_until,
)

SHAPE = grid(3, 24, top_k=3, per_layer=[24, 20, 24])
STORE = memory_store(SHAPE)


def run(hierarchy: RamHierarchy, each: Event) -> list[ExpertKey]:
    return run_checked(hierarchy, each, STORE)


def assert_idle(hierarchy: RamHierarchy) -> None:
    """Nothing is pinned or in flight, in the directory or on the way."""
    hierarchy.check_integrity()
    directory = hierarchy.residency.directory
    assert not directory.pins.any()
    assert directory.keys_in(State.IN_FLIGHT) == []
    assert not hierarchy._engine._unsettled and not hierarchy._engine._finished


def random_events(seed: int, count: int) -> Iterable[Event]:
    """Layers in any order, several times in a row, decode and prefill."""
    rng = np.random.default_rng(seed)
    for step in range(count):
        layer = int(rng.integers(3))
        total = SHAPE.experts_per_layer[layer]
        phase: Phase = "prefill" if rng.random() < 0.4 else "decode"
        most = total if phase == "prefill" else 6
        size = int(rng.integers(total - 4, total + 1)) if rng.random() < 0.5 else 1
        chosen = rng.choice(total, min(size, most), replace=False)
        yield event(layer, sorted(chosen.tolist()), 24, phase, step)


def test_memory_is_made_ready_less_far_ahead_while_tokens_are_computed() -> None:
    with ram_hierarchy(SHAPE, STORE, 5) as hierarchy:
        toucher = hierarchy._arena._toucher
        assert toucher._lead_bytes == LEAD_BYTES
        hierarchy.begin_request()
        for phase, lead_bytes in (("prefill", LEAD_BYTES), ("decode", DECODE_LEAD_BYTES)):
            hierarchy.begin_pass(phase)  # type: ignore[arg-type]
            assert toucher._lead_bytes == lead_bytes
        hierarchy.end_request()
        assert toucher._lead_bytes == LEAD_BYTES


@settings(max_examples=12)
@given(
    num_slots=st.sampled_from([1, 3, 5, 16, 24, 40, 68]),
    num_threads=st.sampled_from([1, 8]),
    seed=st.integers(0, 999),
    policy=st.sampled_from(["next_use", "lru"]),
)
def test_compute_gets_the_right_bytes(
    num_slots: int, num_threads: int, seed: int, policy: str
) -> None:
    guesses = Guesses(SHAPE, np.random.default_rng(seed))
    with ram_hierarchy(SHAPE, STORE, num_slots, num_threads, policy, guesses) as hierarchy:
        hierarchy.begin_request()
        for each in random_events(seed, 25):
            hierarchy.begin_pass(each.phase)
            run(hierarchy, each)
        hierarchy.end_request()
        both = [hierarchy.counters.prefill, hierarchy.counters.decode]
        looked_up = sum(c.hits + c.late + c.misses for c in both)
        assert looked_up == sum(len(each.keys) for each in random_events(seed, 25))
        # A miss is loaded once; a prefetch that was cancelled and then wanted is, too.
        demand = sum(c.demand_loads for c in both)
        assert 0 <= demand - sum(c.misses for c in both) <= sum(c.late for c in both)
        assert sum(c.wasted_loads for c in both) <= sum(c.proactive_loads for c in both)
        assert all(c.stall_s >= 0 and c.compute_s >= 0 for c in both)


class Spy(CachePolicy):
    """Another policy that writes down what it is told."""

    def __init__(self, inner: CachePolicy) -> None:
        super().__init__(inner.shape, inner.num_slots)
        self.inner = inner
        self.told: list[tuple[str, ExpertKey]] = []

    def on_event(self, event: Event) -> None:
        self.inner.on_event(event)

    def on_insert(self, key: ExpertKey) -> None:
        self.told.append(("insert", key))
        self.inner.on_insert(key)

    def on_evict(self, key: ExpertKey) -> None:
        self.told.append(("evict", key))
        self.inner.on_evict(key)

    def keep_scores(self, layer: int) -> np.ndarray:
        return self.inner.keep_scores(layer)


def spied(residency: Any) -> Spy:
    spy = Spy(residency.policy)
    residency.policy = spy
    residency.room._policy = spy
    return spy


def whole_passes() -> Iterable[Event]:
    """Prefill of every layer whole, then decode, twice."""
    for _ in range(2):
        for layer, total in enumerate(SHAPE.experts_per_layer):
            yield event(layer, range(total), 24, "prefill")
        yield from random_decode(SHAPE, 6, seed=8)


@pytest.mark.parametrize("num_slots", [3, 9, 20, 40])
@pytest.mark.parametrize("num_threads", [1, 8])
def test_decides_what_a_replay_decides(num_slots: int, num_threads: int) -> None:
    """Same loads and evictions, in the same order, as a disk that takes no time."""
    driver = Driver(new_residency(SHAPE, [num_slots], "next_use"))
    replayed = spied(driver.residency)
    with ram_hierarchy(SHAPE, STORE, num_slots, num_threads, "next_use") as hierarchy:
        live = spied(hierarchy.residency)
        for each in whole_passes():
            driver.run(each)
            run(hierarchy, each)
            assert live.told == replayed.told


@pytest.mark.parametrize("num_slots", [16, 40])
def test_prefill_decides_the_same_whichever_load_is_faster(num_slots: int) -> None:
    """Even experts that were streamed ahead arrive only once their layer has begun: they are late
    where a fast disk has hits, and that must not show in what is evicted."""
    store, guesses = ScriptedStore(STORE), Guesses(SHAPE)
    even = [key for key in STORE.specs if key.expert % 2 == 0]
    guesses.on_observe = lambda e: [store.release(key) for key in even if key.layer == e.layer]
    driver = Driver(new_residency(SHAPE, [num_slots], "next_use"))
    replayed = spied(driver.residency)
    with ram_hierarchy(SHAPE, store, num_slots, 1, "next_use", guesses) as hierarchy:
        live = spied(hierarchy.residency)
        for each in whole_passes():
            store.hold(*(key for key in even if key.layer != each.layer))
            driver.run(each)
            run(hierarchy, each)
            assert live.told == replayed.told
        assert hierarchy.counters.decode.late > 0


def test_a_failed_demand_load_raises_its_own_error_and_leaves_nothing() -> None:
    store = ScriptedStore(STORE)
    broken = ReadError("unreadable sector")
    with ram_hierarchy(SHAPE, store, 16, num_threads=2) as hierarchy:
        run(hierarchy, event(0, [1, 2, 3], 24))
        store.errors[ExpertKey(0, 5)] = [broken]
        with pytest.raises(ReadError) as caught:
            run(hierarchy, event(0, [2, 4, 5, 6], 24))
        assert caught.value is broken
        assert_idle(hierarchy)
        run(hierarchy, event(0, [2, 4, 5, 6], 24))
        run(hierarchy, event(0, range(24), 24, "prefill"))


def test_short_files_are_read_errors() -> None:
    short = memory_store(SHAPE)
    short._files[0] = short._files[0][: len(short._files[0]) // 2]
    with ram_hierarchy(SHAPE, short, 8) as hierarchy:
        run(hierarchy, event(0, [1], 24))
        with pytest.raises(ReadError, match=r"layer=2, expert=9"):
            run(hierarchy, event(2, [9], 24))
        assert_idle(hierarchy)
        run(hierarchy, event(0, [1, 2], 24))


def test_a_failed_prefetch_is_forgotten() -> None:
    store, guesses = ScriptedStore(STORE), Guesses(SHAPE)
    target = ExpertKey(1, 7)
    store.errors[target] = [ReadError("only once")]
    with ram_hierarchy(SHAPE, store, 32, predictor=guesses) as hierarchy:
        guesses.wanted = {target}
        run(hierarchy, event(0, [1], 24))
        guesses.wanted = set()
        wait_until(lambda: not store.errors[target])
        wait_until(lambda: all(t.is_settled for t in hierarchy._in_flight.values()))
        run(hierarchy, event(0, [2], 24))
        assert hierarchy.tier_of(target) == "disk"
        assert hierarchy.counters.decode.wasted_loads == 1
        run(hierarchy, event(1, [7], 24))
        assert hierarchy.tier_of(target) == "ram"


@pytest.mark.parametrize("phase", ["decode", "prefill"])
@pytest.mark.parametrize("members", [[3, 7, 9], range(20)], ids=["few", "waves"])
def test_a_prefetch_that_fails_while_its_event_begins_is_loaded_again(
    monkeypatch: pytest.MonkeyPatch, phase: Phase, members: Iterable[int]
) -> None:
    """It was joined at look-up, and failed before anyone looked again: the member used to be left
    out, and the output was wrong without a word."""
    store, guesses = ScriptedStore(STORE), Guesses(SHAPE)
    target = ExpertKey(1, 7)
    store.errors[target] = [ReadError("only once")]
    store.hold(target)
    with ram_hierarchy(SHAPE, store, 16, predictor=guesses) as hierarchy:
        guesses.wanted = {target}
        run(hierarchy, event(0, [1], 24))
        transfer, promote = hierarchy._in_flight[target], hierarchy.promote

        def fail_first(key: ExpertKey) -> None:
            store.release(target)
            wait_until(lambda: transfer.is_settled)
            promote(key)

        monkeypatch.setattr(hierarchy, "promote", fail_first)
        assert target in run(hierarchy, event(1, members, 24, phase))
        assert hierarchy.counters.decode.late == 1
        run(hierarchy, event(1, [7], 24))


@pytest.mark.parametrize("phase", ["decode", "prefill"])
def test_a_cancelled_prefetch_that_is_wanted_after_all_is_loaded_again(phase: Phase) -> None:
    """The router disproves it, and at the next token needs it while its chunks are being read."""
    store, guesses = ScriptedStore(STORE), Guesses(SHAPE)
    target = ExpertKey(1, 7)
    store.hold(target)
    with ram_hierarchy(SHAPE, store, 32, num_threads=5, predictor=guesses) as hierarchy:
        guesses.wanted = {target}
        run(hierarchy, event(0, [1], 24))
        guesses.wanted = set()
        store.wait_for_reads(6)  # two threads are stuck in its chunks, the others go on
        run(hierarchy, event(1, [2], 24))
        assert hierarchy.counters.decode.wasted_loads == 1
        assert not hierarchy._in_flight[target].wanted
        guesses.on_observe = lambda each: store.release(target)
        assert target in run(hierarchy, event(1, [2, 7], 24, phase))


def test_a_wrong_prefetch_is_cancelled() -> None:
    store, guesses = ScriptedStore(STORE), Guesses(SHAPE)
    wrong = {ExpertKey(1, e) for e in (3, 4, 5)}
    store.hold(*wrong)
    with ram_hierarchy(SHAPE, store, 32, num_threads=1, predictor=guesses) as hierarchy:
        guesses.wanted = wrong
        run(hierarchy, event(0, [1], 24))
        guesses.wanted = set()
        store.wait_for_reads(5)
        guesses.on_predict = lambda: [store.release(key) for key in wrong]
        run(hierarchy, event(1, [9], 24))
        reads = [key for key, _ in store.reads]
        assert reads == [ExpertKey(0, 1)] * 4 + [ExpertKey(1, 3)] + [ExpertKey(1, 9)] * 4
        assert hierarchy.counters.decode.wasted_loads == 3


def test_a_predictor_may_name_the_running_event() -> None:
    """Members that still wait for a slot are the event's own loads, not prefetches."""
    guesses = Guesses(SHAPE)
    guesses.wanted = {ExpertKey(0, e) for e in range(24)}
    with ram_hierarchy(SHAPE, STORE, 16, predictor=guesses) as hierarchy:
        for phase in ("prefill", "decode"):
            run(hierarchy, event(0, range(24), 24, phase))  # type: ignore[arg-type]


def test_an_error_in_compute_leaves_nothing() -> None:
    def fail(key: ExpertKey, views: object) -> None:
        raise ZeroDivisionError(key)

    with ram_hierarchy(SHAPE, STORE, 8, num_threads=4) as hierarchy:
        for phase in ("prefill", "decode"):
            with pytest.raises(ZeroDivisionError):
                hierarchy.run_event(event(0, range(6), 24, phase), fail)  # type: ignore[arg-type]
            assert_idle(hierarchy)
            run(hierarchy, event(0, range(6), 24, phase))  # type: ignore[arg-type]


@pytest.mark.parametrize("phase", ["decode", "prefill"])
def test_cancelling_from_another_thread(phase: Phase) -> None:
    """Seen before the next experts, with loads in flight that nobody will use."""
    store = ScriptedStore(STORE)
    late = ExpertKey(0, 5)
    store.hold(late)
    computing, cancelled = threading.Event(), threading.Event()
    seen = []

    def compute(keys: list[ExpertKey], views: object) -> None:
        seen.extend(keys)
        computing.set()
        assert cancelled.wait(60)

    def cancel(hierarchy: RamHierarchy) -> None:
        assert computing.wait(60)
        hierarchy.cancelled.set()
        store.release(late)
        cancelled.set()

    with ram_hierarchy(SHAPE, store, 16, num_threads=2) as hierarchy:
        thread = threading.Thread(target=cancel, args=(hierarchy,))
        thread.start()
        with pytest.raises(CancelledError):
            hierarchy.run_event(event(0, [1, 2, 5], 24, phase), compute)
        thread.join()
        assert seen and late not in seen
        assert_idle(hierarchy)
        hierarchy.cancelled.clear()
        run(hierarchy, event(0, [1, 2, 5], 24, phase))


def test_misses_may_be_left_out_by_a_rule() -> None:
    """What the rule does not choose is not loaded; what is here is computed all the same."""

    def only_even(each: Event, misses: list[ExpertKey]) -> list[ExpertKey]:
        return [key for key in misses if key.expert % 2 == 0]

    seen: list[ExpertKey] = []
    with ram_hierarchy(SHAPE, STORE, 8, choose_misses=only_even) as hierarchy:
        hierarchy.run_event(event(0, [2, 4], 24), lambda keys, views: seen.extend(keys))
        hierarchy.run_event(event(0, [1, 2, 3, 6], 24), lambda keys, views: seen.extend(keys))
        assert sorted(key.expert for key in seen[:2]) == [2, 4]
        assert sorted(key.expert for key in seen[2:]) == [2, 6]
        assert hierarchy.counters.decode.demand_loads == 3
        assert hierarchy.counters.decode.misses == 5


def test_counters_of_one_miss_and_one_hit() -> None:
    with ram_hierarchy(SHAPE, STORE, 8) as hierarchy:
        hierarchy.begin_pass("decode")
        run(hierarchy, event(1, [3], 24))
        run(hierarchy, event(1, [3], 24))
        now = hierarchy.counters.decode
        assert (now.hits, now.misses, now.demand_loads, now.demand_bytes) == (1, 1, 1, 101)
        assert now.computed_bytes == 2 * STORE.specs[ExpertKey(1, 3)].weight_bytes
        assert hierarchy.resident_flat() == [24 + 3]


def test_an_unexpected_error_between_load_and_transfer_leaks_no_slot() -> None:
    """Loads begun that never reached the engine used to stay in flight for ever."""
    with ram_hierarchy(SHAPE, STORE, 4) as hierarchy:
        run(hierarchy, event(0, [1], 24))
        submit = hierarchy._engine.submit
        hierarchy._engine.submit = lambda *args: (_ for _ in ()).throw(OSError("no more threads"))  # type: ignore[assignment]
        with pytest.raises(OSError, match="no more threads"):
            run(hierarchy, event(0, [1, 2, 3], 24))
        hierarchy._engine.submit = submit  # type: ignore[method-assign]
        assert_idle(hierarchy)
        run(hierarchy, event(0, [1, 2, 3, 4], 24))


def test_integrity_finds_a_load_that_nobody_carries_out() -> None:
    with ram_hierarchy(SHAPE, STORE, 4) as hierarchy:
        hierarchy.residency.directory.begin_load(ExpertKey(0, 1))
        with pytest.raises(AssertionError, match="without a transfer"):
            hierarchy.check_integrity()


def test_close_ends_the_threads_with_loads_in_flight() -> None:
    store, guesses = ScriptedStore(STORE), Guesses(SHAPE)
    guesses.wanted = {ExpertKey(1, 7), ExpertKey(1, 8)}
    before = set(threading.enumerate())
    with ram_hierarchy(SHAPE, store, 32, num_threads=2, predictor=guesses) as hierarchy:
        store.hold(*guesses.wanted)
        run(hierarchy, event(0, [1], 24))
        mine = set(threading.enumerate()) - before
        readers = {t.name for t in mine} - {"moe-infinity-touch"}
        assert readers == {"moe-infinity-read-0", "moe-infinity-read-1"}
        for key in guesses.wanted:
            store.release(key)
        hierarchy.close()
        hierarchy.close()
        assert not any(thread.is_alive() for thread in mine)
        assert_idle(hierarchy)
        with pytest.raises(RuntimeError, match="closed"):
            run(hierarchy, event(0, [2], 24))
        assert_idle(hierarchy)
