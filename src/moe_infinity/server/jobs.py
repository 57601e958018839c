"""One request on its way through the model: what is asked, and what comes back event by event."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import AsyncIterator, Hashable
from dataclasses import dataclass, field
from typing import Literal

from moe_infinity.server.sampling import Sampling

# Between two times of telling at least: text that comes faster is told together. Telling takes up
# to a millisecond of a processor that is needed elsewhere; nobody reads a dozen pieces a second.
PAUSE_S = 0.08
FinishReason = Literal["stop", "length", "cancelled"]


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """log-probabilities before temperature, penalties and cuts; top: the likeliest, best first."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True, slots=True)
class Piece:
    """Of one answer: text that may be shown, and how many tokens there are by now."""

    index: int
    text: str
    num_tokens: int
    logprob: TokenLogprob | None = None


@dataclass(frozen=True, slots=True)
class Ended:
    """An answer is complete. stop: by its end token, a stop text or its grammar."""

    index: int
    reason: FinishReason
    num_tokens: int
    stop: str | None = None  # the stop text that ended it


@dataclass(frozen=True, slots=True)
class Failed:
    """Nothing more comes."""

    error: Exception


@dataclass(frozen=True, slots=True)
class Done:
    """Every answer is complete."""


Event = Piece | Ended | Failed | Done


@dataclass
class JobTimes:
    """Of one job, on time.monotonic()'s clock."""

    asked_s: float = field(default_factory=time.monotonic)
    started_s: float | None = None
    first_token_s: float | None = None  # of the first answer
    ended_s: float | None = None

    @property
    def ttft_s(self) -> float | None:
        if self.started_s is None or self.first_token_s is None:
            return None
        return self.first_token_s - self.started_s


class Job:
    """Prompts to be answered one after another, each ``num_choices`` times, indices in that order.

    The computing thread posts events; the event loop that made the job reads them.
    """

    def __init__(
        self,
        job_id: str,
        client: Hashable,
        prompts: list[list[int]],
        sampling: Sampling,
        num_choices: int = 1,
        keeps_special: bool = False,
    ) -> None:
        self.id = job_id
        self.client = client
        self.prompts = prompts
        self.sampling = sampling
        self.num_choices = num_choices
        self.keeps_special = keeps_special
        self.times = JobTimes()
        self.is_cancelled = False
        self.finish: FinishReason | None = None  # of the last answer that is complete
        self.is_reading = False  # a prompt, no token of its answer is there yet
        self.num_reused = 0  # tokens of the prompts that were in a KV cache, each counted once
        self.num_begun = 0  # tokens of the prompts up to the one that is read or answered
        self.num_prompt = sum(map(len, prompts))
        self.num_new = 0
        self._events: deque[Event] = deque()
        self._loop = asyncio.get_running_loop()
        # Of the event loop alone. A timer and a future, no tasks: each round of the loop takes
        # Python away from the thread that computes.
        self._bell: asyncio.Future[None] | None = None  # of who waits for events
        self._gathering: asyncio.TimerHandle | None = None
        self._is_due = False  # what was posted is to be read now
        self._pause_ends_s = 0.0

    @property
    def tokens_per_s(self) -> float | None:
        """Of the answer, from its first token to now or to its end."""
        first = self.times.first_token_s
        if first is None or self.num_new < 2:
            return None
        spent_s = (self.times.ended_s or time.monotonic()) - first
        return (self.num_new - 1) / spent_s if spent_s > 0 else None

    def post(self, event: Event) -> None:
        """From the computing thread; a failure from any. One wake-up serves all that was posted
        until it is heard."""
        self._events.append(event)
        is_urgent = not isinstance(event, Piece)  # an answer's end is not held back
        if len(self._events) == 1 or is_urgent:
            with contextlib.suppress(RuntimeError):  # the loop has ended, and with it who listened
                self._loop.call_soon_threadsafe(self._hear, is_urgent)

    def _hear(self, is_urgent: bool) -> None:
        if is_urgent or self._loop.time() >= self._pause_ends_s:
            self._ring()
        elif self._gathering is None:
            self._gathering = self._loop.call_at(self._pause_ends_s, self._ring)

    def _ring(self, is_due: bool = True) -> None:
        self._is_due |= is_due
        if self._bell is not None and not self._bell.done():
            self._bell.set_result(None)

    async def events(self, heartbeat_s: float) -> AsyncIterator[list[Event]]:
        """What was posted, in order, some at a time; an empty list where nothing came for so long.
        Ends behind Done or Failed."""
        while True:
            await self._wait(heartbeat_s)
            if not self._is_due:
                yield []
                continue
            self._is_due = False
            if self._gathering is not None:
                self._gathering.cancel()
                self._gathering = None
            found = []
            while self._events:
                found.append(self._events.popleft())
            if found:  # a wake-up may come late, for what was read already
                self._pause_ends_s = self._loop.time() + PAUSE_S
                yield found
                if isinstance(found[-1], (Done, Failed)):
                    return

    async def _wait(self, at_most_s: float) -> None:
        """Until something is due, or so long."""
        if self._is_due:
            return
        assert self._bell is None, "somebody waits for these events already"
        self._bell = self._loop.create_future()
        timer = self._loop.call_later(at_most_s, self._ring, False)
        try:
            await self._bell
        finally:
            timer.cancel()
            self._bell = None
