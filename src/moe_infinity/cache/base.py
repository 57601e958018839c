"""What the model sees of a cache: events go in, experts come to a compute function."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from moe_infinity.cache.early_reads import EarlyReads
from moe_infinity.kernels.base import Views
from moe_infinity.predictors.base import Embeddings, Foresight, TokenIds
from moe_infinity.tracing.event import Event
from moe_infinity.types import ExpertKey, Phase, TierName

# compute(keys, views): experts that are here, and the parts of each; valid during the call. Returns
# the seconds it took if that was before the call.
Compute = Callable[[list[ExpertKey], list[Views]], float | None]


# Of an expert: not in memory; there, and what somebody noted of its place holds; there or on its
# way, and nothing is noted.
NOWHERE, NOTED, COMING = 0, 1, 2


class Hierarchy(ABC):
    """Everything between the disk and the device that computes. One thread drives it.

    known: [L, E] NOWHERE, NOTED or COMING. Who notes an expert's place says so there, the rest is
    the hierarchy's. None where places do not last.
    """

    known: NDArray[np.uint8] | None = None
    early: EarlyReads | None = None  # how compiled code may begin what is NOWHERE by itself

    @abstractmethod
    def begin_request(self) -> None:
        """A new request starts."""

    @abstractmethod
    def end_request(self) -> None:
        """The request is over, well or not."""

    @abstractmethod
    def begin_pass(
        self,
        phase: Phase,
        embeddings: Embeddings = None,
        token_ids: TokenIds = None,
    ) -> None:
        """A forward pass starts. embeddings: [T, H] of its tokens, where a predictor asks.
        token_ids: [T], where they are known."""

    @abstractmethod
    def run_event(
        self, event: Event, compute: Compute, foreseen: NDArray[np.float32] | None = None
    ) -> None:
        """Bring every expert of the event to ``compute``, each exactly once, in any order, one or
        several at a time.

        foreseen: [T, D, E] what the next layers' routers say to this event's router input.
        Raises what a load failed with; nothing stays pinned or in flight then.
        """

    def run_hits(self, events: Sequence[Event], spent_s: Sequence[float]) -> bool:
        """Tell of events of a decode pass, in their order, whose experts are computed from where
        they lay, or were before, and how long each took. No expert moves. False: nothing was done,
        ``run_computed`` has to. Raises what ``run_event`` does."""
        return False

    def run_computed(self, events: Sequence[Event], spent_s: Sequence[float]) -> None:
        """The same of experts that were all computed before, and may have moved behind that."""
        for event, seconds in zip(events, spent_s, strict=True):
            left = iter((seconds,))  # told once, however often asked
            self.run_event(event, lambda keys, views, left=left: next(left, 0.0))  # type: ignore[misc]

    @abstractmethod
    def count_compute(self, seconds: float) -> None:
        """Experts that were told of took so much more."""

    def views_here(self, keys: list[ExpertKey]) -> tuple[list[ExpertKey], list[Views]]:
        """Those of them that can be computed from right away, and where; moves none."""
        return [], []

    @property
    def outlook(self) -> Foresight | None:
        """What a predictor wants of later routers in this pass, if it looks ahead by them alone:
        who asks them before an event may ``foresee`` only where they choose what is NOWHERE."""
        return None

    @abstractmethod
    def foresee(
        self, layer: int, scores: NDArray[np.float32], chosen: Sequence[ExpertKey] = ()
    ) -> None:
        """What the next layers' routers say [T, D, E] to a layer's router input or its output. The
        layer's event was run; or its members are ``chosen``, in memory, and stay there."""

    @abstractmethod
    def looks_ahead(self) -> bool:
        """Whether ``foreseen`` and ``foresee`` are of use now; else they need not be made."""

    @abstractmethod
    def is_quiet(self) -> bool:
        """Whether an event that only hits may be told after its experts were computed, though
        nobody asks for an ``outlook``: nobody looks ahead now."""

    @abstractmethod
    def tier_of(self, key: ExpertKey) -> TierName:
        """Where a request for the expert would find it now."""

    @abstractmethod
    def check_integrity(self) -> None:
        """Raise AssertionError if any slot is lost or held twice."""

    @abstractmethod
    def close(self) -> None:
        """Stop and join every thread; idempotent."""
