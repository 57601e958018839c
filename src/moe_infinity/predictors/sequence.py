"""SiDA's predictor as a hint: the tokens' embeddings alone name the experts of all layers.

SiDA-MoE (arXiv 2310.18859): compress, LSTM of two layers, SparseMax attention over the request's
tokens so far, residual, one product. Routers keep the last word. Fitted by training/sequence.py.
"""

from __future__ import annotations

from collections import deque
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from moe_infinity.predictors._networks import check_width, lstm_cell, sigmoid, sparsemax
from moe_infinity.predictors.base import Embeddings, ExpertPredictor, Memory, TokenIds
from moe_infinity.tracing.event import Event
from moe_infinity.tracing.state_tensors import Dims, load_state
from moe_infinity.types import ExpertShape, Phase

WINDOW = 64  # tokens that attention sees
_MOST_TOKENS = 256  # of one pass: of a long prompt its end, at 0.3 ms a token
DEPTH = 2  # layers of the LSTM
FORM = "sequence"  # of the file that training writes; a run changes nothing in it


class Predictor(ExpertPredictor):
    """Chances of all layers, once per pass; silent until a network is loaded.

    network: in [H, D], in_bias [D], lstm{0,1} [2D, 4D], lstm{0,1}_bias [4D], out [D, L*E],
    out_bias [L*E]. Tokens of a batch are read as one text, in their order in the pass.
    """

    memory = Memory(per_expert=4 * 128 * 2, per_hidden=4 * 128 * 2, other=8 * 1024**2)
    needs_embeddings = True
    needs_fit = True

    def __init__(self, shape: ExpertShape, seed: int = 0) -> None:
        super().__init__(shape, seed)
        self.network: dict[str, NDArray[np.float32]] = {}
        self._scores: NDArray[np.float64] | None = None
        self._outputs: list[NDArray[np.float32]] = []  # of the LSTM's layers, at the last token
        self._cells: list[NDArray[np.float32]] = []
        self._window: deque[NDArray[np.float32]] = deque(maxlen=WINDOW)

    def begin_request(self) -> None:
        self._scores = None
        self._outputs, self._cells = [], []
        self._window.clear()

    def begin_pass(self, phase: Phase, embeddings: Embeddings, ids: TokenIds = None) -> None:
        self._scores = None
        if embeddings is None or not self.network:
            return
        check_width(embeddings.shape[1], len(self.network["in"]), "sequence")
        unused = np.ones(self.grid)
        for embedding in embeddings[-_MOST_TOKENS:]:
            unused *= 1 - sigmoid(self.logits(embedding)).reshape(self.grid)
        self._scores = 1 - unused

    def observe(self, event: Event) -> None:
        if self._scores is not None:
            self._scores[event.layer] = 0

    def predict(self) -> NDArray[np.float64] | None:
        return self._scores

    def logits(self, embedding: NDArray[np.float32]) -> NDArray[np.float32]:
        """[L*E] of the request's next token, given its embedding [H]."""
        net = self.network
        x = embedding @ net["in"] + net["in_bias"]
        if not self._outputs:
            self._outputs, self._cells = ([np.zeros_like(x)] * DEPTH for _ in range(2))
        for layer in range(DEPTH):
            seen = np.concatenate([x, self._outputs[layer]])
            gates = seen @ net[f"lstm{layer}"] + net[f"lstm{layer}_bias"]
            x, self._cells[layer] = lstm_cell(gates, self._cells[layer])
            self._outputs[layer] = x
        self._window.append(x)
        past = np.stack(self._window)  # [W, D]
        weights = sparsemax(past @ x * (1 / len(x) ** 0.5))
        scores: NDArray[np.float32] = (x + weights @ past) @ net["out"] + net["out_bias"]
        return scores

    def load(self, path: Path) -> None:
        keys = self.grid[0] * self.grid[1]
        expected: dict[str, Dims] = {"in": ("hidden", "width"), "in_bias": ("width",)}
        for layer in range(DEPTH):
            expected |= {f"lstm{layer}": ("both", "gates"), f"lstm{layer}_bias": ("gates",)}
        expected |= {"out": ("width", keys), "out_bias": (keys,)}
        self.network = load_state(path, FORM, self.shape, self.fingerprint, expected)
