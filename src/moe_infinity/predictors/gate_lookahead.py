"""The model's own next routers, asked early: this router's input plus the mean change to theirs.

Gate reuse began with Mixtral-Offloading (arXiv 2312.17238); the correction is DALI's (arXiv
2602.03495), learned while running. Before the first router has spoken, the token itself does: by
what it was routed to before. Exact: it only loads ahead.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from moe_infinity.predictors._leads import LeadTable
from moe_infinity.predictors._token_table import TABLE_BYTES, TokenTable
from moe_infinity.predictors.base import Embeddings, ExpertPredictor, Foresight, Memory, TokenIds
from moe_infinity.tracing.event import Event
from moe_infinity.tracing.state_tensors import load_state, save_state
from moe_infinity.types import ExpertShape, Phase

DEPTH = 3
_FADING = 0.8  # of uses, per pass


class Predictor(ExpertPredictor):
    """Chance by lead: how often experts with such a lead, d layers early, came to be used."""

    foresight = Foresight("residual", DEPTH)
    memory = Memory(other=2 * TABLE_BYTES)

    def __init__(self, shape: ExpertShape, seed: int = 0) -> None:
        super().__init__(shape, seed)
        self._scores: NDArray[np.float64] = np.zeros(self.grid)
        self._uses = np.zeros(self.grid)  # fading
        self._leads = LeadTable(DEPTH)
        self._tokens = TokenTable(shape, DEPTH)
        # By layer: what was said of it, by distance: bins [T, E]
        self._guessed: dict[int, dict[int, NDArray[np.int64]]] = {}

    def begin_request(self) -> None:
        self._guessed.clear()
        self._scores = np.zeros(self.grid)
        self._uses[:] = 0

    def begin_pass(self, phase: Phase, embeddings: Embeddings, ids: TokenIds = None) -> None:
        self._tokens.begin_pass(ids)
        by_token = self._tokens.chances() if phase == "decode" else None
        if by_token is not None:
            self._scores[: len(by_token)] = by_token

    def observe(self, event: Event) -> None:
        """Learn how far each lead can be trusted; what was said of this layer is spent."""
        used = np.zeros(self.grid[1])
        used[event.experts] = 1
        for distance, bins in self._guessed.pop(event.layer, {}).items():
            if len(bins) == 1:  # of several tokens it is not known whose experts these are
                self._leads.learn(distance, bins[0], used)
        self._scores[event.layer] = 0
        self._uses[event.layer] = self._uses[event.layer] * _FADING + used
        self._tokens.observe(event)

    def foresee(self, layer: int, scores: NDArray[np.float32]) -> None:
        """scores [T, D, E]; a later saying about a layer replaces an earlier one."""
        reach = min(scores.shape[1], DEPTH, self.grid[0] - layer - 1)
        if reach <= 0:
            return
        coming = slice(layer + 1, layer + 1 + reach)
        bins = self._leads.bins(scores[:, :reach], self._uses[coming], self.shape.top_k)
        chance = self._leads.chances(bins)  # [T, D, E]
        self._scores[coming] = chance[0] if len(chance) == 1 else 1 - (1 - chance).prod(axis=0)
        for distance in range(reach):
            guessed = self._guessed.setdefault(layer + 1 + distance, {})
            guessed[distance] = bins[:, distance]

    def predict(self) -> NDArray[np.float64] | None:
        return self._scores

    def save(self, path: Path) -> None:
        arrays = {**self._leads.arrays(), **self._tokens.arrays()}
        save_state(path, self._form, arrays, self.shape, self.fingerprint)

    def load(self, path: Path) -> None:
        expected = {**self._leads.dims(), **self._tokens.dims()}
        arrays = load_state(path, self._form, self.shape, self.fingerprint, expected)
        self._leads.restore(arrays)
        self._tokens.restore(arrays)

    @property
    def _form(self) -> str:
        return f"gate_lookahead {self.foresight.mode}"
