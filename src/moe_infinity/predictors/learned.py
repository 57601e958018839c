"""ProMoE's predictor: a small network per layer reads the router's input and names what follows.

ProMoE (arXiv 2410.22134): one MLP of two layers each; the layer after the next is predicted too
(stride 2), so that a load can begin one layer earlier. Fitted by training/learned.py.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from moe_infinity.predictors._networks import any_of, check_width, sigmoid
from moe_infinity.predictors.base import ExpertPredictor, Memory
from moe_infinity.tracing.event import Event
from moe_infinity.tracing.state_tensors import Dims, load_state
from moe_infinity.types import ExpertShape

STRIDE = 2  # layers ahead that a network speaks about
FORM = "learned"  # of the file that training writes; a run changes nothing in it


class Predictor(ExpertPredictor):
    """Chances of the next two layers; silent until networks are loaded.

    networks: w1 [L, H, M], b1 [L, M], w2 [L, M, 2E], b2 [L, 2E]; M: width of a network.
    """

    memory = Memory(per_expert=4 * 128 * 2 * 2, per_layer_hidden=4 * 128 * 2)
    needs_router_input = True
    needs_fit = True

    def __init__(self, shape: ExpertShape, seed: int = 0) -> None:
        super().__init__(shape, seed)
        self.networks: dict[str, NDArray[np.float32]] = {}
        self._scores: NDArray[np.float64] | None = None

    def begin_request(self) -> None:
        self._scores = None

    def observe(self, event: Event) -> None:
        """A layer's row is spent; a later saying about a layer replaces an earlier one."""
        layer = event.layer
        if self._scores is not None:
            self._scores[layer] = 0
        if event.router_input is None or not self.networks:
            return
        if self._scores is None:
            self._scores = np.zeros(self.grid)
        chances = any_of(self.chances(layer, event.router_input))
        coming = self._scores[layer + 1 : layer + 1 + STRIDE]
        coming[:] = chances[: len(coming)]

    def predict(self) -> NDArray[np.float64] | None:
        return self._scores

    def chances(self, layer: int, inputs: NDArray[np.float32]) -> NDArray[np.float32]:
        """[T, 2, E] what each token's input [T, H] says."""
        w1, b1, w2, b2 = (self.networks[name][layer] for name in ("w1", "b1", "w2", "b2"))
        check_width(inputs.shape[1], len(w1), "learned")
        inner = np.maximum(inputs @ w1 + b1, 0)
        return sigmoid(inner @ w2 + b2).reshape(len(inputs), STRIDE, self.grid[1])

    def load(self, path: Path) -> None:
        layers, experts = self.grid
        expected: dict[str, Dims] = {
            "w1": (layers, "hidden", "inner"),
            "b1": (layers, "inner"),
            "w2": (layers, "inner", STRIDE * experts),
            "b2": (layers, STRIDE * experts),
        }
        self.networks = load_state(path, FORM, self.shape, self.fingerprint, expected)
