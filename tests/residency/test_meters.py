"""Prefetching that does not pay is switched off, and on again when it would."""

import numpy as np
import pytest

from moe_infinity.residency.directory import Directory
from moe_infinity.residency.meters import (
    Horizon,
    QuickerMeter,
    StallMeter,
    Threshold,
    WasteMeter,
)
from moe_infinity.residency.planner import PrefetchPlanner
from moe_infinity.residency.running import Lookup
from support.guesses import Guessing
from support.routing import event, grid

NOTHING_FOUND = Lookup([], [], [], [])


def test_wrong_guesses_switch_it_off_and_right_ones_on_again() -> None:
    meter = WasteMeter()
    meter.judge(0, 30)
    assert meter.is_on and 0 < meter.allowance(16) <= 16
    meter.judge(0, 100)
    assert not meter.is_on and meter.allowance(16) == 0
    meter.judge(10, 0)
    assert not meter.is_on
    meter.judge(100, 0)
    assert meter.is_on and meter.allowance(16) == 16


def test_it_throttles_in_between() -> None:
    meter = WasteMeter()
    allowed = [meter.allowance(16)]
    for _ in range(60):
        meter.judge(0, 1)
        allowed.append(meter.allowance(16))
    assert allowed[0] == 16 and allowed == sorted(allowed, reverse=True)
    assert len(set(allowed)) > 4


def test_the_horizon_grows_with_late_loads_and_shrinks_with_waste() -> None:
    horizon = Horizon(most=4)
    start = horizon.reach
    horizon.learn(num_late=8, num_wasted=0)
    assert horizon.reach == 4 > start
    horizon.learn(num_late=0, num_wasted=200)
    assert horizon.reach == 1


def planner() -> PrefetchPlanner:
    shape = grid(4, 8, top_k=2)
    return PrefetchPlanner(Guessing(shape), Directory(shape, (10,), (0,) * 4))


def test_a_planner_that_is_off_still_judges_its_guesses() -> None:
    plan = planner()
    guesses = plan.predictor
    assert isinstance(guesses, Guessing)
    for _ in range(40):  # always wrong
        guesses.say({(1, 0): 1.0, (1, 1): 1.0, (1, 2): 1.0})
        plan.plan(0)
        plan.observe(event(1, [6, 7], 8), NOTHING_FOUND)
    guesses.say({(1, 0): 1.0})
    assert plan.plan(0).load == []
    for _ in range(60):  # right from now on, though nothing is loaded
        plan.observe(event(1, [0, 1], 8), NOTHING_FOUND)
        guesses.say({(1, 0): 1.0, (1, 1): 1.0})
        plan.plan(0)
    assert len(plan.plan(0).load) == 2


def test_residents_that_are_about_to_be_used_are_kept() -> None:
    plan = planner()
    key = plan.directory.key(9)
    plan.directory.begin_load(key)
    plan.directory.complete(key)
    assert isinstance(plan.predictor, Guessing)
    plan.predictor.say({(1, 1): 0.9, (1, 2): 0.2})
    coming = plan.plan(0)
    assert coming.load == [] and coming.keep.tolist() == [9]


def test_what_lies_beyond_the_horizon_waits() -> None:
    plan = planner()
    assert isinstance(plan.predictor, Guessing)
    plan.predictor.say({(3, 1): 1.0})
    plan.horizon.layers = 2.0
    assert plan.plan(0).load == []
    plan.horizon.layers = 3.0
    assert [tuple(key) for key in plan.plan(0).load] == [(3, 1)]
    assert np.isfinite(plan.horizon.layers)


def test_looking_ahead_ends_where_nothing_waits_and_begins_where_something_does() -> None:
    meter = StallMeter()
    assert meter.is_worth_it
    for _ in range(200):
        meter.spend(0.0, 1.0)
    assert not meter.is_worth_it
    meter.spend(0.0, 0.0)  # no time passed: nothing to learn
    for _ in range(20):
        meter.spend(0.5, 1.0)
    assert meter.is_worth_it


def test_late_loads_raise_the_threshold_and_punctual_ones_lower_it() -> None:
    threshold = Threshold()
    start = threshold.chance
    threshold.judge(num_late=100, num_in_time=0)
    assert start < threshold.chance <= threshold.busy
    threshold.judge(num_late=0, num_in_time=300)
    assert threshold.idle <= threshold.chance < start


def test_several_events_at_once_count_as_many() -> None:
    """A pass is told as a whole: the same as its events one by one."""
    together, apart = StallMeter(), StallMeter()
    together.spend(0.9, 3.0, 12)
    for _ in range(12):
        apart.spend(0.075, 0.25)
    assert together.share == pytest.approx(apart.share) != StallMeter().share


class TestQuicker:
    def test_tries_both_and_keeps_the_quicker(self) -> None:
        for on_s, off_s in ((1.0, 2.0), (2.0, 1.0)):
            meter = QuickerMeter(window=4)
            ways = []
            for _ in range(40):
                ways.append(meter.is_on)
                meter.spend(on_s if meter.is_on else off_s)
            assert ways[:8] == [False] * 4 + [True] * 4
            assert set(ways[8:]) == {on_s < off_s}

    def test_a_slow_first_pass_does_not_count(self) -> None:
        meter = QuickerMeter(window=5)
        for pass_number in range(30):
            compiles = pass_number == 5
            meter.spend(100.0 if compiles else 1.0 if meter.is_on else 2.0)
        assert meter.is_on

    def test_the_other_way_is_tried_again(self) -> None:
        meter = QuickerMeter(window=2, retry=4)
        ways = []
        for _ in range(40):
            ways.append(meter.is_on)
            meter.spend(2.0 if meter.is_on else 1.0)
        assert 0 < sum(ways[8:]) < 16
