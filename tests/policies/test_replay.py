"""The policies, driven through Residency, against replays written from their definitions.

Event-atomic, one pool, cold start, forced admission; uses of the current event count before its
evictions; ties go to the smallest (layer, expert).
"""

from collections.abc import Callable
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_infinity.residency.running import Load
from moe_infinity.tracing.event import Event
from moe_infinity.types import ExpertKey, ExpertShape
from support.routing import Driver, grid, new_residency, random_decode

History = list[list[ExpertKey]]  # members of every event so far, the current one last
Score = Callable[[ExpertKey, History, ExpertShape], float | Fraction | tuple[int, ...]]


def uses(key: ExpertKey, history: History) -> list[int]:
    return [number for number, members in enumerate(history) if key in members]


def lru(key: ExpertKey, history: History, shape: ExpertShape) -> tuple[int, ...]:
    return (uses(key, history)[-1],)


def lfu(key: ExpertKey, history: History, shape: ExpertShape) -> tuple[int, ...]:
    used = uses(key, history)
    return (len(used), used[-1])


def lfru(key: ExpertKey, history: History, shape: ExpertShape) -> Fraction:
    used = uses(key, history)
    return Fraction(len(used), len(history) - 1 - used[-1] + 1)


def next_use(key: ExpertKey, history: History, shape: ExpertShape) -> float:
    """Minus the expected number of events to the next use, summed afresh from the whole history."""
    here = history[-1][0].layer
    passes = [members for members in history if members[0].layer == key.layer][::-1]
    ages = [age for age, members in enumerate(passes) if key in members]

    def decayed(rate: float) -> tuple[float, float]:
        return sum(rate**age for age in ages), sum(rate**age for age in range(len(passes)))

    fast, slow, weight = decayed(0.9), decayed(0.998), 8.0
    base = min(max(slow[0] / slow[1], 0.3 * shape.top_k / shape.num_experts), 1.0)
    p = min(max((fast[0] + weight * base) / (fast[1] + weight), 1e-4), 1.0)
    way = (key.layer - here) % shape.num_layers or shape.num_layers
    return -((1 / p - 1) * shape.num_layers + way)


def replay(
    events: list[Event], num_slots: int, shape: ExpertShape, score: Score
) -> list[tuple[list[ExpertKey], list[ExpertKey]]]:
    """Hits and victims of every event."""
    resident: set[ExpertKey] = set()
    history: History = []
    result = []
    for each in events:
        members = each.keys
        history.append(members)
        hits = [key for key in members if key in resident]
        going: list[ExpertKey] = []
        excess = len(resident | set(members)) - num_slots
        if excess > 0:
            others = sorted(resident - set(members))
            going = sorted(others, key=lambda k: (score(k, history, shape), k))[:excess]
        resident = (resident - set(going)) | set(members)
        result.append((hits, going))
    return result


def driven(
    events: list[Event], num_slots: int, shape: ExpertShape, policy: str, disk: int
) -> list[tuple[list[ExpertKey], list[ExpertKey]]]:
    driver = Driver(new_residency(shape, [num_slots], policy), np.random.default_rng(disk))
    result = []
    for each in events:
        before = len(driver.log)
        hits = driver.run(each).hits
        loads: list[Load] = driver.log[before:]
        result.append((hits, [load.victim for load in loads if load.victim is not None]))
    return result


@settings(max_examples=25)
@given(
    layers=st.integers(1, 4),
    top_k=st.integers(1, 3),
    share=st.floats(0, 1),
    seed=st.integers(0, 9999),
)
@pytest.mark.parametrize(("policy", "score"), [("lru", lru), ("lfu", lfu), ("lfru", lfru)])
def test_same_hits_and_victims(
    policy: str, score: Score, layers: int, top_k: int, share: float, seed: int
) -> None:
    shape = grid(layers, 8, top_k)
    num_slots = top_k + round(share * (layers * 8 - top_k))
    events = random_decode(shape, 25, seed)
    expected = replay(events, num_slots, shape, score)
    assert driven(events, num_slots, shape, policy, seed) == expected


@settings(max_examples=25)
@given(
    layers=st.integers(1, 4),
    top_k=st.integers(1, 3),
    share=st.floats(0, 1),
    seed=st.integers(0, 9999),
)
def test_next_use_ranks_as_defined(layers: int, top_k: int, share: float, seed: int) -> None:
    """Sums kept up to date and sums made afresh differ in the last bits, so ties may fall either
    way: every victim must be as far from its next use as the definition's choice."""
    shape = grid(layers, 8, top_k)
    num_slots = top_k + round(share * (layers * 8 - top_k))
    driver = Driver(new_residency(shape, [num_slots], "next_use"))
    history: History = []
    resident: set[ExpertKey] = set()
    for each in random_decode(shape, 25, seed):
        history.append(each.keys)
        before = len(driver.log)
        found = driver.run(each)
        assert found.hits == [key for key in each.keys if key in resident]
        victims = [load.victim for load in driver.log[before:] if load.victim is not None]
        scores = {key: next_use(key, history, shape) for key in resident - set(each.keys)}
        worst = sorted(scores.values())[: len(victims)]
        assert [scores[key] for key in victims] == pytest.approx(worst, rel=1e-9)
        resident = (resident - set(victims)) | set(each.keys)


def test_lru_collapses_below_one_tokens_working_set() -> None:
    """Layers come round in a cycle: one event's slots too few, and what is needed has just gone."""
    shape = grid(4, 6, top_k=2)
    events = [e for e in random_decode(shape, 1, seed=1)] * 20

    def hits(policy: str, num_slots: int) -> int:
        return sum(len(found) for found, _ in driven(events, num_slots, shape, policy, 0))

    assert hits("lru", 6) == 0
    assert hits("lru", 8) == 19 * 8
    assert hits("next_use", 6) > 0
