"""The clock of one request: where prefill ends, when the first token came. Knows no cache."""

from __future__ import annotations

from dataclasses import dataclass

from moe_infinity.model.taps import Step
from moe_infinity.stats import Counters
from moe_infinity.types import Phase


@dataclass
class Request:
    """The request that runs, or the last one that ran."""

    start_s: float
    initial: frozenset[int] = frozenset()
    generates: bool = True
    prompt_left: int | None = None  # tokens not yet begun; None: a step's length tells its phase
    prefill_end_s: float | None = None
    first_token_s: float | None = None
    end_s: float | None = None
    counters: Counters | None = None
    passing: Phase | None = None  # of the forward pass under way, where prompt_left is counted

    @property
    def ttft_s(self) -> float | None:
        """Time to the first new token; None before it, and where none was asked for."""
        if not self.generates or not self.first_token_s:
            return None
        return self.first_token_s - self.start_s

    def phase_of(self, step: Step) -> Phase:
        """Also a prompt's last chunk of one token is prefill, and several drafted ones are not."""
        if self.prompt_left is None or self.end_s is not None:
            return step.phase
        phase: Phase = "prefill" if self.prompt_left > 0 else "decode"
        self.prompt_left -= step.length
        self.passing = phase
        return phase

    def end_step(self, step: Step, now_s: float) -> None:
        """A forward pass of the model has ended."""
        self.passing = None
        if self.end_s is not None:
            return
        if step.phase == "prefill":
            self.prefill_end_s = now_s  # of the last chunk, in the end
        yields_first = step.phase == "prefill" or self.first_token_s is None
        if yields_first and not step.is_encoder:
            self.first_token_s = now_s

    def finish(self, counters: Counters, now_s: float) -> None:
        """Split the time taken between the phases."""
        self.end_s = now_s
        prefilled = self.prefill_end_s if self.generates else None
        split = prefilled or (now_s if counters.prefill.num_passes else self.start_s)
        counters.prefill.wall_s = split - self.start_s
        counters.decode.wall_s = now_s - split if counters.decode.num_passes else 0.0
