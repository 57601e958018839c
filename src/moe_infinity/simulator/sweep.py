"""Replays over policies, predictors and capacities, in several processes; rows come out."""

from __future__ import annotations

import functools
import itertools
import os
import pickle
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import active_children, get_context
from pathlib import Path
from typing import Any

from moe_infinity.policies import find_policy
from moe_infinity.policies._guarded import GuardedPolicy
from moe_infinity.predictors import find_predictor
from moe_infinity.predictors._guarded import GuardedPredictor
from moe_infinity.predictors.base import ExpertPredictor
from moe_infinity.registry import make
from moe_infinity.simulator.belady import accesses_of, optimal_misses
from moe_infinity.simulator.cost_model import Cost
from moe_infinity.simulator.replay import (
    Scope,
    lacks,
    learned_file,
    recall,
    replay,
    slots_of,
    teach,
)
from moe_infinity.tracing.trace import Trace
from moe_infinity.tracing.trace_file import load_trace
from moe_infinity.types import ExpertShape

ORACLES = ("belady", "belady_bypass")  # bounds, not policies: no live cache knows the future
NOT_AVAILABLE = "n/a"
# Of a row: what failed and was replaced, as in a live run; what else there is to say of it.
FAULTS, NOTES = "faults", "notes"
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
    on_row: Callable[[], None] = lambda: None,
) -> list[Row]:
    """One row per task, in their order. Raises what a replay raised."""
    workers = min(len(tasks), num_processes or os.cpu_count() or 1)
    if workers <= 1:
        _loaded.cache_clear()  # files may have changed since the last run in this process
        _taught.cache_clear()
        rows = []
        for task in tasks:
            rows.append(row_of(task))
            on_row()
        return rows
    # Fresh interpreters: a forked one would inherit whatever threads the caller has.
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        futures = [pool.submit(row_of, task) for task in tasks]
        try:
            for future in as_completed(futures):
                future.result()
                on_row()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for child in active_children():  # else a Ctrl-C would wait for their replays to end
                child.terminate()
            raise
        return [future.result() for future in futures]


def row_of(task: Task) -> Row:
    """Replay one task."""
    trace = _loaded(task.trace, task.phase)
    slots = slots_of(trace.shape, task.capacity, task.scope)
    row: Row = {
        "trace": trace.name,
        "policy": task.policy,
        "prefetch": task.prefetch,
        "capacity": task.capacity,
        "slots": sum(slots),
    }
    counted = _bound(task, trace, slots) if task.policy in ORACLES else _replay(task, trace, slots)
    return {FAULTS: [], NOTES: []} | row | counted


def _replay(task: Task, trace: Trace, slots: Sequence[int]) -> Row:
    policy_class, predictor_class = find_policy(task.policy), find_predictor(task.prefetch)
    names = "hits misses late hit_rate demand_loads proactive_loads wasted_loads stall_s"
    if lost := lacks(trace, policy_class, predictor_class):
        return dict.fromkeys(names.split(), NOT_AVAILABLE) | {
            NOTES: [
                f"{trace.name} holds no {lost}, which {task.prefetch} needs: n/a (see "
                f"moe-infinity trace --help)"
            ]
        }
    policy = GuardedPolicy(make(policy_class, trace.shape, sum(slots), task.seed))
    recall(policy, task.policy, trace.fingerprint)
    predictor = pickle.loads(
        _taught(task.prefetch, trace.shape, trace.fingerprint, task.history, task.seed)
    )
    if not predictor.needs_future:
        predictor = GuardedPredictor(predictor)
    result = replay(trace, policy, predictor, slots, task.cost)
    c = result.counters
    faults = [policy.fault, getattr(predictor, "fault", None)]
    return {
        "hits": c.hits,
        "misses": c.misses,
        "late": c.late,
        "hit_rate": result.hit_rate,
        "demand_loads": c.demand_loads,
        "proactive_loads": c.proactive_loads,
        "wasted_loads": c.wasted_loads,
        "stall_s": result.stall_s,
        FAULTS: [fault for fault in faults if fault],
        NOTES: _notes(task, trace, predictor_class),
    }


def _notes(task: Task, trace: Trace, predictor: type[ExpertPredictor]) -> list[str]:
    """What policy and predictor began with, or should have."""
    notes = [
        f"{name} began with what it had learned of this model: {path}"
        for name in (task.policy, task.prefetch)
        if (path := learned_file(name, trace.fingerprint))
    ]
    if predictor.needs_fit and learned_file(task.prefetch, trace.fingerprint) is None:
        notes.append(
            f"{task.prefetch} has learned nothing of this model and says nothing; fit it before: "
            f"moe-infinity fit {task.prefetch}"
        )
    return notes


@functools.lru_cache(maxsize=2)
def _loaded(path: Path, phase: str) -> Trace:
    """Tasks come trace by trace, and a trace may be large: it is read once, not once per task."""
    return load_trace(path).of_phase(phase)


@functools.lru_cache(maxsize=32)
def _taught(
    prefetch: str, shape: ExpertShape, fingerprint: str | None, history: Path | None, seed: int
) -> bytes:
    """A predictor that has watched ``history``, pickled: many replays begin with the same one."""
    predictor = make(find_predictor(prefetch), shape, seed)
    recall(predictor, prefetch, fingerprint)
    if history is not None:
        teach(predictor, load_trace(history))
    return pickle.dumps(predictor)


def _bound(task: Task, trace: Trace, slots: Sequence[int]) -> Row:
    """Misses that no policy can avoid; what they stall is not simulated."""
    events = accesses_of(trace)
    pools = [events]
    if len(slots) > 1:
        pools = [[e for e in events if e[0] == layer] for layer in range(len(slots))]
    bypass = task.policy == "belady_bypass"
    num_experts = trace.shape.num_experts
    misses = sum(
        sum(optimal_misses(own, count, num_experts, bypass=bypass))
        for own, count in zip(pools, slots, strict=True)
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
