"""Predicts what a layer used most, whatever the request: the floor other predictors must beat."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from moe_infinity.predictors.base import ExpertPredictor
from moe_infinity.tracing.event import Event
from moe_infinity.tracing.state_tensors import load_state, save_state
from moe_infinity.types import ExpertShape

_FORM = "popularity"
_MEMORY = 0.999  # kept per pass: about a thousand passes


class Predictor(ExpertPredictor):
    """Share of a layer's passes in which an expert was used, old ones fading."""

    def __init__(self, shape: ExpertShape, seed: int = 0) -> None:
        super().__init__(shape, seed)
        self._uses = np.zeros(self.grid)
        self._passes = np.zeros((shape.num_layers, 1))

    def observe(self, event: Event) -> None:
        tokens = max(1, len(event.top_k_index))
        self._uses[event.layer] *= _MEMORY
        self._passes[event.layer] *= _MEMORY
        self._uses[event.layer] += event.counts / tokens  # a prompt is one pass like others
        self._passes[event.layer] += 1

    def predict(self) -> NDArray[np.float64] | None:
        return np.minimum(1.0, self._uses / np.maximum(self._passes, 1e-9))

    def save(self, path: Path) -> None:
        arrays = {"uses": self._uses, "passes": self._passes}
        save_state(path, _FORM, arrays, self.shape, self.fingerprint)

    def load(self, path: Path) -> None:
        expected = {"uses": self.grid, "passes": self._passes.shape}
        arrays = load_state(path, _FORM, self.shape, self.fingerprint, expected)
        self._uses, self._passes = arrays["uses"], arrays["passes"]
