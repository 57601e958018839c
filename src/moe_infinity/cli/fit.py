"""``moe-infinity fit``: tune a policy, or fit a predictor, to a model's recorded routing."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from moe_infinity.cli import common
from moe_infinity.config import learned_path
from moe_infinity.errors import ConfigError, UnknownNameError
from moe_infinity.policies import find_policy, policy_names
from moe_infinity.policies.base import CachePolicy
from moe_infinity.predictors import find_predictor, predictor_names
from moe_infinity.predictors.base import ExpertPredictor
from moe_infinity.tracing.trace import PHASES, Trace
from moe_infinity.training import TRAINERS

# What a trace may lack, as simulator/replay.py names it, and the option that records it.
_RECORDED_BY = {
    "router logits": "--logits",
    "router inputs": "--hidden",
    "embeddings": "--hidden",
    "foresight": "--foresight 3",
}
_MOST_EVENTS = 10_000  # that a policy is tuned by


def fit(
    name: Annotated[
        str, typer.Argument(help="What learns: weighted, learned, expert_map, eamc...")
    ],
    traces: Annotated[list[Path], typer.Argument(help="Traces of one model.")],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Default: where a run of that model looks for it."),
    ] = None,
    capacity: Annotated[
        str, typer.Option(help="Share of all experts that a policy is tuned for.")
    ] = "25%",
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Seed of the training.")] = 0,
    json: common.Json = False,
) -> None:
    """Fit NAME to traces (see ``trace``) and save what it learned for runs of that model."""
    member = _member(name)
    if output is not None:
        common.require_suffix("--output", output, ".safetensors")
    share = common.parse_share("--capacity", capacity)
    from moe_infinity.tracing.join import concatenate
    from moe_infinity.tracing.trace_file import load_trace

    trace = concatenate([load_trace(path) for path in traces])
    if output is None and trace.fingerprint is None:
        raise ConfigError(
            f"--output: {trace.name} does not say which checkpoint it was recorded from, so no "
            f"run would find what is learned; say where to save it with -o"
        )
    path = output or learned_path(str(trace.fingerprint), name)
    if issubclass(member, CachePolicy):
        trace = _excerpt(trace)
    try:
        measures = _fit(name, member, trace, path, share, seed)
    except OSError as error:
        raise ConfigError(
            f"{path}: got {error.strerror or error}, expected to write what is learned there; say "
            f"where else with -o"
        ) from error
    if json:
        common.print_json({"name": name, "path": str(path), "measures": measures})
        return
    print(f"{name} fitted to {trace.num_tokens} tokens: {path}")
    for measure, value in measures.items():
        print(f"  {measure:<20} {value:>12.4g}")


def _fit(
    name: str,
    member: type[CachePolicy] | type[ExpertPredictor],
    trace: Trace,
    path: Path,
    share: float,
    seed: int,
) -> dict[str, float]:
    from moe_infinity.simulator.replay import lacks, replay, slots_of
    from moe_infinity.training.watching import watch

    nothing = find_predictor("none")
    if issubclass(member, ExpertPredictor):
        _require(trace, name, lacks(trace, find_policy("lru"), member))
        if name in TRAINERS:
            return TRAINERS[name](trace, path, seed)
        return watch(member(trace.shape, seed), trace, path)
    _require(trace, name, lacks(trace, member, nothing))
    slots = slots_of(trace.shape, share)

    def misses_of(policy: CachePolicy) -> int:
        counters = replay(trace, policy, nothing(trace.shape), slots).counters
        return counters.misses + counters.late

    return member.fit(trace.shape, sum(slots), misses_of, path, trace.fingerprint or "")


def _excerpt(trace: Trace) -> Trace:
    """Its first decode tokens: a policy's fit replays them dozens of times, a second each."""
    decode = trace.select(trace.phase != PHASES.index("prefill"))
    most = max(1, _MOST_EVENTS // trace.shape.num_layers)
    return decode.select(np.arange(decode.num_tokens) < most)


def _member(name: str) -> type[CachePolicy] | type[ExpertPredictor]:
    """The policy or predictor of that name that learns. Raises ConfigError."""
    if ":" in name:
        try:
            own: type[CachePolicy] | type[ExpertPredictor] = find_policy(name)
        except UnknownNameError:
            raise
        except ConfigError:  # it is there, but no policy
            own = find_predictor(name)
        known = {name: own} if _learns(name, own) else {}
    else:
        known = learners()
        if name not in (*policy_names(), *predictor_names()):
            raise UnknownNameError("policy or predictor that learns", name, known)
    if name not in known:
        raise ConfigError(f"{name} has nothing to fit; these learn: {', '.join(learners())}")
    return known[name]


def learners() -> dict[str, type[CachePolicy] | type[ExpertPredictor]]:
    """Everything that can be fitted, by name."""
    members: dict[str, type[CachePolicy] | type[ExpertPredictor]] = {}
    for name in predictor_names():
        if _learns(name, find_predictor(name)):
            members[name] = find_predictor(name)
    for name in policy_names():
        if _learns(name, find_policy(name)):
            members[name] = find_policy(name)
    return dict(sorted(members.items()))


def _learns(name: str, member: type[CachePolicy] | type[ExpertPredictor]) -> bool:
    if issubclass(member, ExpertPredictor):
        return name in TRAINERS or member.save is not ExpertPredictor.save
    return next(c for c in member.__mro__ if "fit" in vars(c)) is not CachePolicy


def _require(trace: Trace, name: str, missing: str | None) -> None:
    if missing is None:
        return
    option = next(o for what, o in _RECORDED_BY.items() if missing.startswith(what))
    raise ConfigError(
        f"{trace.name} holds no {missing}, which {name} learns from; record the trace with "
        f"moe-infinity trace {option}"
    )
