"""Evicts the expert that is expected to be needed again last."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from moe_infinity.policies.base import CachePolicy
from moe_infinity.tracing.event import Event
from moe_infinity.types import ExpertShape

# Fast and slow memory per pass, weight of the slow base, and the base's floor as a share of chance:
# tuned on replays of public routing traces; b = 3 to 8 hardly differ.
FAST, SLOW, BASE_WEIGHT, BASE_FLOOR = 0.9, 0.998, 8.0, 0.3
MIN_P = 1e-4
_MOST_UNSEEN = 64


def base_floor(shape: ExpertShape) -> float:
    """The least chance of use that is believed of any expert."""
    return BASE_FLOOR * shape.top_k / shape.num_experts


class Policy(CachePolicy):
    """Expected events to the next use, from decayed use counts over a slow base rate.

    p = (d + b * base) / (n + b) is the chance that an expert is used in its layer's next pass,
    d and n being decayed counts of uses and of passes. Its next use is then expected after
    (1/p - 1) full cycles of L layers plus the way from the current layer to its own.
    """

    def __init__(self, shape: ExpertShape, num_slots: int, seed: int = 0) -> None:
        super().__init__(shape, num_slots, seed)
        # Passes decay as uses do: they are counted behind them, as one more expert's.
        self._counts = np.zeros((2, shape.num_layers, shape.num_experts + 1))  # [fast/slow, L, E+1]
        self._uses, self._passes = self._counts[..., :-1], self._counts[..., -1:]
        self._cycles = np.full(self.grid, 1.0 / MIN_P)
        self._decay = np.array([FAST, SLOW])[:, None]
        self._floor = base_floor(shape)
        # By layer: events that no score was asked for yet; to learn from several costs less.
        self._unseen: list[list[NDArray[np.int64]]] = [[] for _ in range(shape.num_layers)]
        self._ids = np.arange(shape.num_layers, dtype=np.float64)

    def on_event(self, event: Event) -> None:
        self._unseen[event.layer].append(event.experts)
        if len(self._unseen[event.layer]) == _MOST_UNSEEN:
            self._learn(event.layer)

    def _learn(self, row: int) -> None:
        counts, unseen = self._counts[:, row], self._unseen[row]
        used = np.zeros((len(unseen), counts.shape[1]))
        for number, experts in enumerate(unseen):
            used[number, experts] = 1
        used[:, -1] = 1
        for each in used:
            counts *= self._decay
            counts += each
        self._unseen[row].clear()
        base = np.minimum(np.maximum(self._uses[1, row] / self._passes[1, row], self._floor), 1.0)
        p = (self._uses[0, row] + BASE_WEIGHT * base) / (self._passes[0, row] + BASE_WEIGHT)
        self._cycles[row] = 1.0 / np.minimum(np.maximum(p, MIN_P), 1.0) - 1.0

    def catch_up(self) -> None:
        for row, unseen in enumerate(self._unseen):
            if unseen:
                self._learn(row)

    def keep_scores(self, layer: int) -> NDArray[np.float64]:
        self.catch_up()
        num_layers = self.shape.num_layers
        way = (self._ids - layer - 1) % num_layers + 1  # events until the layer comes round
        return -(self._cycles * num_layers + way[:, None])

    def state_arrays(self) -> dict[str, NDArray[np.float64]]:
        self.catch_up()
        return {"uses": self._uses, "passes": self._passes, "cycles": self._cycles}

    def take_state(self, arrays: Mapping[str, NDArray[np.float64]]) -> None:
        self._uses[:], self._passes[:] = arrays["uses"], arrays["passes"]
        self._cycles[:] = arrays["cycles"]
        for unseen in self._unseen:
            unseen.clear()
