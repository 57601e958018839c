"""The contract of a predictor: events in, scores over coming experts out. Knows no caches."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from moe_infinity.tracing.event import Event
from moe_infinity.types import ExpertShape, Phase

# Which input the routers of later layers are shown: the layer's own router input; the same plus
# the mean change from there to the later layer's; the layer's output after the later layer's norm.
ForesightMode = Literal["raw", "residual", "next_norm"]
FORESIGHT_MODES: tuple[ForesightMode, ...] = ("raw", "residual", "next_norm")


Embeddings = NDArray[np.float32] | None
TokenIds = NDArray[np.int64] | None


class Foresight(NamedTuple):
    """A predictor's wish to be shown what the next ``depth`` layers' routers say already now."""

    mode: ForesightMode
    depth: int


class Memory(NamedTuple):
    """Bytes a predictor takes at most: per expert, per pair of a layer's experts, per element of
    the hidden size once and in every layer, and otherwise."""

    per_expert: int = 256
    per_pair: int = 0
    per_hidden: int = 0
    per_layer_hidden: int = 0
    other: int = 0

    def num_bytes(self, shape: ExpertShape, hidden_size: int) -> int:
        cells = shape.num_layers * shape.num_experts
        per_layer = self.per_layer_hidden * hidden_size
        experts = cells * (self.per_expert + self.per_pair * shape.num_experts)
        return experts + self.per_hidden * hidden_size + shape.num_layers * per_layer + self.other


class ExpertPredictor(ABC):
    """Ranks the experts of layers to come. Deterministic given ``seed``. L: layers, E: experts.

    What a predictor needs beside the routing it declares; a run or a trace without it is refused.
    """

    needs_router_logits: ClassVar[bool] = False  # observe reads event.router_logits
    needs_router_input: ClassVar[bool] = False  # observe reads event.router_input
    needs_embeddings: ClassVar[bool] = False  # begin_pass reads embeddings
    needs_fit: ClassVar[bool] = False  # says nothing before ``moe-infinity fit``
    needs_future: ClassVar[bool] = False  # an oracle: set_future is called; simulator only
    foresight: ClassVar[Foresight | None] = None  # foresee is called
    is_silent: ClassVar[bool] = False  # never predicts anything
    memory: ClassVar[Memory] = Memory()  # planned for: budgets are hard

    def __init__(self, shape: ExpertShape, seed: int = 0) -> None:
        self.shape = shape
        self.seed = seed
        self.grid = (shape.num_layers, shape.num_experts)
        self.fingerprint = ""  # of the checkpoint; saved with the state and compared when loaded

    def begin_request(self) -> None:
        """A new request starts."""

    def begin_pass(self, phase: Phase, embeddings: Embeddings, ids: TokenIds = None) -> None:
        """A forward pass starts; what it predicts now is loaded before the first layer runs.

        embeddings: [T, H] of its tokens, where asked for. ids: [T] theirs, where they are known.
        """

    @abstractmethod
    def observe(self, event: Event) -> None:
        """Learn from one layer's routing; called once per event, before predict."""

    def foresee(self, layer: int, scores: NDArray[np.float32]) -> None:
        """What routers after ``layer`` say: scores [T, D, E], before softmax.

        Modes raw and residual speak before that layer's experts are computed, next_norm after.
        """

    def set_future(self, events: Sequence[Event]) -> None:
        """Every event to come, in order; only where ``needs_future``."""

    @abstractmethod
    def predict(self) -> NDArray[np.float64] | None:
        """[L, E] chance that a key is used at its layer's next event; None: nothing to say."""

    def forecast(self) -> NDArray[np.float64] | None:
        """[W, L, E] chance of use at each of a layer's next W events; as far as it can see."""
        scores = self.predict()
        return None if scores is None else scores[None]

    def end_request(self) -> None:
        """The request is over; what it taught may be kept."""

    def save(self, path: Path) -> None:
        """Write learned state to ``path``, whole or not at all; nothing where there is none."""

    def load(self, path: Path) -> None:
        """Read what ``save`` wrote; raises TraceError where it cannot be used."""
