"""Predicts nothing: every load is a demand load. The trivial member of the family."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from moe_infinity.predictors.base import ExpertPredictor
from moe_infinity.tracing.event import Event


class Predictor(ExpertPredictor):
    """No prediction."""

    is_silent = True

    def observe(self, event: Event) -> None:
        pass

    def predict(self) -> NDArray[np.float64] | None:
        return None
