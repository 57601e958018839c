"""EdgeMoE's replacement: keep what is used often and whose layer comes soon.

Yi et al., EdgeMoE (arXiv 2308.14352): activation frequency and the distance of the expert's layer
from the running one, joined here as their product (the exact formula is not published).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from moe_infinity.policies.base import CachePolicy
from moe_infinity.tracing.event import Event
from moe_infinity.types import ExpertShape


class Policy(CachePolicy):
    """Frequency times nearness of the layer."""

    def __init__(self, shape: ExpertShape, num_slots: int, seed: int = 0) -> None:
        super().__init__(shape, num_slots, seed)
        self._uses = np.zeros(self.grid)
        self._events = np.zeros((shape.num_layers, 1))
        self._ids = np.arange(shape.num_layers)

    def on_event(self, event: Event) -> None:
        self._uses[event.layer, event.experts] += 1
        self._events[event.layer] += 1

    def keep_scores(self, layer: int) -> NDArray[np.float64]:
        num_layers = self.shape.num_layers
        distance = (self._ids - layer - 1) % num_layers + 1
        nearness = 1 - distance / (num_layers + 1)
        return self._uses / np.maximum(self._events, 1) * nearness[:, None]
