"""The simulator's clock with what a GPU tier adds: its meter, and misses left to the processor."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np

from moe_infinity.cache.vram import VramHierarchy
from moe_infinity.policies.base import CachePolicy
from moe_infinity.residency.meters import PaysMeter
from moe_infinity.residency.miss_split import MissSplit
from moe_infinity.residency.running import Load
from moe_infinity.simulator.cost_model import SimulatedCarrier
from moe_infinity.tracing.event import Event
from moe_infinity.types import ExpertKey, Phase, Priority


@dataclass
class CpuSide:
    """A processor beside the link. fixed_s: of a step, however few experts it computes."""

    split: MissSplit
    policy: CachePolicy
    expert_bytes: int
    cpu_s: float
    fixed_s: float
    num_computed: int = 0


@dataclass
class WatchedCarrier(SimulatedCarrier):
    """misses: of every event, those that were loaded or computed on demand."""

    tokens_at_once: ClassVar[int] = VramHierarchy.tokens_at_once
    pays: PaysMeter | None = None
    cpu: CpuSide | None = None
    misses: list[int] = field(default_factory=list)
    num_full: int = 0  # events that ended with every slot taken
    _missing: int = 0
    _is_full: bool = False  # a load had to make room
    _cpu_ends_s: float = 0.0

    def start(self, loads: list[Load], priority: Priority) -> None:
        self._is_full = self._is_full or any(load.victim is not None for load in loads)
        if priority is Priority.DEMAND:
            self._missing += len(loads)
        super().start(loads, priority)

    def choose_misses(self, event: Event, misses: list[ExpertKey]) -> list[ExpertKey]:
        """As cache/vram.py chooses, but for slots that are free still: these are filled first,
        as a prompt does before decode begins."""
        cpu = self.cpu
        count = cpu.split.choose(len(misses), cpu.expert_bytes) if cpu and self._is_full else 0
        if cpu is None or not count:
            return misses
        num_experts = cpu.policy.shape.num_experts
        flat = np.array([key.layer * num_experts + key.expert for key in misses])
        worst = set(cpu.policy.victims(flat, count, event.layer).tolist())
        self._cpu_ends_s = self.now_s + cpu.fixed_s + count * cpu.cpu_s
        cpu.split.learn(count, cpu.expert_bytes, cpu.fixed_s + count * cpu.cpu_s)
        cpu.num_computed += count
        self._missing += count
        return [key for key, number in zip(misses, flat, strict=True) if number not in worst]

    def end_event(self, phase: Phase) -> None:
        if self._cpu_ends_s > self.now_s:
            self.stall_s += self._cpu_ends_s - self.now_s
            self.spend(self._cpu_ends_s - self.now_s)
        wall_s = self.now_s - self._counted[1]
        super().end_event(phase)
        for meter in (self.pays, self.cpu.split.pays if self.cpu else None):
            if meter is not None:
                meter.spend(wall_s)
        self.num_full += self._is_full
        self.misses.append(self._missing)
        self._missing = 0

    def looks_ahead(self) -> bool:
        return super().looks_ahead() and (self.pays is None or self.pays.is_on)
