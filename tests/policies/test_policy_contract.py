"""What every replacement policy must do, whichever files there are."""

import ast
import inspect
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_infinity.policies import find_policy, policy_names
from moe_infinity.policies._guarded import GuardedPolicy
from moe_infinity.policies.base import CachePolicy
from moe_infinity.types import ExpertKey
from support.routing import Driver, event, grid, new_residency, random_decode

RAGGED = grid(3, 8, top_k=3, per_layer=[8, 5, 8])


def warmed(name: str, seed: int = 0, events: int = 30) -> CachePolicy:
    policy = find_policy(name)(RAGGED, 10, seed)
    for each in random_decode(RAGGED, 10, seed=5)[:events]:
        policy.begin_pass("decode")
        policy.on_event(each)
        for key in each.keys:
            policy.on_insert(key)
    return policy


@pytest.fixture(params=policy_names())
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.mark.parametrize("events", [0, 1, 30])
def test_scores_are_one_finite_number_per_expert(name: str, events: int) -> None:
    policy = warmed(name, events=events)
    for layer in range(RAGGED.num_layers):
        scores = policy.keep_scores(layer)
        assert scores.shape == (3, 8)
        assert scores.dtype == np.float64
        assert np.isfinite(scores).all()


def test_asking_changes_nothing(name: str) -> None:
    asked, silent = warmed(name), warmed(name)
    for layer in (0, 2, 1, 0):
        asked.victims(np.arange(24), 3, layer)
        asked.keep_scores(layer)
    assert (asked.keep_scores(1) == silent.keep_scores(1)).all()


def test_the_same_seed_decides_the_same(name: str) -> None:
    logs = []
    for _ in range(2):
        driver = Driver(new_residency(RAGGED, [7], name))
        for each in random_decode(RAGGED, 15, seed=6):
            driver.run(each)
        logs.append(driver.log)
    assert logs[0] == logs[1]


@settings(max_examples=25)
@given(data=st.data(), layer=st.integers(0, 2))
@pytest.mark.parametrize("name", policy_names())
def test_victims_are_distinct_candidates(name: str, data: st.DataObject, layer: int) -> None:
    candidates = sorted(data.draw(st.sets(st.integers(0, 23))))
    count = data.draw(st.integers(0, len(candidates)))
    chosen = warmed(name).victims(np.array(candidates, dtype=np.int64), count, layer)
    assert len(chosen) == len(set(chosen.tolist())) == count
    assert set(chosen.tolist()) <= set(candidates)


def test_more_victims_extend_fewer(name: str) -> None:
    """Asked for all victims of an event at once or one after another, it names the same ones."""
    policy, candidates = warmed(name), np.arange(24)
    ranked = policy.victims(candidates, 24, 1).tolist()
    for count in range(24):
        assert policy.victims(candidates, count, 1).tolist() == ranked[:count]


def test_learns_from_prefill_empty_and_repeated_events(name: str) -> None:
    policy = find_policy(name)(RAGGED, 4)
    policy.begin_request()
    policy.begin_pass("prefill")
    policy.on_event(event(0, range(8), 8, "prefill", counts=range(1, 9)))
    policy.on_event(event(0, [], 8, "prefill"))
    policy.on_event(event(1, [4], 8))
    policy.on_evict(ExpertKey(1, 4))
    policy.end_request()
    assert np.isfinite(policy.keep_scores(2)).all()


def test_an_expert_in_steady_use_outlasts_one_that_was_used_once(name: str) -> None:
    """The least that may be asked of any policy but the trivial one."""
    if name == "fifo":
        pytest.skip("first in, first out forgets use on purpose")
    policy = find_policy(name)(grid(1, 4, top_k=1), 2)
    for expert in (0, 1, 1, 1, 1, 1, 1):
        policy.on_event(event(0, [expert], 4))
        policy.on_insert(ExpertKey(0, expert))
    assert policy.victims(np.array([0, 1]), 1, 0).tolist() == [0]


def test_sees_no_tensors(name: str) -> None:
    """torch is not even imported by a policy's file."""
    tree = ast.parse(source_of(name).read_text())
    modules = {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    modules |= {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
    assert not any(m and m.split(".")[0] in ("torch", "threading") for m in modules)


def test_file_stays_short(name: str) -> None:
    assert len(source_of(name).read_text().splitlines()) < 100


def source_of(name: str) -> Path:
    return Path(inspect.getfile(find_policy(name)))


def test_the_trivial_and_the_default_policy_exist() -> None:
    assert {"fifo", "lru", "next_use"} <= set(policy_names())
    assert "base" not in policy_names()


def test_a_forecast_of_some_layers_only_harms_none(name: str) -> None:
    """What is foreseen to be used is not what goes first."""
    fresh = find_policy(name)(RAGGED, 10)
    if not fresh.wants_forecast:
        pytest.skip("asks for no forecast")
    forecast = np.zeros((1, 3, 8))
    forecast[0, 1, [2, 3]] = 0.9
    fresh.on_event(event(0, [0, 1], 8))
    fresh.on_event(event(1, [2, 3], 8))
    fresh.on_forecast(forecast)
    ranked = fresh.victims(np.arange(24), 22, 0).tolist()
    assert {8 + 2, 8 + 3}.isdisjoint(ranked[:12])


def test_state_arrays_are_the_whole_state(name: str) -> None:
    """Whoever takes them scores alike from then on; a policy without them says so."""
    policy, other = warmed(name), GuardedPolicy(find_policy(name)(RAGGED, 10))
    arrays = {each: array.copy() for each, array in policy.state_arrays().items()}
    if not arrays:
        with pytest.raises(NotImplementedError, match="no kernel form"):
            other.inner.take_state(arrays)
        return
    other.take_state(arrays)
    for layer, each in enumerate(random_decode(RAGGED, 1, seed=7)):
        assert (policy.keep_scores(layer) == other.keep_scores(layer)).all()
        policy.on_event(each)
        other.on_event(each)
    for each, array in other.state_arrays().items():
        assert (array == policy.state_arrays()[each]).all()
