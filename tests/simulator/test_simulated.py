"""The simulator: known figures, bounds, and what it refuses."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_infinity.errors import ConfigError, TraceError
from moe_infinity.policies import find_policy, policy_names
from moe_infinity.predictors import find_predictor
from moe_infinity.simulator.belady import accesses_of, optimal_misses
from moe_infinity.simulator.cost_model import Cost
from moe_infinity.simulator.replay import Result, lacks, replay, slots_of, teach
from moe_infinity.tracing.trace import Trace
from moe_infinity.tracing.trace_file import load_trace
from support.traces import random_trace

PUBLIC = Path(__file__).parent.parent / "data" / "traces"
# Event-atomic replays of decode rows, one global pool, cold start; percent of look-ups.
FIGURES = {
    ("qwen3_30b_a3b", 0.12): {"lru": 56.8, "lfu": 58.8, "lfru": 61.4, "belady": 77.6},
    ("qwen3_30b_a3b", 0.25): {"lru": 81.6, "lfu": 81.2, "lfru": 83.1, "belady": 89.5},
    ("gpt_oss_120b", 0.12): {"lru": 60.9, "lfu": 62.4, "lfru": 63.1, "belady": 72.0},
}
NEXT_USE = {("qwen3_30b_a3b", 0.12): 62.2, ("qwen3_30b_a3b", 0.25): 83.3}
NEXT_USE |= {("gpt_oss_120b", 0.12): 63.5}
ACTIVATION = {("qwen3_30b_a3b", 0.12): 52.1, ("gpt_oss_120b", 0.12): 55.4}


def public(name: str) -> Trace:
    return load_trace(PUBLIC / f"{name}.npz").of_phase("decode")


def run(trace: Trace, policy: str, capacity: float, prefetch: str = "none", **options: object):
    slots = slots_of(trace.shape, capacity)
    chosen = find_policy(policy)(trace.shape, sum(slots))
    return replay(trace, chosen, find_predictor(prefetch)(trace.shape), slots, **options)


def belady_hits(trace: Trace, capacity: float) -> float:
    events = accesses_of(trace)
    misses = optimal_misses(events, sum(slots_of(trace.shape, capacity)), trace.shape.num_experts)
    return 1 - sum(misses) / sum(len(experts) for _, experts in events)


def percent(result: Result) -> float:
    assert result.hit_rate is not None
    return 100 * result.hit_rate


@pytest.mark.parametrize(("name", "capacity"), FIGURES)
def test_public_traces_give_the_known_figures(name: str, capacity: float) -> None:
    trace = public(name)
    for policy, expected in FIGURES[name, capacity].items():
        if policy == "belady":
            assert 100 * belady_hits(trace, capacity) == pytest.approx(expected, abs=0.15)
        else:
            assert percent(run(trace, policy, capacity)) == pytest.approx(expected, abs=0.15)
    found = percent(run(trace, "next_use", capacity))
    assert found == pytest.approx(NEXT_USE[name, capacity], abs=0.5)


@pytest.mark.parametrize(("name", "capacity"), ACTIVATION)
def test_the_papers_rule_without_a_prediction(name: str, capacity: float) -> None:
    found = percent(run(public(name), "activation", capacity))
    assert found == pytest.approx(ACTIVATION[name, capacity], abs=0.15)


@pytest.mark.slow
def test_recency_collapses_below_one_tokens_working_set() -> None:
    assert percent(run(public("qwen3_30b_a3b"), "lru", 0.04)) == 0.0
    assert percent(run(public("qwen3_30b_a3b"), "next_use", 0.04)) > 30


@pytest.mark.parametrize("policy", policy_names())
@settings(max_examples=100)
@given(seed=st.integers(0, 2**32 - 1), slots=st.integers(3, 12))
def test_no_policy_beats_the_offline_optimum(policy: str, seed: int, slots: int) -> None:
    """Demand-only, over about a thousand random traces with all policies together."""
    trace = random_trace(num_layers=2, num_experts=6, top_k=3, tokens=12, seed=seed)
    result = replay(
        trace,
        find_policy(policy)(trace.shape, slots),
        find_predictor("none")(trace.shape),
        (slots,),
    )
    events = accesses_of(trace)
    assert result.counters.misses >= sum(optimal_misses(events, slots, 6))
    assert result.counters.hits + result.counters.misses == 12 * 2 * 3


def test_bypass_never_misses_more_than_forced_admission() -> None:
    trace = random_trace(num_layers=3, num_experts=8, top_k=2, tokens=60, seed=3)
    events = accesses_of(trace)
    forced = sum(optimal_misses(events, 6, 8))
    assert sum(optimal_misses(events, 6, 8, bypass=True)) <= forced


def test_pools_of_their_own_per_layer() -> None:
    trace = random_trace(num_layers=4, num_experts=8, top_k=2, tokens=40, seed=1)
    slots = slots_of(trace.shape, 0.5, "layer")
    assert slots == (4, 4, 4, 4)
    policy = find_policy("lru")(trace.shape, 16)
    result = replay(trace, policy, find_predictor("none")(trace.shape), slots)
    assert 0 < percent(result) < 100


def test_an_oracle_that_loads_ahead_saves_nearly_every_stall() -> None:
    trace = random_trace(num_layers=6, num_experts=16, top_k=2, tokens=80, seed=2)
    cost = Cost(load_s=0.5, layer_s=1.0)
    plain = run(trace, "lru", 0.25, cost=cost)
    foresighted = run(trace, "lru", 0.25, "oracle", cost=cost)
    assert foresighted.stall_s < 0.35 * plain.stall_s
    assert foresighted.counters.proactive_loads > 0
    assert plain.counters.proactive_loads == 0


def test_a_forecast_of_the_truth_approaches_the_optimum() -> None:
    trace = random_trace(num_layers=4, num_experts=16, top_k=2, tokens=150, seed=4)
    lru, best = percent(run(trace, "lru", 0.25)), 100 * belady_hits(trace, 0.25)
    slots = slots_of(trace.shape, 0.25)
    policy = find_policy("forecast")(trace.shape, sum(slots))
    oracle = find_predictor("oracle")(trace.shape, num_steps=40)
    oracle.predict = lambda: None  # its foresight is for the policy alone
    found = percent(replay(trace, policy, oracle, slots))
    assert found == pytest.approx(best, abs=1.0)
    assert found > lru + 3


def test_what_a_trace_lacks_is_named() -> None:
    trace, lru = random_trace(2, 6, 2, 5, seed=0), find_policy("lru")
    assert lacks(trace, lru, find_predictor("none")) is None
    assert lacks(trace, lru, find_predictor("gate_lookahead")) == "foresight in mode residual"


def test_an_oracle_is_not_confused_by_history() -> None:
    trace = random_trace(4, 16, 2, 60, seed=5)
    slots, cost = slots_of(trace.shape, 0.25), Cost(load_s=0.5, layer_s=1.0)
    stalls = []
    for history in (False, True):
        oracle = find_predictor("oracle")(trace.shape)
        if history:
            teach(oracle, random_trace(4, 16, 2, 20, seed=6))
        policy = find_policy("lru")(trace.shape, sum(slots))
        stalls.append(replay(trace, policy, oracle, slots, cost).stall_s)
    assert stalls[0] == stalls[1]


def test_predictors_learn_from_history() -> None:
    trace = random_trace(4, 16, 2, 60, seed=5)
    predictor = find_predictor("eamc")(trace.shape)
    assert predictor.predict() is None
    teach(predictor, trace)
    predictor.begin_request()
    predictor.observe(next(trace.passes()).events[0])
    assert predictor.predict() is not None


def test_too_little_capacity_is_refused() -> None:
    with pytest.raises(ConfigError, match="expected at least 6"):
        slots_of(public("qwen3_30b_a3b").shape, 0.0005)


def test_incomplete_rows_are_refused() -> None:
    with pytest.raises(TraceError, match="no experts recorded"):
        load_trace(PUBLIC / "qwen3_30b_a3b.npz").of_phase("prefill")
