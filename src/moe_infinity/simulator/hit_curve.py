"""Hits against capacity: the live policies and the offline optimum on one trace, and the knee."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from moe_infinity.policies import find_policy
from moe_infinity.predictors import find_predictor
from moe_infinity.simulator.belady import accesses_of, optimal_misses
from moe_infinity.simulator.replay import replay, slots_of
from moe_infinity.tracing.trace import Trace

CAPACITIES = (0.03, 0.06, 0.12, 0.25, 0.37, 0.50, 0.75)
# The knee: from there on KNEE_STEP more capacity gains less than KNEE_GAIN hits. Where hits follow
# capacity one to one they gain 0.10; below a third of that the memory serves better elsewhere.
KNEE_STEP, KNEE_GAIN = 0.10, 0.03


@dataclass(frozen=True)
class CurvePoint:
    """Hit rates with slots for ``capacity`` of all experts; the cache starts cold."""

    capacity: float
    num_slots: int
    next_use: float
    lru: float
    belady: float


@dataclass(frozen=True)
class HitCurve:
    """ceiling: the hit rate if nothing is ever evicted, so that only first uses miss."""

    points: tuple[CurvePoint, ...]
    ceiling: float
    num_tokens: int

    @property
    def knee(self) -> float | None:
        """Capacity at the knee of next_use; see find_knee."""
        return find_knee(self._next_use)

    def hit_rate(self, capacity: float) -> float:
        """Of next_use, interpolated."""
        known, hits = zip(*self._next_use, strict=True)
        return float(np.interp(capacity, known, hits))

    @property
    def _next_use(self) -> list[tuple[float, float]]:
        return [*((point.capacity, point.next_use) for point in self.points), (1.0, self.ceiling)]


def hit_curve(trace: Trace, max_events: int, capacities: Sequence[float] = CAPACITIES) -> HitCurve:
    """Replay the first passes of ``trace``, ``max_events`` events or one pass, at every capacity.

    Capacities below one token's experts of a layer are left out.
    """
    part = _first_passes(trace, max(1, max_events // trace.shape.num_layers))
    events = accesses_of(part)
    num_uses = max(1, sum(len(experts) for _, experts in events))
    distinct = {(layer, expert) for layer, experts in events for expert in experts.tolist()}
    ceiling = 1 - len(distinct) / num_uses
    points = []
    for capacity in capacities:
        num_slots = math.floor(capacity * trace.shape.num_total + 1e-9)
        if num_slots >= len(distinct):  # nothing is ever evicted: no need to replay
            points.append(CurvePoint(capacity, num_slots, ceiling, ceiling, ceiling))
        elif num_slots >= trace.shape.top_k:
            next_use, lru = (_hit_rate(part, name, capacity) for name in ("next_use", "lru"))
            misses = sum(optimal_misses(events, num_slots, trace.shape.num_experts))
            points.append(CurvePoint(capacity, num_slots, next_use, lru, 1 - misses / num_uses))
    return HitCurve(tuple(points), ceiling, part.num_tokens)


def find_knee(curve: Sequence[tuple[float, float]]) -> float | None:
    """Smallest capacity of ``curve``, (capacity, hit rate) ascending, that is enough.

    Enough: from there on nowhere do KNEE_STEP more capacity give KNEE_GAIN more hits. Linear
    between points, in steps of a percent. None where that is nowhere before the curve's end.
    """
    capacities, hits = zip(*curve, strict=True)
    grid = np.arange(capacities[0], capacities[-1] - KNEE_STEP + 1e-9, 0.01)
    gain = np.interp(grid + KNEE_STEP, capacities, hits) - np.interp(grid, capacities, hits)
    steep = np.flatnonzero(gain >= KNEE_GAIN)
    first = int(steep[-1]) + 1 if len(steep) else 0
    return float(grid[first]) if first < len(grid) else None


def _first_passes(trace: Trace, num_passes: int) -> Trace:
    return trace.select(trace.step <= np.unique(trace.step)[:num_passes][-1])


def _hit_rate(trace: Trace, policy_name: str, capacity: float) -> float:
    slots = slots_of(trace.shape, capacity)
    policy = find_policy(policy_name)(trace.shape, slots[0])
    return replay(trace, policy, find_predictor("none")(trace.shape), slots).hit_rate or 0.0
