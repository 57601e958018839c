"""What may be seen of a running model from another thread, cheaply enough to ask all the time."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from moe_infinity.cache.driven import DrivenHierarchy
from moe_infinity.stats import PhaseCounters
from moe_infinity.tracing.recorder import Access
from moe_infinity.wiring import Wiring


class Live:
    """Reads what the computing thread owns, and changes nothing. Numbers may be an event apart."""

    def __init__(
        self,
        wiring: Wiring,
        hierarchy: DrivenHierarchy,
        finished: Sequence[PhaseCounters],
        lossy: tuple[str, ...],
    ) -> None:
        """finished: counters of all requests before the running one, prefill and decode. lossy:
        what of the checkpoint may change logits."""
        self._wiring = wiring
        self._hierarchy = hierarchy
        self._finished = finished
        self.settling = (
            threading.Lock()
        )  # held while a request's counters move to the finished ones
        self._lossy = lossy

    def totals(self) -> tuple[PhaseCounters, PhaseCounters]:
        """Prefill and decode since the model was opened, the running request included."""
        with self.settling:
            running = self._hierarchy.counters
            parts = (running.prefill, running.decode)
            prefill, decode = (replace(before) for before in self._finished)
        for total, part in zip((prefill, decode), parts, strict=True):
            total.add(part)
        return prefill, decode

    def prompt_left(self) -> int:
        """Tokens of the running request's prompt that have not been through the model; 0 once the
        answer has begun."""
        wiring = self._wiring
        request, recorder = wiring.request, wiring.recorder
        left = max(0, request.prompt_left or 0)
        if request.passing == "prefill":
            num_layers = self._hierarchy.residency.directory.shape.num_layers
            has_begun = recorder.num_recorded > wiring.recorded_before_step
            done = (recorder.recent[-1].layer + 1) / num_layers if has_begun else 0.0
            left += round(wiring.step.length * (1 - done))
        return left

    def tier_map(self) -> NDArray[np.uint8]:
        """[L, E] where every expert is: 0 on disk, 1 in RAM, 2 on the device."""
        return self._hierarchy.tier_map()

    def routed_since(self, num_seen: int) -> tuple[list[Access], int]:
        """The last events after the first ``num_seen``, and how many there were by now. Of passes
        that a device directed by itself there are none."""
        return self._wiring.recorder.since(num_seen)

    @property
    def num_slots(self) -> int:
        """Capacity in experts of the uppermost tier."""
        return self._hierarchy.residency.directory.num_usable

    @property
    def experts_per_layer(self) -> tuple[int, ...]:
        return tuple(self._hierarchy.residency.directory.shape.experts_per_layer)

    @property
    def lossy(self) -> tuple[str, ...]:
        """What may change logits."""
        return self._lossy + self._wiring.lossy + self._hierarchy.lossy

    @property
    def faults(self) -> tuple[str, ...]:
        """What failed and was replaced, so far."""
        return self._hierarchy.faults + self._wiring.faults
