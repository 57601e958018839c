"""Trained predictors find what is there to find, and nothing where there is nothing."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from moe_infinity.errors import TraceError
from moe_infinity.predictors import find_predictor
from moe_infinity.tracing.join import concatenate
from moe_infinity.tracing.trace import Trace
from moe_infinity.training import TRAINERS
from moe_infinity.training.measuring import measures, recall, split
from moe_infinity.training.watching import watch
from support.learnable import EXPERTS, LAYERS, TOP_K, by_embedding, by_hidden, with_logits
from support.traces import random_trace, trace_of

MAKERS = {"learned": by_hidden, "sequence": by_embedding}
NEEDS = {"learned": "router inputs", "sequence": "embeddings"}
CHANCE = TOP_K / EXPERTS


@pytest.fixture(scope="module", params=sorted(TRAINERS))
def fitted(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    """(name, file, measures) of a trainer, trained once."""
    path = tmp_path_factory.mktemp("fitted") / "networks"
    return request.param, path, TRAINERS[request.param](MAKERS[request.param](800, 1), path, 0)


def test_learns_what_can_be_learned(fitted: tuple[str, Path, dict[str, float]]) -> None:
    assert fitted[2]["validation_recall"] > 0.9
    assert fitted[2]["train_recall"] > 0.9


def test_the_file_predicts_new_requests(fitted: tuple[str, Path, dict[str, float]]) -> None:
    name, path, _ = fitted
    fresh = MAKERS[name](200, 2)
    predictor = find_predictor(name)(fresh.shape)
    assert recall(predictor, fresh) == (0.0, 0.0)  # silent until loaded
    predictor.load(path)
    found, spoken = recall(predictor, fresh)
    assert found > 0.9
    assert spoken == (1.0 if name == "sequence" else (LAYERS - 1) / LAYERS)


@pytest.mark.parametrize("name", sorted(TRAINERS))
def test_shuffled_labels_teach_nothing(name: str, tmp_path: Path) -> None:
    result = TRAINERS[name](MAKERS[name](600, 1, shuffled=True), tmp_path / "networks", 0)
    assert result["validation_recall"] < CHANCE + 0.25


def test_the_same_seed_trains_the_same(tmp_path: Path) -> None:
    state = torch.get_rng_state()
    trace = by_hidden(100, 1)
    for run in ("a", "b", "c"):
        TRAINERS["learned"](trace, tmp_path / run, 1 if run == "c" else 0)
    weights = [load_file(tmp_path / run)["w1"].tolist() for run in ("a", "b", "c")]
    assert weights[0] == weights[1] != weights[2]
    assert torch.equal(state, torch.get_rng_state())  # the caller's draws are its own


@pytest.mark.parametrize("name", sorted(TRAINERS))
def test_a_trace_without_inputs_is_refused(name: str, tmp_path: Path) -> None:
    trace = random_trace(2, 8, 2, 40, seed=0)
    with pytest.raises(TraceError, match=rf"{NEEDS[name]}.*--hidden"):
        TRAINERS[name](trace, tmp_path / "networks", 0)
    with pytest.raises(TraceError, match="expected at least 2"):
        TRAINERS[name](MAKERS[name](10, 0), tmp_path / "networks", 0)


def test_another_model_is_refused(
    fitted: tuple[str, Path, dict[str, float]], tmp_path: Path
) -> None:
    name, path, _ = fitted
    other = random_trace(LAYERS, EXPERTS, TOP_K + 1, 20, seed=0)
    with pytest.raises(TraceError, match="this one has"):
        find_predictor(name)(other.shape).load(path)


def test_split_holds_back_a_tenth_of_the_requests() -> None:
    early, late = split(random_trace(2, 8, 2, 200, seed=0))
    assert len(np.unique(early.request)) == 18 and len(np.unique(late.request)) == 2


def test_an_oracle_recalls_everything_and_silence_nothing() -> None:
    trace = random_trace(3, 8, 2, 60, seed=0)
    oracle = find_predictor("oracle")(trace.shape)
    oracle.set_future([event for each in trace.passes() for event in each.events])
    assert recall(oracle, trace)[0] == 1.0
    silent = measures(find_predictor("none")(trace.shape), *split(trace))
    assert silent == {"train_recall": 0.0, "validation_recall": 0.0, "spoken": 0.0}


def two_habits(requests: int) -> Trace:
    """Requests of two kinds, each of which uses the same experts in every token."""
    rng = np.random.default_rng(0)
    rows = np.array([rng.permutation(EXPERTS)[:TOP_K] for _ in range(2 * LAYERS)])
    kinds = np.repeat(np.arange(requests) % 2, 10)
    return trace_of(rows.reshape(2, LAYERS, TOP_K)[kinds], EXPERTS)


@pytest.mark.parametrize("name", ["popularity", "transition", "transition_pairs", "eamc"])
def test_watching_saves_what_can_be_loaded(name: str, tmp_path: Path) -> None:
    trace = two_habits(30)
    result = watch(find_predictor(name)(trace.shape), trace, tmp_path / "learned")
    find_predictor(name)(trace.shape).load(tmp_path / "learned")
    assert result["validation_recall"] > 1.5 * CHANCE


def test_expert_map_learns_a_language_of_few_paths(tmp_path: Path) -> None:
    trace = with_logits(by_embedding(400, 1))
    result = watch(find_predictor("expert_map")(trace.shape), trace, tmp_path / "learned")
    assert result["validation_recall"] > 0.7
    assert result["spoken"] == 1.0


def renamed(trace: Trace, name: str, fingerprint: str) -> Trace:
    return replace(trace, meta={**trace.meta, "name": name, "fingerprint": fingerprint})


def test_concatenated_traces_are_replayed_one_after_the_other() -> None:
    first, second = by_hidden(30, 1), by_hidden(20, 2)
    both = concatenate([renamed(first, "a", "x"), renamed(second, "b", "")])
    assert both.fingerprint == "x" and both.name == "a + b"
    assert len(np.unique(both.request)) == 5 and len(np.unique(both.step)) == 50
    events = [
        event for trace in (first, second) for each in trace.passes() for event in each.events
    ]
    joined = [event for each in both.passes() for event in each.events]
    assert len(joined) == len(events)
    for one, other in zip(joined, events, strict=True):
        assert (one.top_k_index == other.top_k_index).all()
        assert (one.router_input == other.router_input).all()
    assert sum(each.starts_request for each in both.passes()) == 5


def test_what_only_one_trace_holds_is_left_out() -> None:
    first, second = by_hidden(20, 1), with_logits(by_hidden(20, 2))
    both = concatenate([first, second])
    assert both.logits is None and both.hidden is not None


def test_traces_of_two_models_are_not_joined() -> None:
    first = by_hidden(20, 1)
    with pytest.raises(TraceError, match="one model"):
        concatenate([first, random_trace(LAYERS, EXPERTS, TOP_K + 1, 20, seed=0)])
    with pytest.raises(TraceError, match=r"checkpoint y.*of x"):
        concatenate([renamed(first, "a", "x"), renamed(first, "b", "y")])
