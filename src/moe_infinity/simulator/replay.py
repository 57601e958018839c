"""Replays a recorded routing through the very objects that decide in a live run."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from moe_infinity.config import learned_path
from moe_infinity.errors import ConfigError, TraceError
from moe_infinity.policies.base import CachePolicy
from moe_infinity.predictors.base import ExpertPredictor
from moe_infinity.residency.directory import Directory
from moe_infinity.residency.planner import PrefetchPlanner
from moe_infinity.residency.residency import Residency
from moe_infinity.residency.runner import ChooseMisses, EventRunner
from moe_infinity.simulator.cost_model import Cost, SimulatedCarrier
from moe_infinity.stats import Counters, PhaseCounters
from moe_infinity.tracing.event import Event
from moe_infinity.tracing.trace import Trace, TracePass
from moe_infinity.types import ExpertShape

Scope = Literal["global", "layer"]


@dataclass(frozen=True)
class Result:
    """What a replay counted, both phases together, and the seconds it waited on its own clock."""

    counters: PhaseCounters
    stall_s: float

    @property
    def hit_rate(self) -> float | None:
        c = self.counters
        total = c.hits + c.late + c.misses
        return c.hits / total if total else None


def slots_of(shape: ExpertShape, capacity: float, scope: Scope = "global") -> tuple[int, ...]:
    """Slots per pool of a share of all experts (or of each layer's). Raises ConfigError."""
    pools = [shape.num_total] if scope == "global" else list(shape.experts_per_layer)
    slots = tuple(math.floor(capacity * experts + 1e-9) for experts in pools)
    if min(slots) < shape.top_k:
        raise ConfigError(
            f"capacity {capacity:.1%}: got {min(slots)} slots, expected at least {shape.top_k}, "
            f"one token's experts of a layer; ask for {shape.top_k / min(pools):.1%} or more"
        )
    return slots


def lacks(trace: Trace, policy: type[CachePolicy], predictor: type[ExpertPredictor]) -> str | None:
    """What policy or predictor need and the trace does not hold; None: nothing."""
    if trace.logits is None and (policy.needs_router_logits or predictor.needs_router_logits):
        return "router logits"
    if trace.hidden is None and predictor.needs_router_input:
        return "router inputs"
    if trace.embeddings is None and predictor.needs_embeddings:
        return "embeddings"
    wish = predictor.foresight
    if wish is not None and wish.mode not in trace.foresight:
        return f"foresight in mode {wish.mode}"
    return None


def replay(
    trace: Trace,
    policy: CachePolicy,
    predictor: ExpertPredictor,
    slots: Sequence[int],
    cost: Cost | None = None,
    carrier: SimulatedCarrier | None = None,
    choose_misses: ChooseMisses | None = None,
) -> Result:
    """Run every pass of ``trace`` through ``policy`` and ``predictor``; the cache starts cold.

    slots: of the one pool, or of one pool per layer. choose_misses: the misses that are loaded.
    """
    shape = trace.shape
    pools = tuple(range(shape.num_layers)) if len(slots) > 1 else (0,) * shape.num_layers
    directory = Directory(shape, tuple(slots), pools)
    residency = Residency(directory, policy, Counters([1] * shape.num_layers))
    runner = EventRunner(residency, PrefetchPlanner(predictor, directory), choose_misses)
    carrier = carrier or SimulatedCarrier(cost or Cost(), shape.top_k)
    passes = list(trace.passes())
    if predictor.needs_future:
        predictor.set_future([event for each in passes for event in each.events])
    for number, each in enumerate(passes):
        if each.starts_request:
            if number:
                runner.end_request()
            runner.begin_request()
        _replay_pass(each, runner, carrier)
    runner.end_request()
    total = PhaseCounters()
    total.add(residency.counters.prefill)
    total.add(residency.counters.decode)
    return Result(total, carrier.stall_s)


def teach(predictor: ExpertPredictor, history: Trace) -> None:
    """Let a predictor watch earlier requests, as it would have while they ran.

    An oracle needs no teaching. Raises TraceError if the requests are another model's.
    """
    if history.shape != predictor.shape:
        raise TraceError(
            f"{history.name} is of a model with {history.shape}, expected {predictor.shape}"
        )
    if predictor.needs_future:
        return
    for each in watched(predictor, history):
        for event in each.events:
            show(predictor, each, event)


def watched(predictor: ExpertPredictor, trace: Trace) -> Iterator[TracePass]:
    """The trace's passes, one after the other; tells the predictor where requests and passes
    begin and end. The events are for the caller to ``show``."""
    for number, each in enumerate(trace.passes()):
        if each.starts_request:
            if number:
                predictor.end_request()
            predictor.begin_request()
        begin_pass(predictor, each)
        yield each
    predictor.end_request()


def show(predictor: ExpertPredictor, each: TracePass, event: Event) -> None:
    """Let a predictor learn from one event of a pass, and from the foresight recorded with it."""
    predictor.observe(event)
    foreseen = foresight_of(each, predictor, event.layer)
    if foreseen is not None:
        predictor.foresee(event.layer, foreseen)


def begin_pass(predictor: ExpertPredictor, each: TracePass) -> None:
    predictor.begin_pass(each.phase, embeddings_of(each, predictor), each.token_ids)


def embeddings_of(each: TracePass, predictor: ExpertPredictor) -> np.ndarray | None:
    """[T, H] of a pass's tokens, if the predictor asks for them and its trace holds them."""
    if not predictor.needs_embeddings or each.embeddings is None:
        return None
    return each.embeddings.astype(np.float32)


def foresight_of(each: TracePass, predictor: ExpertPredictor, layer: int) -> np.ndarray | None:
    """[T, D, E] what a pass's trace holds of the predictor's wish; None without one."""
    wish = predictor.foresight
    if wish is None or wish.mode not in each.foresight or each.phase != "decode":
        return None
    return each.foresight[wish.mode][:, layer, : wish.depth].astype(np.float32)


def recall(member: CachePolicy | ExpertPredictor, name: str, fingerprint: str | None) -> None:
    """Give a policy or predictor what it learned of this model before, where there is a file."""
    member.fingerprint = fingerprint or ""
    path = learned_file(name, fingerprint)
    if path is not None:
        member.load(path)


def learned_file(name: str, fingerprint: str | None) -> Path | None:
    """What a policy or predictor learned of this model before, if anything."""
    path = learned_path(fingerprint, name) if fingerprint else None
    return path if path is not None and path.is_file() else None


def _replay_pass(each: TracePass, runner: EventRunner, carrier: SimulatedCarrier) -> None:
    predictor = runner.planner.predictor
    runner.begin_pass(each.phase, carrier, embeddings_of(each, predictor), each.token_ids)
    runner.residency.counters.now.num_passes += 1
    runner.residency.counters.now.num_tokens += (
        len(each.events[0].top_k_index) if each.events else 0
    )
    late = predictor.foresight is not None and predictor.foresight.mode == "next_norm"
    for event in each.events:
        carrier.spend(carrier.cost.dense_s())
        foreseen = foresight_of(each, predictor, event.layer)
        runner.run(event, carrier, None if late else foreseen)
        carrier.end_event(each.phase)
        if late and foreseen is not None:
            runner.foresee(event.layer, each.phase, foreseen, carrier)
