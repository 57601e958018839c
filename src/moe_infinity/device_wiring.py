"""Connects an opened model to a device that can direct its own decode: which passes it directs."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from moe_infinity.cache.vram import VramHierarchy
from moe_infinity.errors import CancelledError
from moe_infinity.kernels.base import ExpertMath
from moe_infinity.model.directed import DirectedExperts, can_direct, is_ready
from moe_infinity.model.experts import Runtime
from moe_infinity.model.pressure import UnderPressure
from moe_infinity.model.static_decode import StaticDecode, is_static
from moe_infinity.model.taps import Step
from moe_infinity.residency.meters import QuickerMeter


class DeviceWiring:
    """Lets a model's decode go the static way, and the device direct it where that is quicker."""

    def __init__(
        self,
        model: Any,
        hierarchy: VramHierarchy,
        runtime: Runtime,
        maths: Sequence[ExpertMath],
        max_context: int,
    ) -> None:
        self._hierarchy, self._runtime = hierarchy, runtime
        self.meter = QuickerMeter()
        self._began_s: float | None = None  # the pass before, if it was of decode
        self._static: StaticDecode | None = None
        if runtime.kernel.name == "triton" and is_static(model.config):
            self._static = StaticDecode(model, hierarchy.device, max_context)
            if can_direct(hierarchy, runtime.kernel, maths):
                directed = DirectedExperts(hierarchy, runtime.kernel, maths, runtime.recorder)
                self._static.directed = runtime.directed = directed
        self._pressure = UnderPressure(model, hierarchy, self._give_up_direction)  # before all that

    @property
    def faults(self) -> tuple[str, ...]:
        found = (self._pressure.fault, self._static.fault if self._static is not None else None)
        return tuple(fault for fault in found if fault)

    def begin_step(self, step: Step) -> bool:
        """A pass starts; whether the device directs it, so that no host may be asked."""
        directed = self._runtime.directed
        if directed is None:
            return False
        is_lone = step.phase == "decode" and step.num_rows * step.length == 1
        self._tell_meter(is_lone, directed.is_on)
        observer = self._runtime.observer
        wanted = is_lone and self.meter.is_on and (observer is None or observer.trace is None)
        if directed.is_on and not wanted:
            directed.end()
        elif wanted and not directed.is_on and is_ready(self._hierarchy):
            directed.begin()
        if observer is not None:
            observer.is_paused = directed.is_on
        if directed.is_on:
            self._hierarchy.counters.phase = step.phase
            if self._hierarchy.cancelled.is_set():
                raise CancelledError("the request was cancelled")
        return directed.is_on

    def end_step(self) -> None:
        directed = self._runtime.directed
        if directed is not None and directed.is_on:
            directed.end_pass()

    def finish(self) -> None:
        """The request is over: the host has the last word on its account."""
        self._began_s = None
        directed = self._runtime.directed
        if self._runtime.observer is not None:
            self._runtime.observer.is_paused = False
        if self._static is not None:
            self._static.forget()  # the next request has a cache of its own, and room for one
        if directed is not None:
            directed.end()

    def close(self) -> None:
        self._pressure.close()

    def _give_up_direction(self) -> None:
        """Slots are about to go: the device's own directory has as many as before."""
        if self._runtime.directed is not None:
            self._runtime.directed.end()
            self._runtime.directed = None
        if self._static is not None:
            self._static.directed = None
            self._static.forget()

    def _tell_meter(self, is_lone: bool, was_directed: bool) -> None:
        """From the begin of a pass of decode to that of the next: the host waits in between, for it
        wants the token."""
        now_s = time.perf_counter()
        if is_lone and self._began_s is not None and was_directed == self.meter.is_on:
            self.meter.spend(now_s - self._began_s)
        self._began_s = now_s if is_lone else None
