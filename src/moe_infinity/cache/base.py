"""What the model sees of a cache: events go in, experts come to a compute function."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch

from moe_infinity.tracing.event import Event
from moe_infinity.types import ExpertKey, Phase, TierName

# compute(key, views): the expert's parts by name, each a list of blocks; valid during the call.
Compute = Callable[[ExpertKey, dict[str, list[torch.Tensor]]], None]


class Hierarchy(ABC):
    """Everything between the disk and the device that computes. One thread drives it."""

    @abstractmethod
    def begin_request(self) -> None:
        """A new request starts."""

    @abstractmethod
    def end_request(self) -> None:
        """The request is over, well or not."""

    @abstractmethod
    def begin_pass(self, phase: Phase) -> None:
        """A forward pass starts."""

    @abstractmethod
    def run_event(self, event: Event, compute: Compute) -> None:
        """Bring every expert of the event to ``compute``, each exactly once, in any order.

        Raises what a load failed with; nothing stays pinned or in flight then.
        """

    @abstractmethod
    def tier_of(self, key: ExpertKey) -> TierName:
        """Where a request for the expert would find it now."""

    @abstractmethod
    def check_integrity(self) -> None:
        """Raise AssertionError if any slot is lost or held twice."""

    @abstractmethod
    def close(self) -> None:
        """Stop and join every thread; idempotent."""
