"""A policy or predictor that fails in mid-run costs speed, never the answer."""

import logging

import numpy as np
import pytest
import torch

from moe_infinity import MoE, bundled_model_path
from moe_infinity.policies.lru import Policy as Lru
from moe_infinity.predictors.popularity import Predictor as Popularity
from moe_infinity.tracing.event import Event
from support.engine import BUDGET, assert_at_rest, generate


class FailsLater(Lru):
    """Works for a while."""

    events = 0

    def on_event(self, event: Event) -> None:
        self.events += 1
        if self.events == 30:
            raise ZeroDivisionError("at the thirtieth event")
        super().on_event(event)


class NamesStrangers(Lru):
    """Victims that were no candidates."""

    def victims(self, candidates: np.ndarray, count: int, layer: int) -> np.ndarray:
        return np.zeros(count, dtype=np.int64)


class WrongShape(Popularity):
    def predict(self) -> np.ndarray:
        return np.ones((1, 1))


class Raises(Popularity):
    def observe(self, event: Event) -> None:
        raise KeyError("unheard of")


@pytest.fixture(scope="module")
def expected() -> torch.Tensor:
    with MoE(bundled_model_path(), ram=BUDGET) as moe:
        return generate(moe)


@pytest.mark.parametrize("policy", ["FailsLater", "NamesStrangers"])
def test_a_policy_that_fails_is_replaced_by_lru(
    policy: str, expected: torch.Tensor, caplog: pytest.LogCaptureFixture
) -> None:
    with (
        caplog.at_level(logging.WARNING),
        MoE(bundled_model_path(), ram=BUDGET, ram_slots=40, policy=f"{__name__}:{policy}") as moe,
    ):
        assert torch.equal(generate(moe), expected)
        assert torch.equal(generate(moe), expected)
        (fault,) = moe.stats().faults
        assert f"{policy} failed" in fault and "went on with lru" in fault
        assert_at_rest(moe)
    assert len([r for r in caplog.records if "went on with lru" in r.getMessage()]) == 1


@pytest.mark.parametrize("predictor", ["WrongShape", "Raises"])
def test_a_predictor_that_fails_is_replaced_by_none(predictor: str, expected: torch.Tensor) -> None:
    options = {"ram": BUDGET, "ram_slots": 40, "prefetch": f"{__name__}:{predictor}"}
    with MoE(bundled_model_path(), **options) as moe:
        assert torch.equal(generate(moe), expected)
        (fault,) = moe.stats().faults
        assert f"{predictor} failed" in fault and "prefetching ended" in fault
        assert_at_rest(moe)


def test_nothing_failed_nothing_reported() -> None:
    with MoE(bundled_model_path(), ram=BUDGET, prefetch="popularity", ram_slots=40) as moe:
        generate(moe)
        assert moe.stats().faults == ()
