"""The contract of a replacement policy: a pure scorer of keys. Knows no tiers, bytes or locks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from moe_infinity.errors import ConfigError
from moe_infinity.tracing.event import Event
from moe_infinity.types import ExpertKey, ExpertShape, Phase


class CachePolicy(ABC):
    """Says which experts are worth keeping; the cache decides who may go and asks for the worst.

    A policy keeps small arrays over (layer, expert). It is told of every event, *before* that
    event's victims are chosen, and all victims of an event are chosen at once. It is deterministic
    given ``seed``. L: MoE layers, E: experts.
    """

    needs_router_logits: ClassVar[bool] = False  # on_event reads event.router_logits
    wants_forecast: ClassVar[bool] = False  # on_forecast is called, where a predictor speaks

    def __init__(self, shape: ExpertShape, num_slots: int, seed: int = 0) -> None:
        self.shape = shape
        self.num_slots = num_slots
        self.seed = seed
        self.grid = (shape.num_layers, shape.num_experts)
        self.fingerprint = ""  # of the checkpoint; compared when fitted state is loaded

    def begin_request(self) -> None:
        """A new request starts; what was learned before may stay."""

    def end_request(self) -> None:
        """The request is over."""

    def begin_pass(self, phase: Phase) -> None:
        """A forward pass over all layers starts."""

    @abstractmethod
    def on_event(self, event: Event) -> None:
        """Learn from one layer's routing."""

    def on_forecast(self, forecast: NDArray[np.float64]) -> None:
        """What a predictor foresees: [W, L, E] chance of use at each of a layer's next W events."""

    def on_insert(self, key: ExpertKey) -> None:
        """A load of ``key`` begins; misses of one event come by ascending id."""

    def on_evict(self, key: ExpertKey) -> None:
        """``key`` lost its slot."""

    def catch_up(self) -> None:
        """There is time: do what the next question would have to be preceded by. Optional, and it
        changes no answer."""

    @abstractmethod
    def keep_scores(self, layer: int) -> NDArray[np.float64]:
        """[L, E] worth of keeping each key, seen from ``layer``; the lowest evictable one goes."""

    def victims(self, candidates: NDArray[np.int64], count: int, layer: int) -> NDArray[np.int64]:
        """``count`` of the evictable flat keys (layer * E + expert, ascending), worst first.

        Ties go to the smallest key. List-structured policies may answer this directly.
        """
        scores = self.keep_scores(layer).ravel()[candidates]
        return candidates[np.argsort(scores, kind="stable")[:count]]

    def state_arrays(self) -> dict[str, NDArray[np.float64]]:
        """Optional, the kernel form: all that scores follow from, by name, in the order in which
        the policy's GPU kernel keeps it. Empty: there is none. May share memory with the policy."""
        return {}

    def take_state(self, arrays: Mapping[str, NDArray[np.float64]]) -> None:
        """Go on from what another's ``state_arrays`` gave, a kernel's or an equal policy's."""
        raise NotImplementedError(f"{type(self).__module__} has no kernel form")

    @classmethod
    def fit(
        cls,
        shape: ExpertShape,
        num_slots: int,
        misses_of: Callable[[CachePolicy], int],
        path: Path,
        fingerprint: str = "",
    ) -> dict[str, float]:
        """Tune what the policy lets one tune and save to ``path`` what ``load`` reads.

        misses_of: replays the fitting trace with a fresh policy. Returns measures of the fit by
        name. Raises ConfigError where nothing is tuned.
        """
        raise ConfigError(f"{cls.__module__} has nothing to fit; choose a policy that learns")

    def load(self, path: Path) -> None:
        """Read what ``fit`` wrote; raises TraceError where it cannot be used."""
