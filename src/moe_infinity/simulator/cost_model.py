"""The simulator's clock: one link that loads, one processor that computes, side by side.

Times, not bytes: what matters is how long a load takes beside a layer's computation.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, field

from moe_infinity.residency.meters import StallMeter
from moe_infinity.residency.runner import Carrier, Settled
from moe_infinity.residency.running import Load
from moe_infinity.types import ExpertKey, Phase, Priority


@dataclass(frozen=True)
class Cost:
    """load_s: one expert over the link. layer_s: one layer computed for one token, of which
    dense_share goes before the router speaks and the rest to the top-k experts. latency_s: from a
    load's begin to its first byte. num_chunks: a demand load waits for one of a prefetch at most.
    """

    load_s: float = 0.0
    layer_s: float = 0.0
    dense_share: float = 0.5
    latency_s: float = 0.0
    num_chunks: int = 4

    def dense_s(self) -> float:
        return self.layer_s * self.dense_share

    def expert_s(self, top_k: int) -> float:
        return self.layer_s * (1 - self.dense_share) / top_k


@dataclass
class _Job:
    key: ExpertKey
    priority: Priority
    begun_s: float
    chunks_left: int
    wanted: bool = True


@dataclass
class SimulatedCarrier(Carrier):
    """Serves loads chunk by chunk, demand first, in the order of their begin."""

    cost: Cost
    top_k: int
    now_s: float = 0.0
    stall_s: float = 0.0
    _queues: dict[Priority, deque[_Job]] = field(
        default_factory=lambda: {priority: deque() for priority in Priority}
    )
    _jobs: dict[ExpertKey, _Job] = field(default_factory=dict)
    _reading: _Job | None = None
    _chunk_ends_s: float = math.inf
    _settled: list[Settled] = field(default_factory=list)
    _stalls: StallMeter = field(default_factory=StallMeter)
    _counted: tuple[float, float] = (0.0, 0.0)  # stall_s and now_s when it was last told

    def end_event(self, phase: Phase) -> None:
        """An event is over: what it waited tells whether looking ahead is worth it. Prompts
        stream whatever the cache holds: only decode counts."""
        stall_s, now_s = self._counted
        if phase == "decode":
            self._stalls.spend(self.stall_s - stall_s, self.now_s - now_s)
        self._counted = (self.stall_s, self.now_s)

    def looks_ahead(self) -> bool:
        return self._stalls.is_worth_it

    def spend(self, seconds: float) -> None:
        """Time passes on the processor; the link works meanwhile."""
        self._advance(self.now_s + seconds)

    def start(self, loads: list[Load], priority: Priority) -> None:
        for load in loads:
            job = _Job(load.key, priority, self.now_s, self.cost.num_chunks)
            self._jobs[load.key] = job
            self._queues[priority].append(job)
        self._pick()

    def cancel(self, key: ExpertKey) -> None:
        job = self._jobs[key]
        job.wanted = False
        if job is not self._reading:
            self._queues[job.priority].remove(job)
            self._settle(job, arrived=False)

    def promote(self, key: ExpertKey) -> None:
        job = self._jobs.get(key)
        if job is None or job.priority is Priority.DEMAND:
            return
        if job is not self._reading:
            self._queues[job.priority].remove(job)
            self._queues[Priority.DEMAND].append(job)
        job.priority = Priority.DEMAND

    def collect(self) -> list[Settled]:
        settled, self._settled = self._settled, []
        return settled

    def wait(self) -> None:
        start_s = self.now_s
        while not self._settled:
            assert self._reading is not None, "waiting for a load that nobody began"
            self._advance(self._chunk_ends_s)
        self.stall_s += self.now_s - start_s

    def compute(self, keys: list[ExpertKey]) -> None:
        self.spend(self.cost.expert_s(self.top_k) * len(keys))

    def _advance(self, to_s: float) -> None:
        while self._chunk_ends_s <= to_s:
            self.now_s = max(self.now_s, self._chunk_ends_s)
            self._end_chunk()
        self.now_s = max(self.now_s, to_s)

    def _end_chunk(self) -> None:
        job = self._reading
        assert job is not None
        self._reading, self._chunk_ends_s = None, math.inf
        job.chunks_left -= 1
        if not job.wanted:
            self._settle(job, arrived=False)
        elif job.chunks_left == 0:
            self._settle(job, arrived=True)
        else:
            self._queues[job.priority].appendleft(job)
        self._pick()

    def _pick(self) -> None:
        """The next chunk goes on the link, if that is free; without cost it is there at once."""
        while self._reading is None:
            queue = self._queues[Priority.DEMAND] or self._queues[Priority.PREFETCH]
            if not queue:
                return
            job = queue.popleft()
            chunk_s = self.cost.load_s / self.cost.num_chunks
            first_byte_s = max(self.now_s, job.begun_s + self.cost.latency_s)
            self._reading, self._chunk_ends_s = job, first_byte_s + chunk_s
            if self._chunk_ends_s <= self.now_s:
                self._end_chunk()

    def _settle(self, job: _Job, arrived: bool) -> None:
        del self._jobs[job.key]
        self._settled.append(Settled(job.key, arrived))
