"""Replays over policies, predictors and capacities, in several processes; rows come out."""

from __future__ import annotations

import functools
import itertools
import os
import pickle
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import active_children, get_context
from pathlib import Path
from typing import Any

from moe_infinity.config import learned_path
from moe_infinity.policies import find_policy
from moe_infinity.policies.base import CachePolicy
from moe_infinity.predictors import find_predictor
from moe_infinity.predictors.base import ExpertPredictor
from moe_infinity.simulator.belady import optimal_misses
from moe_infinity.simulator.cost_model import Cost
from moe_infinity.simulator.replay import Scope, lacks, load_learned, replay, slots_of, teach
from moe_infinity.tracing.trace import Trace
from moe_infinity.tracing.trace_file import load_trace
from moe_infinity.types import ExpertShape

ORACLES = ("belady", "belady_bypass")  # bounds, not policies: no live cache knows the future
NOT_AVAILABLE = "n/a"
Row = dict[str, Any]
_FREE = Cost()


@dataclass(frozen=True)
class Task:
    """One replay. history: a trace that predictors watch first, cache aside."""

    trace: Path
    policy: str
    prefetch: str
    capacity: float
    scope: Scope = "global"
    phase: str = "decode"
    cost: Cost = _FREE
    history: Path | None = None
    seed: int = 0


def tasks_of(
    traces: Sequence[Path],
    policies: Sequence[str],
    predictors: Sequence[str],
    capacities: Sequence[float],
    **common: Any,
) -> list[Task]:
    """Every combination; the oracles only without prefetch, for they are bounds without it."""
    grid = itertools.product(traces, policies, predictors, capacities)
    return [
        Task(trace, policy, prefetch, capacity, **common)
        for trace, policy, prefetch, capacity in grid
        if policy not in ORACLES or prefetch == "none"
    ]


def run(
    tasks: Sequence[Task],
    num_processes: int | None = None,
    on_row: Callable[[], None] | None = None,
) -> list[Row]:
    """One row per task, in their order. Raises what a replay raised."""
    workers = min(len(tasks), num_processes or os.cpu_count() or 1)
    if workers <= 1:
        return [row for task in tasks for row in _tell(row_of(task), on_row)]
    # Fresh interpreters: a forked one would inherit whatever threads the caller has.
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        futures = [pool.submit(row_of, task) for task in tasks]
        try:
            for future in as_completed(futures):
                future.result()
                if on_row is not None:
                    on_row()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for child in active_children():  # else a Ctrl-C would wait for their replays to end
                child.terminate()
            raise
        return [future.result() for future in futures]


def row_of(task: Task) -> Row:
    """Replay one task."""
    trace = load_trace(task.trace).of_phase(task.phase)
    slots = slots_of(trace.shape, task.capacity, task.scope)
    row: Row = {
        "trace": trace.name,
        "policy": task.policy,
        "prefetch": task.prefetch,
        "capacity": task.capacity,
        "slots": sum(slots),
    }
    counted = _bound(task, trace, slots) if task.policy in ORACLES else _replay(task, trace, slots)
    return row | counted


def _replay(task: Task, trace: Trace, slots: Sequence[int]) -> Row:
    policy_class, predictor_class = find_policy(task.policy), find_predictor(task.prefetch)
    names = "hits misses late hit_rate demand_loads proactive_loads wasted_loads stall_s"
    if lacks(trace, policy_class, predictor_class):
        return dict.fromkeys(names.split(), NOT_AVAILABLE)
    policy = policy_class(trace.shape, sum(slots), task.seed)
    _recall(policy, task.policy, trace.fingerprint)
    predictor = pickle.loads(
        _taught(task.prefetch, trace.shape, trace.fingerprint, task.history, task.seed)
    )
    result = replay(trace, policy, predictor, slots, task.cost)
    c = result.counters
    return {
        "hits": c.hits,
        "misses": c.misses,
        "late": c.late,
        "hit_rate": result.hit_rate,
        "demand_loads": c.demand_loads,
        "proactive_loads": c.proactive_loads,
        "wasted_loads": c.wasted_loads,
        "stall_s": result.stall_s,
    }


@functools.lru_cache(maxsize=32)
def _taught(
    prefetch: str, shape: ExpertShape, fingerprint: str | None, history: Path | None, seed: int
) -> bytes:
    """A predictor that has watched ``history``, pickled: many replays begin with the same one."""
    predictor = find_predictor(prefetch)(shape, seed)
    _recall(predictor, prefetch, fingerprint)
    if history is not None:
        teach(predictor, load_trace(history))
    return pickle.dumps(predictor)


def _recall(member: CachePolicy | ExpertPredictor, name: str, fingerprint: str | None) -> None:
    """Give it what was learned for this model before, where there is such a file."""
    member.fingerprint = fingerprint or ""
    load_learned(member, learned_path(fingerprint, name) if fingerprint else None)


def _bound(task: Task, trace: Trace, slots: Sequence[int]) -> Row:
    """Misses that no policy can avoid; what they stall is not simulated."""
    events = [(e.layer, e.experts.astype("int16")) for p in trace.passes() for e in p.events]
    bypass = task.policy == "belady_bypass"
    num_experts = trace.shape.num_experts
    if len(slots) == 1:
        misses = sum(optimal_misses(events, slots[0], num_experts, bypass=bypass))
    else:
        misses = sum(
            sum(optimal_misses(own, pool, num_experts, bypass=bypass))
            for layer, pool in enumerate(slots)
            if (own := [event for event in events if event[0] == layer])
        )
    total = sum(len(experts) for _, experts in events)
    return {
        "hits": total - misses,
        "misses": misses,
        "late": 0,
        "hit_rate": (total - misses) / total,
        "demand_loads": misses,
        "proactive_loads": 0,
        "wasted_loads": 0,
        "stall_s": NOT_AVAILABLE,
    }


def _tell(row: Row, on_row: Callable[[], None] | None) -> Iterator[Row]:
    if on_row is not None:
        on_row()
    yield row
