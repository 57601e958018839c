"""The offline optimum against exhaustive search, and no policy may beat it."""

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_infinity.policies import policy_names
from moe_infinity.simulator.belady import optimal_misses
from support.routing import Driver, grid, new_residency, random_decode

NUM_EXPERTS = 3
Accesses = list[tuple[int, frozenset[int]]]


def fewest_misses(accesses: Accesses, num_slots: int, initial: frozenset[int]) -> int:
    """Every choice of what to keep after every event, cheapest total first found by dynamic
    programming over resident sets. An event that fits has to be resident whole."""
    costs = {initial: 0}
    for layer, experts in accesses:
        members = frozenset(layer * NUM_EXPERTS + e for e in experts)
        forced = members if len(members) <= num_slots else frozenset()
        after: dict[frozenset[int], int] = {}
        for resident, cost in costs.items():
            total = cost + len(members - resident)
            optional = (resident | members) - forced
            for count in range(min(num_slots - len(forced), len(optional)) + 1):
                for kept in combinations(sorted(optional), count):
                    state = forced | frozenset(kept)
                    after[state] = min(total, after.get(state, total))
        costs = after
    return min(costs.values())


def as_events(accesses: Accesses) -> list[tuple[int, np.ndarray]]:
    return [(layer, np.array(sorted(e), dtype=np.int16)) for layer, e in accesses]


members = st.frozensets(st.integers(0, NUM_EXPERTS - 1), max_size=NUM_EXPERTS)


@settings(max_examples=150)
@given(
    accesses=st.lists(st.tuples(st.integers(0, 1), members), max_size=9),
    num_slots=st.integers(1, 4),
    initial=st.frozensets(st.integers(0, 5), max_size=4),
)
def test_no_choice_of_victims_does_better(
    accesses: Accesses, num_slots: int, initial: frozenset[int]
) -> None:
    initial = frozenset(sorted(initial)[:num_slots])
    found = optimal_misses(as_events(accesses), num_slots, NUM_EXPERTS, initial)
    assert len(found) == len(accesses)
    assert sum(found) == fewest_misses(accesses, num_slots, initial)


def test_a_known_trace() -> None:
    """a b c a b d a b c d in three slots: the textbook's six misses."""
    accesses = [(0, frozenset([e])) for e in (0, 1, 2, 0, 1, 3, 0, 1, 2, 3)]
    assert optimal_misses(as_events(accesses), 3, 4) == [1, 1, 1, 0, 0, 1, 0, 0, 1, 0]


def test_empty_trace_and_warm_start() -> None:
    assert optimal_misses([], 4, 8) == []
    event = (1, np.array([2, 3], dtype=np.int16))
    assert optimal_misses([event, event], 2, 8, initial=[10, 11]) == [0, 0]
    assert optimal_misses([event], 2, 8, initial=[0, 1]) == [2]


@settings(max_examples=15)
@given(
    layers=st.integers(1, 4),
    top_k=st.integers(1, 3),
    seed=st.integers(0, 9999),
    share=st.floats(0, 1),
)
@pytest.mark.parametrize("policy", policy_names())
def test_no_demand_only_policy_beats_it(
    policy: str, layers: int, top_k: int, seed: int, share: float
) -> None:
    shape = grid(layers, 10, top_k)
    num_slots = top_k + round(share * (layers * 10 - top_k))
    events = random_decode(shape, 30, seed)
    driver = Driver(new_residency(shape, [num_slots], policy))
    for each in events:
        driver.run(each)
    best = optimal_misses([(e.layer, e.experts.astype(np.int16)) for e in events], num_slots, 10)
    assert sum(best) <= driver.residency.counters.decode.misses


def test_everything_fits() -> None:
    shape = grid(2, 4, 2)
    events = random_decode(shape, 20, seed=3)
    best = optimal_misses([(e.layer, e.experts.astype(np.int16)) for e in events], 8, 4)
    assert sum(best) == len({key for e in events for key in e.keys})
