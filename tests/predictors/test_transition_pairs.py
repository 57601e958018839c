"""transition_pairs: a chain of second order, the bound of its table, and its file."""

from pathlib import Path

import numpy as np
import pytest

from moe_infinity.errors import TraceError
from moe_infinity.predictors import find_predictor
from moe_infinity.predictors.base import ExpertPredictor
from moe_infinity.predictors.transition_pairs import Predictor
from moe_infinity.tracing.event import Event
from support.routing import event, grid

LAYERS, EXPERTS = 5, 8
SHAPE = grid(LAYERS, EXPERTS, top_k=1)


def second_order_chain(num_passes: int, seed: int) -> list[Event]:
    """Layer n uses (expert of n-1 + expert of n-2) mod E, or one at random in a tenth of cases."""
    rng = np.random.default_rng(seed)
    events, before, last = [], 0, 1
    for step in range(num_passes):
        for layer in range(LAYERS):
            expert = (before + last) % EXPERTS if rng.random() > 0.1 else int(rng.integers(EXPERTS))
            events.append(event(layer, [expert], EXPERTS, step=step))
            before, last = last, expert
    return events


def recall(predictor: ExpertPredictor, events: list[Event]) -> float:
    """How often the best guess was used, on the second half."""
    predictor.begin_request()
    right = []
    for each in events:
        scores = predictor.predict()
        if scores is not None:
            right.append(int(scores[each.layer].argmax()) in each.experts)
        predictor.observe(each)
    return float(np.mean(right[len(right) // 2 :]))


def test_beats_order_one_on_a_chain_of_order_two() -> None:
    events = second_order_chain(600, seed=1)
    order_1 = recall(find_predictor("transition")(SHAPE), events)
    order_2 = recall(Predictor(SHAPE), events)
    assert order_2 > 0.8
    assert order_1 < 0.5


def test_rare_pairs_leave_the_word_to_order_one() -> None:
    events = second_order_chain(2, seed=2)  # no pair is seen often
    one, two = find_predictor("transition")(SHAPE), Predictor(SHAPE)
    for each in events:
        for predictor in (one, two):
            predictor.observe(each)
        first, second = one.predict(), two.predict()
        assert first is not None and second is not None
        np.testing.assert_allclose(first, second)


def test_the_table_is_bounded_and_keeps_what_is_used() -> None:
    predictor = Predictor(SHAPE, max_pairs=200)  # of 5 * 8 * 8
    recall(predictor, second_order_chain(300, seed=3))
    assert 0 < len(predictor._table) <= 200
    rng = np.random.default_rng(0)
    small = Predictor(SHAPE, max_pairs=20)
    for step in range(200):
        for layer in range(LAYERS):
            rare = layer == 4 and step % 2
            expert = int(rng.integers(EXPERTS)) if rare else layer
            small.observe(event(layer, [expert], EXPERTS, step=step))
    assert len(small._table) <= 20
    common = small._pairs(1, np.array([1]), np.array([0]))
    assert small._table.look_up(common)[0][0] > 100


def test_counts_do_not_overflow() -> None:
    predictor = Predictor(SHAPE)
    pair, expert = [3], np.array([2])
    for _ in range(70_000):
        predictor._table.learn(pair, expert)
    uses, counts = predictor._table.look_up(pair)
    assert 0 < uses[0] < 65_536 and counts[0, 2] == pytest.approx(uses[0], rel=0.01)


def test_what_was_saved_predicts_the_same(tmp_path: Path) -> None:
    first, second = Predictor(SHAPE), Predictor(SHAPE)
    recall(first, second_order_chain(200, seed=4))
    first.save(tmp_path / "pairs")
    second.load(tmp_path / "pairs")
    assert len(second._table) == len(first._table) > 0
    for predictor in (first, second):
        predictor.begin_request()
        for each in second_order_chain(1, seed=5):
            predictor.observe(each)
    one, two = first.predict(), second.predict()
    assert one is not None and two is not None
    np.testing.assert_array_equal(one, two)


def test_another_model_is_refused(tmp_path: Path) -> None:
    predictor = Predictor(SHAPE)
    predictor.save(tmp_path / "pairs")
    with pytest.raises(TraceError, match="this one has"):
        Predictor(grid(LAYERS, EXPERTS, top_k=2)).load(tmp_path / "pairs")
