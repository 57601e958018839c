"""The simulator's link: who is served when. Times are in seconds of its own clock."""

import pytest

from moe_infinity.residency.runner import Settled
from moe_infinity.residency.running import Load
from moe_infinity.simulator.cost_model import Cost, SimulatedCarrier
from moe_infinity.types import ExpertKey, Priority

A, B, C = (ExpertKey(0, e) for e in range(3))


def carrier(**cost: float) -> SimulatedCarrier:
    return SimulatedCarrier(Cost(**{"load_s": 4.0, "layer_s": 0.0, **cost}), top_k=2)


def load(key: ExpertKey) -> Load:
    return Load(key, slot=0, victim=None)


def arrivals(link: SimulatedCarrier) -> dict[ExpertKey, float]:
    """When each load under way settles, and whether it arrived."""
    times = {}
    while link._jobs:
        link.wait()
        for settled in link.collect():
            times[settled.key] = link.now_s if settled.arrived else -link.now_s
    return times


def test_a_demand_load_waits_for_one_chunk_of_a_prefetch_at_most() -> None:
    link = carrier()
    link.start([load(A)], Priority.PREFETCH)
    link.spend(0.5)
    link.start([load(B)], Priority.DEMAND)
    assert arrivals(link) == {B: 5.0, A: 8.0}


def test_loads_of_one_priority_are_served_in_their_order() -> None:
    link = carrier()
    link.start([load(B), load(A)], Priority.DEMAND)
    assert arrivals(link) == {B: 4.0, A: 8.0}


def test_a_joined_prefetch_goes_before_other_prefetches() -> None:
    link = carrier()
    link.start([load(A), load(B), load(C)], Priority.PREFETCH)
    link.promote(C)
    assert arrivals(link)[C] == 5.0


def test_a_cancelled_one_settles_without_arriving() -> None:
    link = carrier()
    link.start([load(A), load(B)], Priority.PREFETCH)
    link.cancel(B)
    assert link.collect() == [Settled(B, arrived=False)]
    link.spend(0.5)
    link.cancel(A)
    assert link.collect() == []  # its chunk is being read
    assert arrivals(link) == {A: -1.0}


def test_waiting_is_stalling_and_computing_is_not() -> None:
    link = carrier(layer_s=2.0, dense_share=0.5)
    link.start([load(A)], Priority.DEMAND)
    link.compute([B])  # half a second: (1 - 0.5) * 2 / 2
    link.wait()
    assert (link.now_s, link.stall_s) == (4.0, 3.5)


def test_without_cost_everything_is_there_at_once() -> None:
    link = SimulatedCarrier(Cost(), top_k=2)
    link.start([load(A), load(B)], Priority.PREFETCH)
    assert [settled.key for settled in link.collect()] == [A, B]
    assert link.now_s == 0.0


def test_latency_delays_the_first_byte() -> None:
    link = carrier(latency_s=3.0)
    link.start([load(A)], Priority.DEMAND)
    assert arrivals(link) == {A: 7.0}


def test_waiting_for_nothing_is_an_error() -> None:
    with pytest.raises(AssertionError, match="nobody began"):
        carrier().wait()
