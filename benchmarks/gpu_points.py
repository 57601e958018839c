"""One point of benchmarks/gpu.py: a model opened at a budget, run by host and by device, counted.

It knows nothing of which points there are, nor of time limits.
"""

from __future__ import annotations

import dataclasses
import gc
import itertools
import shutil
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import LogitsProcessorList

import gpu_profile
from gpu_texts import Clock, Forced, Text
from moe_infinity import MoE, assembly
from moe_infinity.cache.pinned import PinnedArena
from moe_infinity.config import state_dir
from moe_infinity.residency.meters import QuickerMeter

NEVER = 10**9  # passes
WAYS = ("host", "device")
_UNSETTLED = 3  # passes of a request: launched singly, recorded, first of the recording


@dataclass(frozen=True, kw_only=True)
class Point:
    """What to open, and what to ask of it. contexts: the first is measured A B A B."""

    model: str
    options: dict[str, Any]  # of MoE: budget, policy, prefetch, miss
    contexts: tuple[int, ...] = (100,)
    ways: tuple[str, ...] = WAYS
    has_profile: bool = False
    may_choose: bool = False  # also let the library choose who directs

    @property
    def name(self) -> str:
        shown = [str(v) if k == "vram" else f"{k}={v}" for k, v in self.options.items()]
        return " ".join([self.model, *shown])


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What all points share."""

    device: str
    kernel: str
    ram: str
    new_tokens: int
    trials: int


class KeptArena(PinnedArena):
    """Stays when a model is closed, for the next one that needs as much: to pin tens of gigabytes
    takes longer than a point."""

    kept: KeptArena | None = None
    sizes: tuple[Any, ...] = ()

    def __new__(cls, *sizes: Any) -> KeptArena:
        if cls.kept is not None and cls.kept.sizes != sizes[:2]:
            cls.let_go()
        if cls.kept is None:
            cls.kept = super().__new__(cls)
        return cls.kept

    def __init__(self, *sizes: Any) -> None:
        if self.sizes:
            return
        super().__init__(*sizes)
        self.sizes, self._walks = sizes[:2], False

    def touch_ahead(self) -> None:
        if not self._walks:
            self._walks = True
            super().touch_ahead()

    def close(self) -> None:
        """Later, by ``let_go``."""

    @classmethod
    def let_go(cls) -> None:
        if cls.kept is not None:
            super(KeptArena, cls.kept).close()
        cls.kept = None


def measure(point: Point, path: Path, setting: Setting) -> dict[str, Any]:
    """Open, warm up, measure, close."""
    result: dict[str, Any] = {"name": point.name, **dataclasses.asdict(point)}
    began = time.perf_counter()
    with opened(path, setting, point.options, max(point.contexts) + 512) as moe:
        result["opening_s"] = time.perf_counter() - began
        whole_in_ram(moe)
        result["filling_s"] = time.perf_counter() - began - result["opening_s"]
        result |= facts(moe)
        text = Text(path)
        result["runs"] = _runs(moe, text, point, setting)
        if point.may_choose:
            result["chosen"] = _chosen(moe, text, point, setting)
        if point.has_profile:
            ask = lambda clock: run(moe, text, point.contexts[0], 12, 7, clock)  # noqa: E731
            result["profiles"] = {
                way: gpu_profile.profile(ask) for way in point.ways if force(moe, way)
            }
        result["faults"] = list(moe.stats().faults)
        moe.check_integrity()
    result["vram_peak_bytes"] = vram_peak_bytes()
    return result


def opened(path: Path, setting: Setting, options: dict[str, Any], context: int) -> MoE:
    """With nothing learned earlier, over RAM that stays pinned."""
    shutil.rmtree(state_dir() / "learned", ignore_errors=True)
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    assembly.PinnedArena = KeptArena  # type: ignore[misc]
    given = {"device": setting.device, "kernel": setting.kernel, "ram": setting.ram}
    given |= {"max_context": context, "prefetch": "none"}
    return MoE(path, **{**given, **options})


def whole_in_ram(moe: MoE) -> None:
    """Let the tier beneath read what nobody asked for, as it does between passes."""
    host: Any = moe._hierarchy.host  # type: ignore[attr-defined]
    counters = moe._hierarchy.counters
    while host._to_fill or host.is_reading:
        host.fill(counters)
        if host.is_reading:
            host.wait()
        host.collect(counters)


def force(moe: MoE, way: str) -> bool:
    """Let the host or the device direct decode from now on, or the library choose."""
    assert moe._wiring._device is not None
    window = {} if way == "choose" else {"window": NEVER, "is_on": way == "device"}
    moe._wiring._device.meter = QuickerMeter(**window)
    return True


def facts(moe: MoE) -> dict[str, Any]:
    plan = moe.plan
    device: Any = plan.device
    return {
        "kernel": moe.kernel.name,
        "experts_total": plan.experts_total,
        "expert_bytes_total": plan.expert_bytes_total,
        "ram_slots": plan.num_slots,
        "vram_slots": device.num_slots,
        "share_in_vram": device.num_slots / plan.experts_total,
        "vram_budget_bytes": device.budget_bytes,
        "vram_planned_bytes": device.used_bytes,
        "vram_dense_bytes": device.dense_bytes,
    }


def vram_peak_bytes() -> int | None:
    """What torch had taken at most; the driver's own comes on top."""
    return torch.cuda.max_memory_reserved() if torch.cuda.is_available() else None


def run(
    moe: MoE, text: Text, context: int, new_tokens: int, number: int, clock: Clock
) -> dict[str, Any]:
    """One request; what it did."""
    ids = text.ids(context + new_tokens, number)
    forced = Forced(context, ids[context:])
    options: dict[str, Any] = {"min_new_tokens": new_tokens}
    if not text.is_real:  # what is forced may be the token that ends a text
        options = {"eos_token_id": None, "logits_processor": LogitsProcessorList([forced])}
    moe.generate(
        [ids[:context]],
        max_new_tokens=new_tokens,
        do_sample=False,
        streamer=clock,
        **options,
    )
    return figures(moe, clock.stamps)


def figures(moe: MoE, stamps: Sequence[float]) -> dict[str, Any]:
    """Of the last request. tpot_s: the median of the passes after the recording of a graph."""
    stats = moe.stats()
    decode, counters = stats.decode, moe._wiring.request.counters
    assert counters is not None and moe.device is not None
    steady = [b - a for a, b in itertools.pairwise(stamps[1:])][_UNSETTLED:]
    tpot_s = statistics.median(steady) if steady else stats.tpot_s or 0.0
    passes = max(1, decode.num_tokens)
    link_bytes = (decode.demand_bytes + decode.prefetch_bytes) / passes
    read_bytes = counters.decode.computed_bytes / passes + moe.plan.dense_read_bytes
    link_s = link_bytes / (moe.device.link_gbps() * 1e9)
    memory_gbps = moe.device.memory_gbps()
    memory_s = read_bytes / (memory_gbps * 1e9) if memory_gbps else 0.0
    return {
        "ttft_s": stats.ttft_s,
        "tokens_per_s": stats.tokens_per_s,
        "tpot_s": tpot_s,
        "steady_tokens_per_s": 1 / tpot_s,
        "hit_rate": decode.hit_rate,
        "misses": decode.misses,
        "link_bytes_per_token": link_bytes,
        "wasted_bytes_per_token": decode.wasted_prefetch_bytes / passes,
        "memory_bytes_per_token": read_bytes,
        "link_gbps": link_bytes / tpot_s / 1e9,
        "of_limit": max(link_s, memory_s) / tpot_s,
        "stall_s": decode.stall_s,
        "on_cpu": decode.on_cpu,
        "directed_passes": decode.directed_passes,
        "num_tokens": decode.num_tokens,
        "prefill_link_bytes": stats.prefill.demand_bytes + stats.prefill.prefetch_bytes,
    }


def _runs(moe: MoE, text: Text, point: Point, setting: Setting) -> list[dict[str, Any]]:
    """By context and way: medians over trials, ways taking turns. Only the first context has
    several trials; each is warmed up once by every way."""
    rows = []
    for context in point.contexts:
        trials = setting.trials if context == point.contexts[0] else 1
        found: dict[str, list[dict[str, Any]]] = {way: [] for way in point.ways}
        for number in range(1 + trials):
            for place, way in enumerate(point.ways):
                force(moe, way)
                new_tokens = setting.new_tokens if number else _UNSETTLED + 3
                seed = 1 + number * len(point.ways) + place
                row = run(moe, text, context, new_tokens, seed, Clock())
                found[way] += [row] if number else []
        rows += [{"context": context, "way": w, **_median(each)} for w, each in found.items()]
    return rows


def _chosen(moe: MoE, text: Text, point: Point, setting: Setting) -> dict[str, Any]:
    """What the library settles for by itself, and on what grounds."""
    force(moe, "choose")
    assert moe._wiring._device is not None
    meter = moe._wiring._device.meter
    new_tokens = max(setting.new_tokens, 2 * meter.window + 8)
    row = run(moe, text, point.contexts[0], new_tokens, 99, Clock())
    costs_s = {WAYS[is_on]: seconds for is_on, seconds in meter._costs_s.items()}
    return {"way": WAYS[meter.is_on], "costs_s": costs_s, **row}


def _median(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Of every number over the trials; and the trials' own speeds."""
    keys = [k for k, v in rows[0].items() if isinstance(v, int | float)]
    medians: dict[str, Any] = dict.fromkeys(rows[0])
    medians |= {k: statistics.median(row[k] for row in rows if row[k] is not None) for k in keys}
    medians["steady_tokens_per_s"] = 1 / medians["tpot_s"]
    return medians | {"speeds": [row["steady_tokens_per_s"] for row in rows]}
