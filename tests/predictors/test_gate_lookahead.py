"""Look-ahead by the model's own routers: chances are learned, and what is spent is forgotten."""

import numpy as np
import pytest

from moe_infinity.predictors import find_predictor
from moe_infinity.predictors.gate_lookahead import DEPTH, Predictor
from support.routing import event, grid

SHAPE = grid(5, 8, top_k=2)
NAMES = ("gate_lookahead", "gate_lookahead_raw", "gate_lookahead_next_norm")


def said(*favourites: int, depth: int = DEPTH) -> np.ndarray:
    """[1, D, E] scores of one token that prefer these experts at every distance."""
    scores = np.zeros((1, depth, 8), dtype=np.float32)
    scores[..., list(favourites)] = 5.0
    return scores


def test_each_variant_asks_for_its_own_input() -> None:
    modes = [find_predictor(name).foresight.mode for name in NAMES]
    assert modes == ["residual", "raw", "next_norm"]


def test_preferred_experts_of_the_next_layers_are_likely() -> None:
    predictor = Predictor(SHAPE)
    predictor.foresee(0, said(3, 6))
    scores = predictor.predict()
    for layer in (1, 2, 3):
        assert set(np.argsort(-scores[layer])[:2]) == {3, 6}
    assert scores[1].max() > scores[2].max() > scores[3].max() > 0.3
    assert not scores[0].any() and not scores[4].any()


def test_a_layer_that_has_routed_is_spent() -> None:
    predictor = Predictor(SHAPE)
    predictor.foresee(0, said(3, 6))
    predictor.observe(event(1, [3, 6], 8))
    assert not predictor.predict()[1].any()
    assert predictor.predict()[2].any()


def test_the_last_layer_foresees_nothing() -> None:
    predictor = Predictor(SHAPE)
    predictor.foresee(4, np.full((1, DEPTH, 8), -np.inf, dtype=np.float32))
    assert not predictor.predict().any()


@pytest.mark.parametrize("is_right", [True, False])
def test_chances_become_what_came_true(is_right: bool) -> None:
    predictor = Predictor(SHAPE)
    for _ in range(300):
        predictor.foresee(0, said(3, 6, depth=1))
        predictor.observe(event(1, [3, 6] if is_right else [0, 1], 8))
    predictor.foresee(0, said(3, 6, depth=1))
    assert bool(predictor.predict()[1, 3] > 0.9) is is_right
    assert bool(predictor.predict()[1, 3] < 0.1) is not is_right


def test_tokens_of_a_batch_add_up() -> None:
    one, both = Predictor(SHAPE), Predictor(SHAPE)
    one.foresee(0, said(3, 6))
    both.foresee(0, np.concatenate([said(3, 6), said(1, 2)]))
    likely = both.predict()[1]
    assert set(np.argsort(-likely)[:4]) == {1, 2, 3, 6}
    assert likely[3] >= one.predict()[1, 3]


def test_experts_that_a_smaller_layer_lacks_are_never_likely() -> None:
    predictor = Predictor(grid(3, 8, top_k=2, per_layer=[8, 5, 8]))
    scores = said(3, 6)
    scores[:, 0, 5:] = -np.inf
    predictor.foresee(0, scores)
    assert np.isfinite(predictor.predict()).all()
    assert predictor.predict()[1, 5:].max() < 0.05
