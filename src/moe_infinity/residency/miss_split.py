"""Which of an event's misses the processor computes where they lie, while the others are copied.

Two devices share the work of one event: it is over when the slower of both is. Pure; times come in
as arguments.
"""

from __future__ import annotations

from typing import Literal

from moe_infinity.residency.meters import PaysMeter

MissMode = Literal["copy", "cpu", "auto"]

_MEMORY = 0.1  # weight of the newest step in the running cost
_TRIAL_PASSES = 8  # of a window
_FIRST_FIXED_S = 100e-6  # of a step on the processor, before any was seen: two copies and a launch


class MissSplit:
    """How many misses go to the processor.

    cpu: all of them. auto: as many as make the longer of copying and computing shortest, by the
    bandwidths of both and the running fixed cost of a step; and none while steps with them were
    measured to take longer than without. A ratio of bandwidths alone sees neither how rare misses
    are nor what a step costs at all.
    """

    def __init__(self, mode: MissMode, link_gbps: float, cpu_gbps: float, num_layers: int) -> None:
        self.fixed_s = _FIRST_FIXED_S
        self.pays = PaysMeter(_TRIAL_PASSES * num_layers)
        self._mode = mode
        self._link_bytes_s = link_gbps * 1e9
        self._cpu_bytes_s = cpu_gbps * 1e9

    def choose(self, num_misses: int, expert_bytes: int) -> int:
        """Of so many misses whose bytes are in RAM, those for the processor."""
        if self._mode == "cpu":
            return num_misses
        if self._mode == "copy" or not self.pays.is_on or not num_misses:
            return 0
        copy_s, cpu_s = expert_bytes / self._link_bytes_s, expert_bytes / self._cpu_bytes_s

        def longer_s(count: int) -> float:
            computed_s = self.fixed_s + count * cpu_s if count else 0.0
            return max((num_misses - count) * copy_s, computed_s)

        return min(range(num_misses + 1), key=longer_s)

    def learn(self, count: int, expert_bytes: int, seconds: float) -> None:
        """The processor computed so many experts of one event in so many seconds."""
        fixed_s = max(0.0, seconds - count * expert_bytes / self._cpu_bytes_s)
        self.fixed_s += _MEMORY * (fixed_s - self.fixed_s)
