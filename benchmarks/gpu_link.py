"""How long does decode wait for the link, with experts in a GPU's memory in front of RAM?

A simulation: recorded routing replayed through the very objects of the live cache, on a clock whose
times follow from shapes, formats and datasheets (link_costs.py). RAM holds every expert.
"""

from __future__ import annotations

import argparse
import pickle
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
from limits import provenance, save
from link_carrier import CpuSide, WatchedCarrier
from link_costs import (
    FIXED_S,
    GPT_OSS_20B,
    GPT_OSS_120B,
    QWEN3_30B,
    Machine,
    Model,
    Setting,
    assumptions,
    gap_closed,
    limits,
    way_out_s,
)

CAPACITIES = (0.12, 0.25, 0.5, 0.75)
DEFAULT = "default"
SYSTEMS = {  # policy, predictor
    "lru": ("lru", "none"),
    "lfru": ("lfru", "none"),
    "next_use": ("next_use", "none"),
    DEFAULT: ("next_use", "auto"),
    "next_use + gate_lookahead": ("next_use", "gate_lookahead"),
    "forecast + oracle": ("forecast", "oracle"),
}
ON_DEMAND = ("lru", "lfru", "next_use")
PUBLIC = {"qwen3_30b_a3b": QWEN3_30B, "gpt_oss_120b": GPT_OSS_120B}
_TRIAL_PASSES = 8  # as assembly.py has it
_VERSION = 1


@dataclass(frozen=True)
class Source:
    """A trace replayed as if it were ``model``'s. taught: predictors that watched its history."""

    trace: Any
    model: Model
    taught: dict[str, bytes]
    systems: tuple[str, ...]

    @property
    def setting(self) -> Setting:
        shape = self.trace.shape
        return Setting(self.model, Machine(), shape.num_layers, shape.top_k)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--traces", type=Path, help="a folder of public traces, .npz")
    parser.add_argument("--split", type=Path, help="a trace of many requests, with foresight")
    parser.add_argument("--sampled", nargs="*", type=Path, default=[], help="others like it")
    parser.add_argument("--history", type=int, default=150, help="requests that predictors watch")
    parser.add_argument("--test", type=int, default=30, help="requests that are replayed")
    args = parser.parse_args()
    sources = public(args.traces) if args.traces else []
    if args.split:
        sources += bundled(args.split, args.history, args.test)
    for path in args.sampled:
        sources.append(sampled(path, args.history, args.test))
    points = []
    for source in sources:
        for capacity in CAPACITIES:
            points.append(measure(source, capacity))
            show(points[-1])
    models = {source.model.name: source.model for source in sources}
    result = {
        "version": _VERSION,
        **provenance(),
        "assumptions": assumptions(Machine(), list(models.values())),
        "history_requests": args.history,
        "test_requests": args.test,
        "points": points,
    }
    print(save("gpu_link", result))


def public(folder: Path) -> list[Source]:
    """Real models' traces, one request each, without foresight: the default loads on demand."""
    from moe_infinity.tracing.trace_file import load_trace

    systems = tuple(name for name in SYSTEMS if name != "next_use + gate_lookahead")
    return [
        Source(load_trace(folder / f"{name}.npz").of_phase("decode"), model, {}, systems)
        for name, model in PUBLIC.items()
    ]


def bundled(path: Path, history: int, test: int) -> list[Source]:
    """The bundled model's routing, its experts as large as those of two real models."""
    from moe_infinity.predictors import AUTO_PREFETCH, find_predictor
    from moe_infinity.simulator.replay import teach

    early, late = halves(path, history, test)
    predictor = find_predictor(AUTO_PREFETCH)(late.shape, 0)
    teach(predictor, early)
    taught = {AUTO_PREFETCH: pickle.dumps(predictor)}
    return [Source(late, model, taught, tuple(SYSTEMS)) for model in (GPT_OSS_20B, QWEN3_30B)]


def sampled(path: Path, history: int, test: int) -> Source:
    _, late = halves(path, history, test)
    return Source(late, GPT_OSS_20B, {}, ON_DEMAND)


def halves(path: Path, history: int, test: int) -> tuple[Any, Any]:
    """Requests to watch, and decode of those to replay."""
    from moe_infinity.tracing.trace_file import load_trace

    early, rest = load_trace(path).split(history)
    return early, rest.split(test)[0].of_phase("decode")


def measure(source: Source, capacity: float) -> dict[str, Any]:
    """Every system at one capacity, beside what none can do without. Figures are per token."""
    from moe_infinity.simulator.replay import slots_of

    trace, setting = source.trace, source.setting
    slots = slots_of(trace.shape, capacity)
    rows, carriers = {}, {}
    for name in source.systems:
        rows[name], carriers[name] = replayed(source, name, slots)
    compute_s = carriers["lru"].now_s - carriers["lru"].stall_s
    bounds = bounds_of(source, slots[0], compute_s)
    lru_us = rows["lru"]["stall_us"]
    for row in rows.values():
        row["stall_vs_lru"] = row["stall_us"] / lru_us if lru_us else None
        row["gap_closed"] = gap_closed(lru_us, row["stall_us"], bounds["limit_us"])
    return {
        "trace": trace.name,
        "model": source.model.name,
        "top_k": trace.shape.top_k,
        "layers": trace.shape.num_layers,
        "tokens": trace.num_tokens,
        "capacity": capacity,
        "slots": slots[0],
        "load_us": setting.load_s * 1e6,
        "layer_us": setting.layer_s * 1e6,
        "compute_us": compute_s / trace.num_tokens * 1e6,
        **bounds,
        "rows": rows,
        "ways": ways(source, carriers["next_use"].misses, slots),
    }


def bounds_of(source: Source, num_slots: int, compute_s: float) -> dict[str, float]:
    """Per token: misses of the offline optimum and of a cache that never evicts; and the waiting
    that follows."""
    from moe_infinity.simulator.belady import accesses_of, optimal_misses

    trace = source.trace
    events = accesses_of(trace)
    optimum = sum(optimal_misses(events, num_slots, trace.shape.num_experts))
    first_uses = len({(layer, int(e)) for layer, experts in events for e in experts})
    bounds = limits(optimum, source.setting.load_s, compute_s)
    return {
        "optimal_misses": optimum / trace.num_tokens,
        "first_uses": first_uses / trace.num_tokens,
        "limit_us": bounds["limit_s"] / trace.num_tokens * 1e6,
        "no_overlap_us": bounds["no_overlap_s"] / trace.num_tokens * 1e6,
    }


def replayed(
    source: Source, system: str, slots: tuple[int, ...], mode: str = "copy", fixed_s: float = 0.0
) -> tuple[dict[str, Any], WatchedCarrier]:
    """One system's figures. mode: the way out of a miss; fixed_s: of a step on the processor."""
    from moe_infinity.policies import find_policy
    from moe_infinity.residency.meters import PaysMeter
    from moe_infinity.simulator.replay import replay

    trace, setting = source.trace, source.setting
    policy = find_policy(SYSTEMS[system][0])(trace.shape, sum(slots), 0)
    predictor, tries = chosen_predictor(source, SYSTEMS[system][1], sum(slots))
    carrier = WatchedCarrier(setting.cost(), setting.top_k)
    if tries:
        carrier.pays = PaysMeter(_TRIAL_PASSES * setting.num_layers)
    if mode != "copy":
        expert_bytes = setting.model.expert_bytes
        carrier.cpu = CpuSide(setting.split(mode), policy, expert_bytes, setting.cpu_s, fixed_s)
    rule = carrier.choose_misses if carrier.cpu else None
    counters = replay(trace, policy, predictor, slots, None, carrier, rule).counters
    row = {"predictor": type(predictor).__module__.rpartition(".")[2]}
    return row | figures(source, counters, carrier), carrier


def figures(source: Source, counters: Any, carrier: WatchedCarrier) -> dict[str, float]:
    """A load ahead counts whole, even one that was cancelled on its way."""
    num_tokens = source.trace.num_tokens
    loaded_bytes = source.model.expert_bytes / num_tokens
    return {
        "hit_rate": counters.hits / (counters.hits + counters.late + counters.misses),
        "misses": counters.misses / num_tokens,
        "late": counters.late / num_tokens,
        "demand_bytes": counters.demand_loads * loaded_bytes,
        "prefetched_bytes": counters.proactive_loads * loaded_bytes,
        "wasted_bytes": counters.wasted_loads * loaded_bytes,
        "stall_us": carrier.stall_s / num_tokens * 1e6,
        "step_us": carrier.now_s / num_tokens * 1e6,
        "tokens_per_s": num_tokens / carrier.now_s,
    }


def chosen_predictor(source: Source, name: str, num_slots: int) -> tuple[Any, bool]:
    """As the engine chooses, and whether it is to find out if it pays."""
    from moe_infinity.predictors import AUTO_PREFETCH, find_predictor
    from moe_infinity.residency.room import FEWEST_SLOTS

    tries = name == "auto"
    if tries:
        can = AUTO_PREFETCH in source.taught and num_slots >= FEWEST_SLOTS
        name = AUTO_PREFETCH if can else "none"
    if name in source.taught:
        return pickle.loads(source.taught[name]), tries
    return find_predictor(name)(source.trace.shape, 0), False


def ways(source: Source, misses: list[int], slots: tuple[int, ...]) -> list[dict[str, Any]]:
    """Ways out of a miss: of next_use's misses on demand, and replayed, where what the processor
    computes is copied behind the event; that not where slots stay free for most of the trace."""
    setting, num_tokens = source.setting, source.trace.num_tokens
    found = []
    for mode, fixed_s in (("copy", 0.0), *((m, f) for m in ("cpu", "auto") for f in FIXED_S)):
        spent_s = way_out_s(setting, misses, mode, fixed_s)
        row, carrier = replayed(source, "next_use", slots, mode, fixed_s)
        on_cpu = carrier.cpu.num_computed / num_tokens if carrier.cpu else 0.0
        way = {"mode": mode, "fixed_s": fixed_s, "same_misses_us": spent_s / num_tokens * 1e6}
        if carrier.num_full > len(misses) / 2:
            way["replayed_us"] = row["step_us"] - setting.num_layers * setting.layer_s * 1e6
            way |= {"replayed_misses": row["misses"], "on_cpu": on_cpu}
        found.append(way)
    return found


def show(point: dict[str, Any]) -> None:
    p = point
    print(f"\n{p['trace']} as {p['model']}, {p['capacity']:.0%}, {p['slots']} slots")
    print(f"  load {p['load_us']:.0f} us, layer {p['layer_us']:.0f}, token {p['compute_us']:.0f}")
    print(
        f"  optimum {p['optimal_misses']:.1f} misses (first uses {p['first_uses']:.1f}), limit "
        f"{p['limit_us']:.0f} us, without overlap {p['no_overlap_us']:.0f} us"
    )
    for name, r in point["rows"].items():
        closed = "-" if r["gap_closed"] is None else f"{r['gap_closed']:.0%}"
        print(
            f"  {name:26} miss {r['misses']:6.1f} late {r['late']:5.1f} MB demand "
            f"{r['demand_bytes'] / 1e6:7.1f} ahead {r['prefetched_bytes'] / 1e6:6.1f} wasted "
            f"{r['wasted_bytes'] / 1e6:6.1f} stall {r['stall_us']:8.0f} us step "
            f"{r['step_us']:8.0f} us {r['tokens_per_s']:6.1f}/s gap {closed}",
            flush=True,
        )
    for w in point["ways"]:
        again = ""
        if "replayed_us" in w:
            again = f", replayed {w['replayed_us']:8.0f} us, {w['replayed_misses']:.1f} misses"
            again += f", {w['on_cpu']:.1f} of them on the CPU"
        name = f"{w['mode']:5} {w['fixed_s'] * 1e6:4.0f} us"
        print(f"    {name} same misses {w['same_misses_us']:8.0f} us{again}", flush=True)


if __name__ == "__main__":
    main()
