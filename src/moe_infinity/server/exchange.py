"""One request from its job to its end: updates as they come, deadlines, and what is left behind."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

from moe_infinity.server.jobs import Ended, Event, Failed, Job, Piece, TokenLogprob
from moe_infinity.server.metrics import Metrics
from moe_infinity.server.parts import (
    AnswerParser,
    Arguments,
    Call,
    Content,
    ForcedCall,
    Part,
    Reasoning,
)
from moe_infinity.server.problems import ApiError, of_engine
from moe_infinity.server.worker import Worker

_log = logging.getLogger(__name__)
HEARTBEAT_S = 1.0  # between signs of life while nothing is said
_INSIST_S = 0.25  # between two attempts to cancel


@dataclass
class Update:
    """What came of one answer at once."""

    index: int
    parts: list[Part] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    ended: Ended | None = None

    def add(self, parts: list[Part]) -> None:
        """More of it; text that goes on becomes one part with what it follows."""
        for part in parts:
            last = self.parts[-1] if self.parts else None
            if isinstance(part, (Content, Reasoning)) and type(last) is type(part):
                self.parts[-1] = type(part)(last.text + part.text)
            elif isinstance(part, Arguments) and isinstance(last, Arguments):
                self.parts[-1] = Arguments(part.number, last.text + part.text)
            else:
                self.parts.append(part)


class Exchange:
    """A job in the queue, and one parser for each of its answers.

    name: of the endpoint, for metrics. lone_call: leave out calls after an answer's first.
    """

    def __init__(
        self,
        name: str,
        worker: Worker,
        job: Job,
        parsers: list[AnswerParser | ForcedCall],
        metrics: Metrics,
        lone_call: bool = False,
    ) -> None:
        self.name = name
        self.job = job
        self.parsers = parsers
        self._worker = worker
        self._metrics = metrics
        self._lone_call = lone_call
        self._insisting: set[asyncio.Task[None]] = set()

    async def updates(self, timeout_s: float) -> AsyncIterator[list[Update]]:
        """Submits the job and gives what comes of it; an empty list is a sign of life.

        Raises ApiError for whatever goes wrong. Closed early, it cancels the job.
        """
        deadline_s = time.monotonic() + timeout_s
        outcome = "cancelled"
        try:
            self._worker.submit(self.job)
            async for events in self.job.events(HEARTBEAT_S):
                found = self._read(events)
                if found or not events:
                    yield found
                if time.monotonic() > deadline_s and self.job.times.ended_s is None:
                    raise ApiError(
                        504,
                        f"the request took longer than the {timeout_s:g} s that --request-timeout "
                        f"allows",
                        None,
                        "timeout",
                    )
            outcome = "ok"
        except ApiError as error:
            outcome = error.code or str(error.status)
            raise
        finally:
            self._leave()
            self._metrics.finished(self.name, outcome, self.job)
            _log.info("%s", _summary(self.name, outcome, self.job))

    def prompt_done(self) -> int:
        """Tokens of the prompts that were read so far."""
        return self._worker.prompt_done(self.job)

    def _read(self, events: list[Event]) -> list[Update]:
        found: dict[int, Update] = {}
        for event in events:
            if isinstance(event, Failed):
                raise event.error if isinstance(event.error, ApiError) else of_engine(event.error)
            if isinstance(event, (Piece, Ended)):
                update = found.setdefault(event.index, Update(event.index))
                self._add(update, event)
        return list(found.values())

    def _add(self, update: Update, event: Piece | Ended) -> None:
        parser = self.parsers[event.index]
        if isinstance(event, Piece):
            update.add(self._wanted(parser.feed(event.text)))
            update.logprobs += [event.logprob] if event.logprob else []
        else:
            update.add(self._wanted(parser.end()))
            update.ended = event

    def _wanted(self, parts: list[Part]) -> list[Part]:
        if not self._lone_call:
            return parts
        return [p for p in parts if not (isinstance(p, (Call, Arguments)) and p.number > 0)]

    def _leave(self) -> None:
        """Whoever goes before the end takes the job along."""
        if self.job.times.ended_s is None:
            self._worker.cancel(self.job)
            task = asyncio.get_running_loop().create_task(self._insist())
            self._insisting.add(task)
            task.add_done_callback(self._insisting.discard)

    async def _insist(self) -> None:
        while self._worker.running is self.job:
            self._worker.cancel(self.job)
            await asyncio.sleep(_INSIST_S)


def _summary(name: str, outcome: str, job: Job) -> str:
    """A line for the log; of what was said only how much it was."""
    ttft_s, rate = job.times.ttft_s, job.tokens_per_s
    waited_s = (job.times.started_s or time.monotonic()) - job.times.asked_s
    return (
        f"{job.id} {name} {outcome}: prompt {job.num_prompt} tokens ({job.num_reused} kept), "
        f"answer {job.num_new}, waited {waited_s:.2f} s, "
        f"first token {'-' if ttft_s is None else f'{ttft_s:.2f} s'}, "
        f"{'-' if rate is None else f'{rate:.1f}'} tokens/s"
    )
