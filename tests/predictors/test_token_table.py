"""What a token was routed to before: counted by layer, told before the pass begins."""

import numpy as np

from moe_infinity.predictors import _token_table
from moe_infinity.predictors._token_table import TokenTable
from moe_infinity.predictors.gate_lookahead import Predictor
from support.routing import event, grid

SHAPE = grid(5, 8, top_k=2)


def show(table: TokenTable, token: int, *experts: int) -> None:
    table.begin_pass(np.array([token]))
    for layer in range(SHAPE.num_layers):
        table.observe(event(layer, experts, 8))


def test_a_token_seen_before_names_its_experts() -> None:
    table = TokenTable(SHAPE, depth=3)
    for _ in range(5):
        show(table, 11, 0, 3)
        show(table, 12, 6, 7)
    table.begin_pass(np.array([11]))
    chances = table.chances()
    assert chances.shape == (3, 8)
    assert (chances[:, [0, 3]] > 0.85).all() and (chances[:, [1, 2, 4, 5, 6, 7]] < 0.1).all()


def test_an_unknown_token_gets_the_habits_of_the_layer() -> None:
    table = TokenTable(SHAPE, depth=3)
    for _ in range(50):
        show(table, 11, 0, 3)
    table.begin_pass(np.array([99]))
    chances = table.chances()
    assert (chances[:, [0, 3]] > 0.7).all() and (chances <= 1).all()


def test_of_several_tokens_nothing_is_said_but_each_is_learned() -> None:
    table = TokenTable(SHAPE, depth=2)
    table.begin_pass(np.array([100, 101]))
    table.observe(event(0, [1, 2], 8, "prefill"))  # one expert per token
    assert table.chances() is None
    for token, expert in ((100, 1), (101, 2)):
        table.begin_pass(np.array([token]))
        assert table.chances()[0].argmax() == expert


def test_saved_counts_come_back() -> None:
    table, other = TokenTable(SHAPE, depth=3), TokenTable(SHAPE, depth=3)
    show(table, 11, 0, 3)
    other.restore(table.arrays())
    for each in (table, other):
        each.begin_pass(np.array([11]))
    assert (table.chances() == other.chances()).all()


def test_memory_is_bounded(monkeypatch) -> None:
    monkeypatch.setattr(_token_table, "TABLE_BYTES", 128 * 30)  # 30 rows: 10 tokens
    table = TokenTable(SHAPE, depth=3)
    for token in range(40):
        show(table, token % 20, 0, 3)
    assert len(table.arrays()["pairs"]) <= 30


def test_the_predictor_speaks_before_the_first_layer() -> None:
    predictor = Predictor(SHAPE)
    for _ in range(5):
        predictor.begin_pass("decode", None, np.array([11]))
        for layer in range(5):
            predictor.observe(event(layer, [0, 3], 8))
    predictor.begin_pass("decode", None, np.array([11]))
    assert (predictor.predict()[:3, [0, 3]] > 0.8).all()
    assert not predictor.predict()[3:].any()
    predictor.observe(event(0, [0, 3], 8))
    assert not predictor.predict()[0].any()


def test_a_full_table_says_nothing_of_unknown_tokens(monkeypatch) -> None:
    monkeypatch.setattr(_token_table, "TABLE_BYTES", 128 * 9)  # 9 rows: 3 tokens
    table = TokenTable(SHAPE, depth=3)
    for token in (1, 2, 3):
        show(table, token, 0, 3)
    assert len(table.arrays()["pairs"]) == 9
    table.begin_pass(np.array([99]))
    assert (table.chances() <= 1).all()
