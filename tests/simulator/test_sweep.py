"""Sweeps: a member that fails is replaced, as in a live run, and the row says so."""

from pathlib import Path

import numpy as np
import pytest

from moe_infinity.policies.base import CachePolicy
from moe_infinity.predictors.base import ExpertPredictor
from moe_infinity.simulator.sweep import FAULTS, Task, row_of
from moe_infinity.tracing.event import Event


class Raises(CachePolicy):
    """Fails at its tenth event."""

    _events = 0

    def on_event(self, event: Event) -> None:
        self._events += 1
        if self._events == 10:
            raise ZeroDivisionError("by design")

    def keep_scores(self, layer: int) -> np.ndarray:
        return np.zeros(self.grid)


class Guesses(ExpertPredictor):
    """Answers with an array of another shape."""

    def observe(self, event: Event) -> None: ...

    def predict(self) -> np.ndarray:
        return np.zeros(3)


@pytest.mark.parametrize(
    ("policy", "prefetch", "message"),
    [
        (f"{__name__}:Raises", "none", "by design"),
        ("lru", f"{__name__}:Guesses", "expected"),
    ],
)
def test_what_fails_is_replaced(made_up: Path, policy: str, prefetch: str, message: str) -> None:
    row = row_of(Task(made_up, policy, prefetch, 0.25, phase="all"))
    assert len(row[FAULTS]) == 1 and message in row[FAULTS][0]
    assert row["hits"] + row["misses"] > 0


def test_all_is_well(made_up: Path) -> None:
    assert row_of(Task(made_up, "lru", "oracle", 0.25, phase="all"))[FAULTS] == []
