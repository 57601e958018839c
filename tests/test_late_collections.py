"""Python's full collections come between requests, not between tokens."""

import gc
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from transformers import StoppingCriteriaList

from moe_infinity import MoE
from moe_infinity.interrupts import LateCollections

BEFORE = (701, 11, 12)


@pytest.fixture(autouse=True)
def _usual_thresholds() -> Iterator[None]:
    before = gc.get_threshold()
    gc.set_threshold(*BEFORE)
    yield
    gc.set_threshold(*before)


def test_none_is_due_while_a_request_runs(tiny: Path) -> None:
    seen = []

    def look(*_: object, **__: object) -> bool:
        seen.append(gc.get_threshold())
        return False

    with MoE(tiny, ram="2GiB") as moe:
        moe.generate([5, 6, 7], max_new_tokens=4, stopping_criteria=StoppingCriteriaList([look]))
        assert gc.get_threshold() == BEFORE
    assert len(seen) == 4
    for young, middle, full in seen:
        assert (young, middle) == BEFORE[:2] and full > 10**9


def test_a_request_that_fails_puts_it_back(tiny: Path) -> None:
    def fail(*_: object, **__: object) -> bool:
        raise RuntimeError("on purpose")

    with MoE(tiny, ram="2GiB") as moe, pytest.raises(RuntimeError, match="on purpose"):
        moe.generate([5, 6, 7], max_new_tokens=4, stopping_criteria=StoppingCriteriaList([fail]))
    assert gc.get_threshold() == BEFORE


def test_the_last_of_several_puts_it_back() -> None:
    is_on, is_over = threading.Event(), threading.Event()

    def run() -> None:
        with LateCollections():
            is_on.set()
            is_over.wait(60)

    other = threading.Thread(target=run)
    with LateCollections():
        other.start()
        assert is_on.wait(60)
    assert gc.get_threshold() != BEFORE
    is_over.set()
    other.join()
    assert gc.get_threshold() == BEFORE


def test_tokens_leave_no_cycles_behind(tiny: Path) -> None:
    """Nothing piles up that only a full collection would find."""

    def left_by(moe: MoE, num_tokens: int) -> int:
        gc.collect()
        gc.disable()
        try:
            moe.generate([5, 6, 7], max_new_tokens=num_tokens, min_new_tokens=num_tokens)
            return gc.collect()
        finally:
            gc.enable()

    with MoE(tiny, ram="2GiB", ram_slots=8) as moe:
        left_by(moe, 2)
        assert left_by(moe, 60) <= left_by(moe, 5) + 20
