"""HOBBIT's replacement: a weighted sum of recency, frequency, importance and layer distance.

Tang et al., HOBBIT (arXiv 2411.01433): p = w_lru R/T + w_lfu F/T + w_lhu H/T + w_fld (1 - d/L).
R: token of the last use, F: uses, H: uses that weighed much, all in this request, T: its tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from moe_infinity.policies.base import CachePolicy
from moe_infinity.tracing.event import Event
from moe_infinity.tracing.state_tensors import load_state, save_state
from moe_infinity.types import ExpertShape, Phase

# A use weighs much while the weights ranked before it sum to at most this share (the paper's T1).
_HIGH = 0.6
_WEIGHTS = (0.285, 0.415, 0.213, 0.087)  # fitted on a trace of the bundled model at 25%
_FORM, _TRIALS = "weighted", 40


class Policy(CachePolicy):
    """Weights (lru, lfu, lhu, fld) sum to 1; ``fit`` finds them for a model."""

    def __init__(self, shape: ExpertShape, num_slots: int, seed: int = 0) -> None:
        super().__init__(shape, num_slots, seed)
        self.weights = np.array(_WEIGHTS)
        self._counts = np.zeros((3, *self.grid))  # last use, uses, weighty uses
        self._passes = 0
        self._ids = np.arange(shape.num_layers)

    def begin_request(self) -> None:
        self._counts[:] = 0
        self._passes = 0

    def begin_pass(self, phase: Phase) -> None:
        self._passes += 1

    def on_event(self, event: Event) -> None:
        last, uses, weighty = self._counts[:, event.layer]
        last[event.experts] = self._passes
        uses[event.experts] += 1
        ranked = np.argsort(-event.weights[event.experts], kind="stable")
        shares = event.weights[event.experts][ranked]
        before = (np.cumsum(shares) - shares) / max(shares.sum(), 1e-9)
        weighty[event.experts[ranked[before <= _HIGH]]] += 1

    def keep_scores(self, layer: int) -> NDArray[np.float64]:
        num_layers = self.shape.num_layers
        distance = (self._ids - layer) % num_layers
        terms = np.tensordot(self.weights[:3], self._counts, axes=1) / max(self._passes, 1)
        scores: NDArray[np.float64] = terms + self.weights[3] * (1 - distance / num_layers)[:, None]
        return scores

    @classmethod
    def fit(
        cls,
        shape: ExpertShape,
        num_slots: int,
        misses_of: Callable[[CachePolicy], int],
        path: Path,
        fingerprint: str = "",
    ) -> dict[str, float]:
        """Random search over the simplex, its corners (LRU, LFU...) included."""
        drawn = np.random.default_rng(0).dirichlet(np.ones(4), _TRIALS)
        tried = np.concatenate([np.eye(4), np.array([_WEIGHTS]), drawn])
        misses = []
        for weights in tried:
            policy = cls(shape, num_slots)
            policy.weights = weights
            misses.append(misses_of(policy))
        best = tried[int(np.argmin(misses))]
        save_state(path, _FORM, {"weights": best}, shape, fingerprint)
        names = ("lru", "lfu", "lhu", "fld")
        found = {name: float(w) for name, w in zip(names, best, strict=True)}
        return found | {"misses": float(min(misses)), "misses_lru": float(misses[0])}

    def load(self, path: Path) -> None:
        self.weights = load_state(
            path, _FORM, self.shape, self.fingerprint, {"weights": (len(_WEIGHTS),)}
        )["weights"]
