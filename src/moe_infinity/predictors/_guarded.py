"""A predictor that may fail: when it does, nothing is predicted for the rest of the run."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moe_infinity.predictors.base import Embeddings, ExpertPredictor, TokenIds
from moe_infinity.predictors.none import Predictor as Nothing
from moe_infinity.tracing.event import Event
from moe_infinity.types import Phase

_log = logging.getLogger(__name__)


class GuardedPredictor(ExpertPredictor):
    """Hands every call to ``inner``; its first error is logged, kept in ``fault``, and ends it."""

    def __init__(self, inner: ExpertPredictor) -> None:
        super().__init__(inner.shape, inner.seed)
        self.fault: str | None = None
        self.inner = inner
        self.needs_router_logits = inner.needs_router_logits  # type: ignore[misc]
        self.needs_router_input = inner.needs_router_input  # type: ignore[misc]
        self.needs_embeddings = inner.needs_embeddings  # type: ignore[misc]
        self.foresight = inner.foresight  # type: ignore[misc]
        self.is_silent = inner.is_silent  # type: ignore[misc]

    def begin_request(self) -> None:
        self._tell(lambda predictor: predictor.begin_request())

    def begin_pass(self, phase: Phase, embeddings: Embeddings, ids: TokenIds = None) -> None:
        self._tell(lambda predictor: predictor.begin_pass(phase, embeddings, ids))

    def observe(self, event: Event) -> None:
        self._tell(lambda predictor: predictor.observe(event))

    def foresee(self, layer: int, scores: NDArray[np.float32]) -> None:
        self._tell(lambda predictor: predictor.foresee(layer, scores))

    def predict(self) -> NDArray[np.float64] | None:
        return self._checked(self._tell(lambda predictor: predictor.predict()))

    def forecast(self) -> NDArray[np.float64] | None:
        forecast: NDArray[np.float64] | None = self._tell(lambda predictor: predictor.forecast())
        return forecast

    def end_request(self) -> None:
        self._tell(lambda predictor: predictor.end_request())

    def save(self, path: Path) -> None:
        self.inner.fingerprint = self.fingerprint
        self.inner.save(path)

    def load(self, path: Path) -> None:
        self.inner.fingerprint = self.fingerprint
        self.inner.load(path)

    def _checked(self, scores: NDArray[np.float64] | None) -> NDArray[np.float64] | None:
        if scores is None or scores.shape == self.grid:
            return scores
        self._give_up(ValueError(f"got scores of {scores.shape}, expected {self.grid}"))
        return None

    def _tell(self, ask: Callable[[ExpertPredictor], Any]) -> Any:
        try:
            return ask(self.inner)
        except Exception as error:
            self._give_up(error)
            return None

    def _give_up(self, error: Exception) -> None:
        name = f"{type(self.inner).__module__}.{type(self.inner).__name__}"
        self.fault = f"predictor {name} failed ({type(error).__name__}: {error}); prefetching ended"
        _log.warning("%s", self.fault, exc_info=error)
        self.inner = Nothing(self.shape, self.seed)
