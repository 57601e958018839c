"""Makes the report of a request out of counters, measured bandwidths and the recorded routing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from moe_infinity.machine import Bandwidths, peak_resident_bytes
from moe_infinity.simulator.belady import optimal_misses
from moe_infinity.stats import Counters, PhaseCounters, PhaseStats, Stats, hit_rate, phase_stats
from moe_infinity.tracing.recorder import Access
from moe_infinity.types import ExpertShape, Phase


@dataclass(frozen=True)
class DeviceSpeeds:
    """A device's name, how fast experts come to it, and how fast it reads its memory; of several
    what they do together."""

    name: str
    link_gbps: float
    memory_gbps: float | None  # None: it computes from the machine's


@dataclass(frozen=True)
class RunFacts:
    """What a report needs beside the counters."""

    shape: ExpertShape
    num_slots: int
    dense_bytes: int
    bytes_written: int
    lossy: tuple[str, ...]
    bandwidths: Bandwidths | None
    faults: tuple[str, ...] = ()
    choices: tuple[str, str] = ("", "")  # policy and predictor
    device: DeviceSpeeds | None = None
    ram_slots: int = 0


@dataclass(frozen=True)
class Routing:
    """The recorded routing of a request, and what was resident when it began."""

    accesses: Sequence[Access]
    initial: frozenset[int]  # flat keys


def build_stats(
    counters: Counters, facts: RunFacts, ttft_s: float | None, routing: Routing | None
) -> Stats:
    """The report. ``routing`` None (incomplete, or of many requests): no Belady fractions."""
    best = _optimal_bytes(counters, facts, routing) if routing else {}
    phases = _phases(counters, facts, best)
    total = PhaseCounters()
    total.add(counters.prefill)
    total.add(counters.decode)
    decode = phases["decode"]
    own = total.demand_bytes + total.prefetch_bytes
    optimal = min(sum(best.values()), own) if best else None
    return Stats(
        prefill=phases["prefill"],
        decode=decode,
        hits=total.hits,
        misses=total.misses,
        late=total.late,
        hit_rate=hit_rate(total),
        demand_bytes=total.demand_bytes,
        prefetch_bytes=total.prefetch_bytes,
        wasted_prefetch_bytes=total.wasted_prefetch_bytes,
        stall_s=total.stall_s,
        compute_s=total.compute_s,
        ttft_s=ttft_s,
        tpot_s=_per_pass_s(counters.decode),
        tokens_per_s=decode.tokens_per_s,
        peak_rss_bytes=peak_resident_bytes(),
        bytes_written=facts.bytes_written,
        slots=facts.num_slots,
        experts_total=facts.shape.num_total,
        limit_fraction=_limit_fraction(total, own, facts),
        belady_fraction=None if optimal is None else _limit_fraction(total, optimal, facts),
        bit_exact=not facts.lossy,
        lossy=facts.lossy,
        faults=facts.faults,
        policy=facts.choices[0],
        prefetch=facts.choices[1],
        device=facts.device.name if facts.device else "",
        ram_slots=facts.ram_slots,
    )


def _phases(counters: Counters, facts: RunFacts, best: dict[Phase, int]) -> dict[Phase, PhaseStats]:
    """best: bytes that the offline optimum would have missed, by phase; empty: not known."""
    phases: dict[Phase, PhaseStats] = {}
    each: tuple[tuple[Phase, PhaseCounters], ...]
    each = (("prefill", counters.prefill), ("decode", counters.decode))
    for name, phase in each:
        own = phase.demand_bytes + phase.prefetch_bytes
        limit = _limit_fraction(phase, own, facts)
        optimum = _limit_fraction(phase, min(best[name], own), facts) if name in best else None
        phases[name] = phase_stats(phase, limit, optimum)
    return phases


def _per_pass_s(decode: PhaseCounters) -> float | None:
    """Time per output token of one row: rows of a batch get theirs in the same pass."""
    timed = decode.num_passes and decode.wall_s > 0
    return decode.wall_s / decode.num_passes if timed else None


def _limit_fraction(phase: PhaseCounters, loaded_bytes: int, facts: RunFacts) -> float | None:
    """Time the bytes need at measured bandwidths, perfectly overlapped, over the time taken."""
    if facts.bandwidths is None or phase.wall_s <= 0:
        return None
    read_bytes = loaded_bytes if facts.device is None else phase.disk_bytes
    limit_s = [read_bytes / (facts.bandwidths.disk_gbps * 1e9)]
    memory_gbps = facts.bandwidths.memory_gbps
    if facts.device is not None:
        limit_s.append(loaded_bytes / (facts.device.link_gbps * 1e9))
        memory_gbps = facts.device.memory_gbps or memory_gbps
    computed = phase.computed_bytes + phase.num_passes * facts.dense_bytes
    limit_s.append(computed / (memory_gbps * 1e9))
    return min(1.0, max(limit_s) / phase.wall_s)


def _optimal_bytes(counters: Counters, facts: RunFacts, routing: Routing) -> dict[Phase, int]:
    events = [(access.layer, access.experts) for access in routing.accesses]
    misses = optimal_misses(events, facts.num_slots, facts.shape.num_experts, routing.initial)
    total: dict[Phase, int] = {"prefill": 0, "decode": 0}
    for access, count in zip(routing.accesses, misses, strict=True):
        total[access.phase] += count * counters.expert_bytes[access.layer]
    return total
