"""What Residency decides: waves, streaming, loads ahead, and that time has no say in any of it."""

import dataclasses
import itertools
from collections.abc import Iterator, Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_infinity.policies import find_policy, policy_names
from moe_infinity.predictors import find_predictor
from moe_infinity.residency.directory import State
from moe_infinity.residency.residency import Residency
from moe_infinity.residency.running import Load, Lookup
from moe_infinity.simulator.cost_model import Cost, SimulatedCarrier
from moe_infinity.simulator.replay import replay
from moe_infinity.tracing.event import Event
from moe_infinity.tracing.trace import Trace
from moe_infinity.types import ExpertKey, Priority
from support.routing import Driver, event, grid, new_residency, random_decode
from support.traces import random_trace


def key(layer: int, expert: int) -> ExpertKey:
    return ExpertKey(layer, expert)


def resident(residency: Residency) -> list[ExpertKey]:
    return residency.directory.keys_in(State.RESIDENT)


def mixed_trace(num_layers: int, num_experts: int, seed: int) -> Iterator[tuple[str, list[Event]]]:
    """Passes: whole layers in prefill, a few experts in decode."""
    rng = np.random.default_rng(seed)
    for step in range(12):
        phase = "prefill" if rng.random() < 0.3 else "decode"
        events = []
        for layer in range(num_layers):
            size = num_experts if phase == "prefill" else int(rng.integers(1, 5))
            chosen = np.sort(rng.choice(num_experts, size, replace=False)).tolist()
            counts = rng.integers(1, 9, size).tolist() if phase == "prefill" else ()
            events.append(event(layer, chosen, num_experts, phase, step, counts))  # type: ignore[arg-type]
        yield phase, events


def decisions(policy: str, num_slots: int, seed: int, disk: int | None) -> list[object]:
    """All loads of a mixed trace: keys, slots, victims. disk: the order in which it is done."""
    rng = None if disk is None else np.random.default_rng(disk)
    driver = Driver(new_residency(grid(3, 24), [num_slots], policy), rng)
    for phase, events in mixed_trace(3, 24, seed):
        driver.residency.begin_pass(phase)  # type: ignore[arg-type]
        for each in events:
            driver.run(each)
    return list(driver.log)


@settings(max_examples=40)
@given(
    policy=st.sampled_from(policy_names()),
    num_slots=st.integers(4, 72),
    seed=st.integers(0, 999),
    disk=st.integers(0, 999),
)
def test_decisions_do_not_depend_on_the_disk(
    policy: str, num_slots: int, seed: int, disk: int
) -> None:
    """Decode computes whoever is here first, prefill in order; neither changes what is evicted."""
    assert decisions(policy, num_slots, seed, disk) == decisions(policy, num_slots, seed, None)


@settings(max_examples=60)
@given(
    num_slots=st.integers(16, 48),
    trace=st.lists(
        st.tuples(
            st.sampled_from(["prefill", "prefill", "decode"]),
            st.integers(0, 2),
            st.integers(0, 2**16 - 1),
        ),
        max_size=20,
    ),
    disk=st.integers(0, 999),
)
def test_layers_may_come_in_any_order(
    num_slots: int, trace: list[tuple[str, int, int]], disk: int
) -> None:
    """A long prompt visits a layer several times in a row, a cancelled pass ends anywhere: what was
    streamed ahead for another layer must not block the ring."""
    driver = Driver(new_residency(grid(3, 16), [num_slots]), np.random.default_rng(disk))
    for phase, layer, mask in trace:
        if phase == "prefill":
            mask |= 0x0FFF  # most of the layer, so that the next one is streamed ahead
        chosen = [e for e in range(16) if mask >> e & 1]
        driver.residency.begin_pass(phase)  # type: ignore[arg-type]
        driver.run(event(layer, chosen, 16, phase))  # type: ignore[arg-type]


def test_ring_full_of_the_next_layer_gives_way() -> None:
    """Deadlock once seen: every ring slot was loaded ahead for layer 1, and layer 0 came again."""
    driver = Driver(new_residency(grid(2, 16), [16]))
    residency = driver.residency
    for expert in range(16):
        driver.run(event(0, [expert], 16))
    residency.begin_pass("prefill")
    residency.begin_event(event(0, range(14), 16, "prefill"))
    for expert in range(14):
        residency.finish(key(0, expert))
        driver.begin(residency.stream_ahead())
    residency.end_event()
    assert set(residency.room.ahead) == {key(1, 0), key(1, 1)}
    assert residency.room.ring_slots == [2]
    driver.run(event(0, range(16), 16, "prefill"))
    assert residency.counters.prefill.wasted_loads > 0


@pytest.mark.parametrize("policy", policy_names())
@pytest.mark.parametrize("num_slots", [1, 2, 3, 5, 16, 40])
def test_prefill_needs_one_slot_only(policy: str, num_slots: int) -> None:
    driver = Driver(new_residency(grid(2, 20), [num_slots], policy), np.random.default_rng(1))
    driver.residency.begin_pass("prefill")
    for layer in (0, 1, 0, 1):
        driver.run(event(layer, range(20), 20, "prefill"))
    counters = driver.residency.counters.prefill
    assert counters.hits + counters.late + counters.misses == 80


@pytest.mark.parametrize("policy", policy_names())
@pytest.mark.parametrize("num_slots", [1, 2, 4, 7])
def test_decode_runs_in_waves_at_any_capacity(policy: str, num_slots: int) -> None:
    shape = grid(3, 12, top_k=4)
    driver = Driver(new_residency(shape, [num_slots], policy), np.random.default_rng(2))
    for each in random_decode(shape, 10, seed=3):
        driver.run(each)
    assert driver.residency.counters.decode.demand_loads == len(driver.log)


def test_wave_admits_ascending_and_evicts_what_was_computed() -> None:
    driver = Driver(new_residency(grid(1, 8), [2]))
    driver.run(event(0, [0, 3, 5, 6, 7], 8))
    assert [load.key.expert for load in driver.log] == [0, 3, 5, 6, 7]
    assert [load.victim for load in driver.log] == [None, None, key(0, 0), key(0, 3), key(0, 5)]
    assert resident(driver.residency) == [key(0, 6), key(0, 7)]


def test_hits_of_a_decode_event_are_safe_until_computed() -> None:
    """Both slots hold members: the third has to wait for a whole wave, not for one of them."""
    driver = Driver(new_residency(grid(1, 4), [2]))
    driver.run(event(0, [1, 2], 4))
    residency = driver.residency
    found = residency.begin_event(event(0, [0, 1, 2], 4))
    assert (found.hits, found.misses) == ([key(0, 1), key(0, 2)], [key(0, 0)])
    assert residency.admit() == []
    residency.finish(key(0, 2))
    assert residency.admit() == []
    residency.finish(key(0, 1))
    assert [load.victim for load in residency.admit()] == [key(0, 1)]


def test_prefill_leaves_most_residents_alone() -> None:
    """32 slots, of which an eighth is the ring: 28 residents survive another layer's prefill."""
    driver = Driver(new_residency(grid(2, 64, top_k=32), [32]))
    driver.run(event(0, range(32), 64))
    driver.residency.begin_pass("prefill")
    driver.run(event(1, range(64), 64, "prefill"))
    assert sum(k.layer == 0 for k in resident(driver.residency)) == 28


def test_prefill_into_a_free_cache_keeps_the_hottest() -> None:
    """16 slots for two layers: 8 is a layer's fair share, and it goes to the most routed to."""
    driver = Driver(new_residency(grid(2, 12), [16]))
    counts = [1, 9, 1, 9, 1, 9, 1, 9, 2, 3, 4, 5]
    driver.residency.begin_pass("prefill")
    driver.run(event(0, range(12), 12, "prefill", counts=counts))
    hottest = {1, 3, 5, 7, 8, 9, 10, 11}
    assert hottest <= {k.expert for k in resident(driver.residency) if k.layer == 0}


def test_with_a_slot_for_every_expert_nothing_is_read_twice() -> None:
    """Experts that a prompt loads ahead in vain stay for the next one."""
    driver = Driver(new_residency(grid(4, 24), [96]))
    for _ in range(3):
        driver.residency.begin_pass("prefill")
        for layer in range(4):
            driver.run(event(layer, range(layer, 20 + layer), 24, "prefill"))
    loaded = [load.key for load in driver.log]
    assert len(loaded) == len(set(loaded)) > 80
    assert all(load.victim is None for load in driver.log)


def test_what_streamed_through_goes_first_unless_decode_used_it() -> None:
    driver = Driver(new_residency(grid(2, 24, top_k=16), [16]))
    driver.run(event(1, range(16), 24))
    driver.residency.begin_pass("prefill")
    driver.run(event(0, range(4), 24, "prefill"))  # through a ring of two: 2 and 3 are left
    driver.residency.begin_pass("decode")
    driver.run(event(0, [2], 24))  # a hit: no longer just passing
    driver.run(event(1, [20], 24))
    assert driver.log[-1].victim == key(0, 3)
    driver.run(event(1, [21], 24))
    assert driver.log[-1].victim is not None and driver.log[-1].victim.layer == 1


def test_streaming_ahead_covers_the_next_layer_only_after_most_of_this_one() -> None:
    driver = Driver(new_residency(grid(2, 16), [32]))
    driver.residency.begin_pass("prefill")
    driver.run(event(0, range(11), 16, "prefill"))
    assert not any(load.proactive for load in driver.log)
    driver.run(event(0, range(12), 16, "prefill"))
    ahead = [load.key for load in driver.log if load.proactive]
    assert ahead and ahead == [key(1, e) for e in range(len(ahead))]
    assert len(ahead) <= driver.residency.room.ring_slots[0] == 4
    found = driver.run(event(1, range(16), 16, "prefill"))
    assert found.hits == ahead and driver.residency.counters.prefill.wasted_loads == 0


def test_last_layer_streams_nothing_ahead() -> None:
    driver = Driver(new_residency(grid(1, 16), [32]))
    driver.run(event(0, range(16), 16, "prefill"))
    assert not any(load.proactive for load in driver.log)


def test_small_caches_load_nothing_ahead() -> None:
    driver = Driver(new_residency(grid(2, 8), [15]))
    driver.run(event(0, range(8), 8, "prefill"), prefetch=[key(1, 0)])
    assert not any(load.proactive for load in driver.log)


def crowded() -> Residency:
    """Sixteen slots: fourteen residents of layer 0, and two of layer 1 loaded ahead."""
    residency = new_residency(grid(2, 40, top_k=14), [16])
    Driver(residency).run(event(0, range(14), 40))
    for load in residency.prefetch([key(1, 0), key(1, 1), key(1, 2)], 0):
        residency.complete(load.key)
    assert set(residency.room.ahead) == {key(1, 0), key(1, 1)}, "a ring's worth is the limit"
    return residency


def test_prefetch_never_evicts_a_prefetch() -> None:
    """Else two of them would take the last slot from one another for ever."""
    residency = new_residency(grid(2, 40, top_k=15), [16])
    Driver(residency).run(event(0, range(15), 40))
    (load,) = residency.prefetch([key(1, 0)], 0)
    residency.complete(load.key)
    residency.begin_event(event(0, range(15), 40, "prefill"))  # pins all the others
    assert residency.prefetch([key(1, 1)], 0) == []
    assert residency.stream_ahead() == []


def test_demand_evicts_prefetches_when_nothing_else_is_left() -> None:
    residency = crowded()
    residency.begin_event(event(0, range(16), 40))
    assert [load.victim for load in residency.admit()] == [key(1, 0), key(1, 1)]
    assert residency.counters.decode.wasted_loads == 2


def test_demand_spares_prefetches_while_something_else_is_left() -> None:
    residency = crowded()
    residency.begin_event(event(0, range(1, 15), 40))
    assert [load.victim for load in residency.admit()] == [key(0, 0)]
    assert residency.counters.decode.wasted_loads == 0


def test_prefetch_skips_members_that_still_wait_for_a_slot() -> None:
    """A predictor may well name the running layer: those loads are the event's own."""
    residency = new_residency(grid(1, 32), [16])
    residency.begin_event(event(0, range(32), 32))
    residency.admit()
    assert residency.prefetch([key(0, 31)], 0) == []


def test_disproved_loads_are_named_and_counted_once() -> None:
    residency = new_residency(grid(2, 20), [32])
    residency.begin_event(event(0, [0], 20))
    residency.prefetch([key(1, e) for e in range(3)], 0)
    for load in residency.admit():
        residency.complete(load.key)
        residency.finish(load.key)
    residency.end_event()
    residency.complete(key(1, 0))
    found = residency.begin_event(event(1, [2], 20))
    assert (found.hits, found.late) == ([], [key(1, 2)])
    assert found.disproved == [key(1, 1)]  # 0 has arrived: there is nothing to cancel
    assert residency.counters.decode.wasted_loads == 2
    residency.fail(key(1, 1))
    residency.complete(key(1, 2))
    residency.finish(key(1, 2))
    residency.end_event()
    assert residency.counters.decode.wasted_loads == 2


def test_late_member_whose_load_fails_is_loaded_again() -> None:
    """Silently wrong output once: it left the event uncomputed. The slots are full meanwhile."""
    for phase in ("decode", "prefill"):
        residency = new_residency(grid(2, 20), [16])
        driver = Driver(residency)
        for expert in range(14):
            driver.run(event(0, [expert], 20))
        residency.prefetch([key(1, 5)], 0)
        found = residency.begin_event(event(1, [5], 20, phase))  # type: ignore[arg-type]
        assert found.late == [key(1, 5)]
        residency.fail(key(1, 5))
        assert not residency.is_done
        (again,) = residency.admit()
        assert again.key == key(1, 5) and not again.proactive
        residency.complete(key(1, 5))
        residency.finish(key(1, 5))
        residency.end_event()
        assert not residency.directory.pins.any()


def test_failed_last_member_of_a_wave_releases_the_others() -> None:
    residency = new_residency(grid(2, 40, top_k=15), [16])
    driver = Driver(residency)
    driver.run(event(1, range(14), 40))
    residency.prefetch([key(1, 20)], 0)
    residency.begin_event(event(1, [*range(14), 20, 30], 40))
    assert [load.key for load in residency.admit()] == [key(1, 30)]
    residency.complete(key(1, 30))
    for expert in (*range(14), 30):
        residency.finish(key(1, expert))
    residency.fail(key(1, 20))
    assert not residency.directory.pins.any(), "computed members stay pinned behind a failed one"
    assert [load.key for load in residency.admit()] == [key(1, 20)]


def test_skipped_misses_are_not_loaded() -> None:
    residency = new_residency(grid(1, 8), [4])
    residency.begin_event(event(0, [1, 2, 3], 8))
    residency.skip({key(0, 2)})
    assert [load.key.expert for load in residency.admit()] == [1, 3]


def test_empty_event_is_done_at_once() -> None:
    residency = new_residency(grid(1, 4), [1])
    found = residency.begin_event(event(0, [], 4))
    assert (found.hits, found.late, found.misses) == ([], [], [])
    assert residency.is_done
    residency.end_event()


def test_events_do_not_nest_or_end_early() -> None:
    residency = new_residency(grid(1, 4), [2])
    residency.begin_event(event(0, [1], 4))
    with pytest.raises(AssertionError, match="members left"):
        residency.end_event()
    with pytest.raises(AssertionError, match="not ended"):
        residency.begin_event(event(0, [2], 4))


def test_size_classes_do_not_borrow_slots() -> None:
    shape = grid(3, 6)
    residency = new_residency(shape, [2, 1], class_of_layer=[0, 1, 0])
    driver = Driver(residency, np.random.default_rng(4))
    for layer, expert in itertools.product([0, 1, 2, 1, 0], range(6)):
        driver.run(event(layer, [expert], 6))
    for load in driver.log:
        assert (load.slot == 2) == (load.key.layer == 1)
        assert load.victim is None or (load.victim.layer == 1) == (load.key.layer == 1)


@settings(max_examples=40)
@given(
    slots=st.tuples(st.integers(1, 20), st.integers(1, 20)),
    seed=st.integers(0, 999),
    per_layer=st.tuples(*[st.integers(3, 10)] * 4),
)
def test_ragged_layers_in_two_classes(
    slots: tuple[int, int], seed: int, per_layer: tuple[int, ...]
) -> None:
    shape = grid(4, 10, top_k=3, per_layer=per_layer)
    residency = new_residency(shape, slots, "next_use", class_of_layer=[0, 1, 1, 0])
    driver = Driver(residency, np.random.default_rng(seed))
    for number, each in enumerate(random_decode(shape, 6, seed)):
        ahead = [
            key((each.layer + 1) % 4, e) for e in range(min(3, per_layer[(each.layer + 1) % 4]))
        ]
        driver.run(each, prefetch=ahead if number % 2 else ())


def test_what_is_loaded_ahead_for_a_layer_that_never_runs_is_given_up() -> None:
    """Of a model whose layers do not all run in every pass; else nothing would be loaded ahead
    any more once a ring's worth of them had gathered."""
    residency = new_residency(grid(4, 16, top_k=2), [16])
    driver = Driver(residency)
    for expert in range(0, 12, 2):
        residency.begin_pass("decode")
        driver.run(event(0, [0, 1], 16), prefetch=[key(1, expert), key(1, expert + 1)])
        assert residency.room.ahead
        driver.run(event(2, [2, 3], 16))
    residency.begin_pass("decode")
    assert not residency.room.ahead
    assert residency.counters.decode.wasted_loads == residency.counters.decode.proactive_loads > 0


def test_a_prompt_streams_the_layer_that_follows_in_truth() -> None:
    residency = new_residency(grid(4, 4, top_k=2), [8])
    driver = Driver(residency)
    for _ in range(2):
        residency.begin_pass("prefill")
        for layer in (0, 2):
            driver.run(event(layer, range(4), 4, "prefill"))
    streamed = {load.key.layer for load in driver.log[-8:] if load.proactive}
    assert 1 not in streamed


class LoggedCarrier(SimulatedCarrier):
    """Remembers every load it is asked for, and what is computed."""

    def __init__(self, cost: Cost, top_k: int) -> None:
        super().__init__(cost, top_k)
        self.log: list[object] = []

    def start(self, loads: list[Load], priority: Priority) -> None:
        self.log += [(load, priority) for load in loads]
        super().start(loads, priority)

    def compute(self, keys: list[ExpertKey]) -> None:
        self.log.append(sorted(keys))
        super().compute(keys)


def with_foresight(trace: Trace, name: str) -> Trace:
    """Recorded with what later routers say early, at random."""
    wish = find_predictor(name).foresight
    if wish is None:
        return trace
    tokens, layers, _ = trace.ids.shape
    shape = (tokens, layers, wish.depth, trace.shape.num_experts)
    said = np.random.default_rng(0).normal(size=shape).astype(np.float16)
    return dataclasses.replace(trace, foresight={wish.mode: said})


@pytest.mark.parametrize("prefetch", ["none", "transition", "popularity", "gate_lookahead"])
@pytest.mark.parametrize("policy", policy_names())
def test_events_that_only_hit_are_served_the_same_at_once(
    policy: str, prefetch: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    num_tokens = 60 if prefetch == "gate_lookahead" else 20  # it takes a while to stop looking
    trace = with_foresight(random_trace(3, 16, 2, num_tokens, seed=4), prefetch)
    num_at_once = 0
    serve_hits = Residency.serve_hits

    def counted(self: Residency, events: Sequence[Event]) -> list[Lookup] | None:
        nonlocal num_at_once
        found = serve_hits(self, events)
        num_at_once += found is not None
        return found

    def replayed() -> tuple[object, list[object]]:
        carrier = LoggedCarrier(Cost(load_s=0.05, layer_s=1.0), 2)  # at times nothing waits
        found = find_policy(policy)(trace.shape, 30), find_predictor(prefetch)(trace.shape)
        result = replay(trace, *found, [30], carrier=carrier)
        return result.counters, carrier.log

    monkeypatch.setattr(Residency, "serve_hits", counted)
    at_once = replayed()
    monkeypatch.setattr(Residency, "serve_hits", lambda self, events: None)
    assert replayed() == at_once
    is_quiet = prefetch in ("none", "gate_lookahead") and not find_policy(policy).wants_forecast
    assert (num_at_once > 0) == is_quiet
