"""A policy that may fail: when it does, LRU takes over for the rest of the run."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moe_infinity.policies.base import CachePolicy
from moe_infinity.policies.lru import Policy as Lru
from moe_infinity.tracing.event import Event
from moe_infinity.types import ExpertKey, Phase

_log = logging.getLogger(__name__)


class GuardedPolicy(CachePolicy):
    """Hands every call to ``inner``; its first error is logged, kept in ``fault``, and ends it.

    Wrong answers are errors too: victims that are no candidates, scores of another shape.
    """

    def __init__(self, inner: CachePolicy) -> None:
        super().__init__(inner.shape, inner.num_slots, inner.seed)
        self.fault: str | None = None
        self._use(inner)
        self.wants_forecast = inner.wants_forecast  # type: ignore[misc]
        self.needs_router_logits = inner.needs_router_logits  # type: ignore[misc]

    def begin_request(self) -> None:
        self._tell(lambda policy: policy.begin_request())

    def end_request(self) -> None:
        self._tell(lambda policy: policy.end_request())

    def begin_pass(self, phase: Phase) -> None:
        self._tell(lambda policy: policy.begin_pass(phase))

    def on_event(self, event: Event) -> None:
        self._tell(lambda policy: policy.on_event(event))

    def on_forecast(self, forecast: NDArray[np.float64]) -> None:
        self._tell(lambda policy: policy.on_forecast(forecast))

    def on_insert(self, key: ExpertKey) -> None:
        if self._hears_inserts:
            self._tell(lambda policy: policy.on_insert(key))

    def on_evict(self, key: ExpertKey) -> None:
        if self._hears_evictions:
            self._tell(lambda policy: policy.on_evict(key))

    def catch_up(self) -> None:
        self._tell(lambda policy: policy.catch_up())

    def keep_scores(self, layer: int) -> NDArray[np.float64]:
        scores: NDArray[np.float64] = self._tell(lambda policy: policy.keep_scores(layer))
        return scores

    def victims(self, candidates: NDArray[np.int64], count: int, layer: int) -> NDArray[np.int64]:
        def choose(policy: CachePolicy) -> NDArray[np.int64]:
            chosen = policy.victims(candidates, count, layer)
            found = np.searchsorted(candidates, chosen).clip(max=len(candidates) - 1)
            named = len(set(chosen.tolist())) == len(chosen) == count
            if not named or (candidates[found] != chosen).any():
                raise ValueError(f"got victims {chosen}, expected {count} distinct candidates")
            return chosen

        victims: NDArray[np.int64] = self._tell(choose)
        return victims

    def state_arrays(self) -> dict[str, NDArray[np.float64]]:
        arrays: dict[str, NDArray[np.float64]] = self._tell(lambda policy: policy.state_arrays())
        return arrays

    def take_state(self, arrays: Mapping[str, NDArray[np.float64]]) -> None:
        self._tell(lambda policy: policy.take_state(arrays))

    def load(self, path: Path) -> None:
        self.inner.fingerprint = self.fingerprint
        self.inner.load(path)

    def _use(self, inner: CachePolicy) -> None:
        self.inner, kind = inner, type(inner)
        self._hears_inserts = kind.on_insert is not CachePolicy.on_insert
        self._hears_evictions = kind.on_evict is not CachePolicy.on_evict

    def _tell(self, ask: Callable[[CachePolicy], Any]) -> Any:
        try:
            return ask(self.inner)
        except Exception as error:
            if self.fault is not None:
                raise
            name = f"{type(self.inner).__module__}.{type(self.inner).__name__}"
            self.fault = f"policy {name} failed ({type(error).__name__}: {error}); went on with lru"
            _log.warning("%s", self.fault, exc_info=error)
            self._use(Lru(self.shape, self.num_slots, self.seed))
            return ask(self.inner)
