"""The contract of a predictor: events in, scores over coming experts out. Knows no caches."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from moe_infinity.tracing.event import Event
from moe_infinity.types import ExpertShape


class ExpertPredictor(ABC):
    """Ranks the experts of layers to come. Deterministic given ``seed``. L: layers, E: experts."""

    needs_router_logits = False  # set where observe reads event.router_logits
    needs_router_input = False  # set where observe reads event.router_input

    def __init__(self, shape: ExpertShape, seed: int = 0) -> None:
        self.shape = shape
        self.seed = seed

    def begin_request(self) -> None:
        """A new request starts."""

    @abstractmethod
    def observe(self, event: Event) -> None:
        """Learn from one layer's routing; called once per event, before predict."""

    @abstractmethod
    def predict(self) -> NDArray[np.float64] | None:
        """[L, E] chance that a key is used at its layer's next event; None: nothing to say."""

    def end_request(self) -> None:
        """The request is over; what it taught may be kept."""

    def save(self, path: Path) -> None:
        """Write learned state to ``path``; nothing where there is none."""

    def load(self, path: Path) -> None:
        """Read what ``save`` wrote; raises CorruptCheckpointError where it cannot be used."""
