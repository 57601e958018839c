"""What to load ahead: ranks a predictor's scores, within a horizon and while it pays.

Moves no bytes and reads no clock: whether loads come late it learns from look-ups.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from moe_infinity.predictors.base import ExpertPredictor, Foresight
from moe_infinity.residency.directory import Directory, State
from moe_infinity.residency.meters import Horizon, Threshold, WasteMeter
from moe_infinity.residency.running import Lookup
from moe_infinity.tracing.event import Event
from moe_infinity.types import ExpertKey

_MOST_AT_A_TIME = 16


class Coming(NamedTuple):
    """What a predictor's word means for the cache."""

    load: list[ExpertKey]  # absent keys worth loading, best first
    keep: NDArray[np.int64]  # resident flat keys that are about to be used


_NOTHING = Coming([], np.empty(0, dtype=np.int64))


class PrefetchPlanner:
    """Turns scores over coming experts into loads, and learns from how they turned out."""

    def __init__(self, predictor: ExpertPredictor, directory: Directory) -> None:
        self.predictor = predictor
        self.directory = directory
        self.meter = WasteMeter()
        self.threshold = Threshold()
        shape = directory.shape
        self.horizon = Horizon(most=shape.num_layers)
        counts = np.array(shape.experts_per_layer)[:, None]
        self._exists = np.arange(shape.num_experts) < counts  # [L, E]
        self._layers = np.arange(shape.num_layers)
        self._guesses: list[set[int]] = [set() for _ in counts]  # by layer: experts, unjudged

    def observe(self, event: Event, found: Lookup) -> None:
        """Show the predictor an event; judge by it what had been guessed of its layer."""
        guessed = self._guesses[event.layer]
        if guessed:
            right = guessed.intersection(event.experts.tolist())
            num_wrong = len(guessed) - len(right)
            self.meter.judge(len(right), num_wrong)
            self.horizon.learn(len(found.late), num_wrong)
            in_time = right.intersection(key.expert for key in found.hits)
            self.threshold.judge(len(found.late), len(in_time))
            guessed.clear()
        self.predictor.observe(event)

    @property
    def outlook(self) -> Foresight | None:
        """What the predictor asks of later routers, if all it says comes from them, and before a
        layer's experts are computed."""
        wish = self.predictor.foresight
        return None if wish is None or wish.mode == "next_norm" else wish

    def forecast(self) -> NDArray[np.float64] | None:
        return self.predictor.forecast()

    def plan(self, layer: int) -> Coming:
        """What the coming layers need, seen from ``layer``; the nearer the more it weighs."""
        scores = self.predictor.predict()
        if scores is None:
            return _NOTHING
        num_layers, num_experts = scores.shape
        distance = (self._layers - layer - 1) % num_layers
        near = (distance < self.horizon.reach)[:, None]
        likely = np.flatnonzero(near & self._exists & (scores >= self.threshold.chance))
        states = self.directory.states[likely]
        absent = likely[states == State.ABSENT]
        nearness = 1 - distance / num_layers
        value = scores.ravel()[absent] * nearness[absent // num_experts]
        best = absent[np.lexsort((absent, -value))][:_MOST_AT_A_TIME]
        for flat in best.tolist():
            self._guesses[flat // num_experts].add(flat % num_experts)
        wanted = best[: self.meter.allowance(_MOST_AT_A_TIME)]
        keep = likely if self.meter.is_on else likely[:0]
        return Coming([self.directory.key(flat) for flat in wanted], keep)
