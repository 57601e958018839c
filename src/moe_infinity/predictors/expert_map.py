"""fMoE's predictor: the past pass whose router probabilities ran most alike says what comes.

Yu et al., FineMoE (arXiv 2502.05370): the first layers by the tokens' embeddings, later ones by
the path so far, searched anew at each layer; the less alike, the more experts.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from moe_infinity.predictors._map_store import MapStore
from moe_infinity.predictors._networks import mean_probabilities
from moe_infinity.predictors.base import Embeddings, ExpertPredictor, Memory, TokenIds
from moe_infinity.tracing.event import Event
from moe_infinity.tracing.state_tensors import load_state, save_state
from moe_infinity.types import ExpertShape, Phase

CAPACITY = 1000  # the paper: little is gained beyond
FIRST_LAYERS = 3  # the paper's d for Mixtral
_START, _MEMORY, _FORM = 0.5, 0.02, "expert_map"


class Predictor(ExpertPredictor):
    """Chance by rank in the matched map: how often the r-th of one so found was used."""

    memory = Memory(per_expert=5 * CAPACITY, per_hidden=5 * CAPACITY)
    needs_router_logits = True
    needs_embeddings = True

    def __init__(self, shape: ExpertShape, seed: int = 0, capacity: int = CAPACITY) -> None:
        super().__init__(shape, seed)
        self.store = MapStore(shape, capacity, FIRST_LAYERS)
        ranks = np.arange(shape.num_experts)
        start = np.where(ranks < shape.top_k, _START, 0.2 * 0.7 ** (ranks - shape.top_k))
        self._truth = np.stack([start, start])  # [2, E] by rank: found by embeddings, by path
        self._said = np.zeros(self.grid, dtype=np.int64)  # experts by rank, as a row had them
        self._found = np.zeros(shape.num_layers, dtype=np.int64)  # row of _truth they came from
        self._scores: NDArray[np.float64] | None = None

    def begin_request(self) -> None:
        self._scores = None
        self.store.drop()

    def begin_pass(self, phase: Phase, embeddings: Embeddings, ids: TokenIds = None) -> None:
        self.end_request()
        if phase == "prefill" or embeddings is None or not len(embeddings):
            return
        similar = self.store.begin(embeddings.mean(axis=0))
        if self.store.size:
            self._scores = np.zeros(self.grid)
            self._say(similar, 0, FIRST_LAYERS, found=0)

    def observe(self, event: Event) -> None:
        """Follow the path by one layer; learn how far each rank can be trusted."""
        if event.router_logits is None or self.store.num_seen < 0:
            return
        layer = event.layer
        count = self.shape.experts_per_layer[layer]
        row = mean_probabilities(event.router_logits[:, :count], self.grid[1])
        similar = self.store.follow(layer, row)
        if self._scores is not None:
            if self._scores[layer].any() and len(event.top_k_index) == 1:
                truth = self._truth[self._found[layer]]
                truth += _MEMORY * ((event.counts[self._said[layer]] > 0) - truth)
            self._scores[layer] = 0
            self._say(similar, max(layer + 1, FIRST_LAYERS), self.grid[0], found=1)

    def predict(self) -> NDArray[np.float64] | None:
        return self._scores

    def end_request(self) -> None:
        self._scores = None
        self.store.keep()

    def save(self, path: Path) -> None:
        if self.store.size:
            arrays = {**self.store.arrays(), "truth": self._truth}
            save_state(path, _FORM, arrays, self.shape, self.fingerprint)

    def load(self, path: Path) -> None:
        dims = {"maps": ("n", *self.grid), "meanings": ("n", "m"), "truth": self._truth.shape}
        found = load_state(path, _FORM, self.shape, self.fingerprint, dims)
        self.store.restore(found["maps"], found["meanings"])
        self._truth = found["truth"]

    def _say(self, similar: NDArray[np.float32], first: int, end: int, found: int) -> None:
        """Chances of layers first to end from the most similar entry."""
        assert self._scores is not None
        match = self.store.match(similar)
        wanted = min(1.0, max(0.0, 1.0 - match.score))  # the paper's delta
        counts = np.maximum((match.mass[first:end] < wanted).sum(axis=1) + 1, self.shape.top_k)
        chosen = np.arange(self.grid[1]) < counts[:, None]
        order = self._said[first:end] = match.order[first:end]
        chances = np.where(chosen, self._truth[found], 0.0)
        np.put_along_axis(self._scores[first:end], order, chances, axis=1)
        self._found[first:end] = found
