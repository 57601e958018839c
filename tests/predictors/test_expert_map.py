"""expert_map: exact trajectories, unknown ones, the store's bound and its file."""

from pathlib import Path

import numpy as np
import pytest

from moe_infinity.errors import TraceError
from moe_infinity.predictors._map_store import MapStore
from moe_infinity.predictors.expert_map import FIRST_LAYERS, Predictor
from moe_infinity.tracing.event import Event
from support.routing import grid

LAYERS, EXPERTS, TOP_K, WIDTH = 6, 12, 3, 5
SHAPE = grid(LAYERS, EXPERTS, TOP_K)


def logits_of(seed: int, sharp: float = 4.0) -> np.ndarray:
    """[L, E] router logits of a pass."""
    return (np.random.default_rng(seed).normal(size=(LAYERS, EXPERTS)) * sharp).astype(np.float32)


def meaning_of(seed: int) -> np.ndarray:
    return np.random.default_rng(100 + seed).normal(size=(1, WIDTH)).astype(np.float32)


def best(logits: np.ndarray) -> set[int]:
    return set(np.argsort(-logits, kind="stable")[:TOP_K].tolist())


def layer_event(layer: int, logits: np.ndarray) -> Event:
    ids = np.argsort(-logits, kind="stable")[:TOP_K][None]
    weights = np.full(ids.shape, 1 / TOP_K, dtype=np.float32)
    rows = np.zeros(1, dtype=np.int64)
    return Event(0, "decode", layer, rows, ids, weights, len(logits), router_logits=logits[None])


def run_pass(predictor: Predictor, logits: np.ndarray, meaning: np.ndarray) -> None:
    predictor.begin_pass("decode", meaning)
    for layer in range(LAYERS):
        predictor.observe(layer_event(layer, logits[layer]))


def taught(*seeds: int, capacity: int = 1000) -> Predictor:
    predictor = Predictor(SHAPE, capacity=capacity)
    predictor.begin_request()
    for seed in seeds:
        run_pass(predictor, logits_of(seed), meaning_of(seed))
    predictor.end_request()
    return predictor


def test_a_known_pass_is_predicted_to_the_expert() -> None:
    predictor = taught(*range(8))
    truth = logits_of(5)
    predictor.begin_request()
    predictor.begin_pass("decode", meaning_of(5))
    for layer in range(LAYERS):
        scores = predictor.predict()
        assert scores is not None
        for coming in range(layer, LAYERS if layer else FIRST_LAYERS):
            assert set(np.flatnonzero(scores[coming])) == best(truth[coming])
        assert not scores[:layer].any()  # spent
        predictor.observe(layer_event(layer, truth[layer]))


def test_before_the_first_layer_only_the_first_are_spoken_of() -> None:
    predictor = taught(1, 2)
    predictor.begin_request()
    predictor.begin_pass("decode", meaning_of(1))
    scores = predictor.predict()
    assert scores is not None
    assert scores[:FIRST_LAYERS].any(axis=1).all() and not scores[FIRST_LAYERS:].any()


def test_the_path_overrules_the_meaning() -> None:
    predictor = taught(1, 2)
    predictor.begin_pass("decode", meaning_of(1))
    predictor.observe(layer_event(0, logits_of(2)[0]))
    scores = predictor.predict()
    assert scores is not None
    for coming in range(FIRST_LAYERS, LAYERS):
        assert set(np.flatnonzero(scores[coming])) == best(logits_of(2)[coming])


def test_the_less_alike_the_more_experts() -> None:
    """Orthogonal in meaning and path: delta is 1, and the matched map's whole mass is wanted."""
    predictor = Predictor(SHAPE)
    old = np.full((LAYERS, EXPERTS), -40.0, dtype=np.float32)
    old[:, :6] = np.log(np.arange(6, 0, -1))  # six experts hold all the mass
    new = np.full((LAYERS, EXPERTS), -40.0, dtype=np.float32)
    new[:, 6:9] = 0
    run_pass(predictor, old, np.eye(WIDTH, dtype=np.float32)[:1])
    predictor.begin_pass("decode", np.eye(WIDTH, dtype=np.float32)[1:2])
    mass = np.exp(old[0]) / np.exp(old[0]).sum()
    scores = predictor.predict()
    assert scores is not None
    assert (mass[scores[0] > 0]).sum() == pytest.approx(1.0, abs=1e-3)
    predictor.observe(layer_event(0, new[0]))
    assert (mass[scores[LAYERS - 1] > 0]).sum() == pytest.approx(1.0, abs=1e-3)


@pytest.mark.parametrize("mixed", [0.3, 0.6, 0.9])
def test_chosen_experts_hold_the_mass_that_is_missing(mixed: float) -> None:
    predictor = taught(3)
    old = meaning_of(3)[0] / np.linalg.norm(meaning_of(3))
    other = np.linalg.qr(np.stack([old, np.ones(WIDTH)]).T)[0][:, 1]
    new = mixed * old + (1 - mixed**2) ** 0.5 * other
    predictor.begin_pass("decode", new[None].astype(np.float32))
    scores = predictor.predict()
    assert scores is not None
    for layer in range(FIRST_LAYERS):
        p = np.exp(logits_of(3)[layer])
        p = np.sort(p / p.sum())[::-1]
        enough = int((p.cumsum() < 1 - mixed).sum()) + 1
        assert (scores[layer] > 0).sum() == max(TOP_K, enough)


def test_chances_follow_what_came_true() -> None:
    right, wrong = taught(1), taught(1)
    for _ in range(200):
        run_pass(right, logits_of(1), meaning_of(1))
        run_pass(wrong, -logits_of(1), meaning_of(1))
        wrong.store.size = right.store.size = 1  # the same match again
    chances = []
    for predictor in (right, wrong):
        predictor.begin_pass("decode", meaning_of(1))
        scores = predictor.predict()
        assert scores is not None
        chances.append(scores[0].max())
    assert chances[0] > 0.9 and chances[1] < 0.1


def test_similarity_is_the_cosine_of_the_whole_path() -> None:
    store = MapStore(SHAPE, 10, FIRST_LAYERS)
    rng = np.random.default_rng(0)
    maps = rng.random((4, LAYERS, EXPERTS)).astype(np.float32)
    for each in maps[:3]:
        store.begin(rng.random(WIDTH).astype(np.float32))
        for layer in range(LAYERS):
            store.follow(layer, each[layer])
        store.keep()
    store.begin(rng.random(WIDTH).astype(np.float32))
    for layer in range(LAYERS):
        similar = store.follow(layer, maps[3, layer])
        flat = maps[:, : layer + 1].reshape(4, -1)
        flat = flat / np.linalg.norm(flat, axis=1, keepdims=True)
        np.testing.assert_allclose(similar, flat[:3] @ flat[3], rtol=1e-5)


def test_a_full_store_gives_up_the_one_most_alike() -> None:
    predictor = taught(1, 2, 3, capacity=3)
    run_pass(predictor, logits_of(2) + 0.01, meaning_of(2))
    predictor.end_request()
    assert predictor.store.size == 3
    for seed in (1, 2, 3):
        assert predictor.store.begin(meaning_of(seed)[0]).max() == pytest.approx(1.0, abs=1e-5)
    run_pass(predictor, logits_of(9), meaning_of(2))  # alike in meaning only: one goes, not two
    predictor.end_request()
    assert predictor.store.size == 3


def test_passes_cut_short_or_without_logits_teach_nothing() -> None:
    predictor = Predictor(SHAPE)
    predictor.begin_pass("decode", meaning_of(1))
    predictor.observe(layer_event(0, logits_of(1)[0]))
    predictor.begin_request()  # the request before was given up
    predictor.begin_pass("prefill", meaning_of(1))
    predictor.observe(layer_event(0, logits_of(1)[0]))
    predictor.begin_pass("decode", None)
    predictor.observe(layer_event(0, logits_of(1)[0]))
    predictor.end_request()
    assert predictor.store.size == 0 and predictor.predict() is None


def test_what_was_saved_predicts_the_same(tmp_path: Path) -> None:
    first = taught(*range(6))
    first.save(tmp_path / "maps")
    second = Predictor(SHAPE)
    second.load(tmp_path / "maps")
    for predictor in (first, second):
        predictor.begin_pass("decode", meaning_of(4))
        predictor.observe(layer_event(0, logits_of(4)[0]))
    one, other = first.predict(), second.predict()
    assert one is not None and other is not None
    assert (one > 0).tolist() == (other > 0).tolist()
    np.testing.assert_allclose(one, other)


def test_another_model_is_refused(tmp_path: Path) -> None:
    taught(1).save(tmp_path / "maps")
    with pytest.raises(TraceError, match="this one has"):
        Predictor(grid(LAYERS, EXPERTS, TOP_K + 1)).load(tmp_path / "maps")
