"""Counters that are fed while running, and the report that is made of them. Knows no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace

from moe_infinity.types import Phase


@dataclass(slots=True)
class PhaseCounters:
    """What one phase (prefill or decode) of one request did. Bytes and seconds."""

    hits: int = 0  # experts resident when their event looked them up
    late: int = 0  # in flight then: joined, but not a hit
    misses: int = 0
    demand_loads: int = 0
    proactive_loads: int = 0  # loads begun before their event, right or wrong
    wasted_loads: int = 0  # proactive loads that were disproved or evicted unused
    demand_bytes: int = 0
    prefetch_bytes: int = 0
    wasted_prefetch_bytes: int = 0
    ram_hits: int = 0  # with a device: loads whose expert RAM held
    disk_loads: int = 0  # with a device: loads into RAM
    disk_bytes: int = 0
    demoted_bytes: int = 0  # copied back from the device to RAM
    on_cpu: int = 0  # misses that the processor computed where they lay
    directed_passes: int = 0  # that the device directed by itself
    stall_s: float = 0.0  # time the compute waited for loads
    read_busy_s: float = 0.0  # time in which reads were under way, until they were seen to be over
    read_bytes: int = 0  # bytes that arrived in it
    # What experts took to compute; of those, too, that other threads compute while the caller does
    # something else.
    compute_s: float = 0.0
    computed_bytes: int = 0  # expert weights read from memory to compute, dense weights aside
    wall_s: float = 0.0
    num_tokens: int = 0
    num_passes: int = 0

    def add(self, other: PhaseCounters) -> None:
        for item in fields(self):
            setattr(self, item.name, getattr(self, item.name) + getattr(other, item.name))


@dataclass(slots=True)
class Counters:
    """The running request's counters; the phase is set at the start of every pass.

    expert_bytes: bytes one load of an expert moves, by MoE layer.
    """

    expert_bytes: Sequence[int]
    prefill: PhaseCounters = field(default_factory=PhaseCounters)
    decode: PhaseCounters = field(default_factory=PhaseCounters)
    phase: Phase = "decode"

    @property
    def now(self) -> PhaseCounters:
        return self.prefill if self.phase == "prefill" else self.decode

    def look_up(self, num_hits: int, num_late: int, num_misses: int) -> None:
        self.now.hits += num_hits
        self.now.late += num_late
        self.now.misses += num_misses

    def load(self, layer: int, proactive: bool) -> None:
        if proactive:
            self.now.proactive_loads += 1
            self.now.prefetch_bytes += self.expert_bytes[layer]
        else:
            self.now.demand_loads += 1
            self.now.demand_bytes += self.expert_bytes[layer]

    def read(self, layer: int) -> None:
        """An expert that a device asks for is read from the disk into RAM."""
        self.now.disk_loads += 1
        self.now.disk_bytes += self.expert_bytes[layer]

    def demote(self, layer: int) -> None:
        """An expert that a device lets go is copied back to RAM."""
        self.now.demoted_bytes += self.expert_bytes[layer]

    def waste(self, layer: int) -> None:
        self.now.wasted_loads += 1
        self.now.wasted_prefetch_bytes += self.expert_bytes[layer]

    def take(self) -> Counters:
        """A copy of the counters so far; these start again from zero."""
        taken = replace(self)
        self.prefill, self.decode = PhaseCounters(), PhaseCounters()
        return taken


@dataclass(frozen=True, slots=True)
class PhaseStats:
    """One phase of a request. Counts are experts per event, bytes are as moved from disk.

    hit_rate: hits over hits, late and misses; None if nothing was looked up. limit_fraction: the
    time our own missed and computed bytes need at measured bandwidths, perfectly overlapped, over
    the time taken. read_gbps: what the disk delivered while reads were under way, 1e9 bytes/s
    at least: what the kernel reads by itself is seen to be over when the computation next looks.
    belady_fraction: the same with the bytes that the offline optimum would have
    missed on this routing. None where nothing was measured.

    With a device all of these are about its memory: demand and prefetch bytes were copied from RAM.
    Beneath, ram_hits of those loads were found there, and disk_loads read first; demoted_bytes were
    copied back. on_cpu: misses that were not copied, for the processor computed them.
    directed_passes: forward passes whose routing, victims and copies the device decided by itself.
    """

    hits: int
    misses: int
    late: int
    hit_rate: float | None
    demand_bytes: int
    prefetch_bytes: int
    wasted_prefetch_bytes: int
    stall_s: float
    read_gbps: float | None
    ram_hits: int
    disk_loads: int
    disk_bytes: int
    demoted_bytes: int
    on_cpu: int
    directed_passes: int
    compute_s: float
    wall_s: float
    num_tokens: int
    tokens_per_s: float | None
    limit_fraction: float | None = None
    belady_fraction: float | None = None


@dataclass(frozen=True, slots=True)
class Stats:
    """The report of the last request, or of all since opening. Sizes in bytes, times in seconds.

    The counts at the top are the sums of both phases. ttft_s: from the call to the first new
    token. tpot_s and tokens_per_s: decode only. peak_rss_bytes: the process's largest resident
    memory since it started. bytes_written: by this process to its state file. slots: capacity in
    experts. bit_exact: nothing that was chosen can change the logits; lossy names what does.
    faults: a policy or predictor that failed, and what took its place. policy and prefetch: the
    names of those that were chosen. device: a GPU's name, or several with + in between; "" where
    the CPU computes from RAM. With a GPU slots are those of all, and ram_slots those beneath.
    """

    prefill: PhaseStats
    decode: PhaseStats
    hits: int
    misses: int
    late: int
    hit_rate: float | None
    demand_bytes: int
    prefetch_bytes: int
    wasted_prefetch_bytes: int
    stall_s: float
    compute_s: float
    ttft_s: float | None
    tpot_s: float | None
    tokens_per_s: float | None
    peak_rss_bytes: int
    bytes_written: int
    slots: int
    experts_total: int
    limit_fraction: float | None
    belady_fraction: float | None
    bit_exact: bool = True
    lossy: tuple[str, ...] = ()
    faults: tuple[str, ...] = ()
    policy: str = ""
    prefetch: str = ""
    device: str = ""
    ram_slots: int = 0


def hit_rate(counters: PhaseCounters) -> float | None:
    looked_up = counters.hits + counters.late + counters.misses
    return counters.hits / looked_up if looked_up else None


def phase_stats(
    counters: PhaseCounters, limit_fraction: float | None, belady_fraction: float | None
) -> PhaseStats:
    """The report of one phase's counters."""
    rate = counters.num_tokens / counters.wall_s if counters.wall_s > 0 else None
    return PhaseStats(
        hits=counters.hits,
        misses=counters.misses,
        late=counters.late,
        hit_rate=hit_rate(counters),
        demand_bytes=counters.demand_bytes,
        prefetch_bytes=counters.prefetch_bytes,
        wasted_prefetch_bytes=counters.wasted_prefetch_bytes,
        stall_s=counters.stall_s,
        read_gbps=_gbps(counters.read_bytes, counters.read_busy_s),
        ram_hits=counters.ram_hits,
        disk_loads=counters.disk_loads,
        disk_bytes=counters.disk_bytes,
        demoted_bytes=counters.demoted_bytes,
        on_cpu=counters.on_cpu,
        directed_passes=counters.directed_passes,
        compute_s=counters.compute_s,
        wall_s=counters.wall_s,
        num_tokens=counters.num_tokens,
        tokens_per_s=rate,
        limit_fraction=limit_fraction,
        belady_fraction=belady_fraction,
    )


def _gbps(num_bytes: int, seconds: float) -> float | None:
    return num_bytes / seconds / 1e9 if seconds > 0 else None
