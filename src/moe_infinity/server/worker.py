"""The thread that computes: takes jobs in turn, answers them with the model, one at a time."""

from __future__ import annotations

import logging
import os
import threading
import time
from typing import Any

import torch
from transformers import LogitsProcessor, StoppingCriteriaList

from moe_infinity.engine import MoE
from moe_infinity.errors import CancelledError, DeviceError
from moe_infinity.model.kept_caches import KeptCaches
from moe_infinity.server.answer_text import AnswerText
from moe_infinity.server.fair_queue import FairQueue
from moe_infinity.server.grammars import Grammars
from moe_infinity.server.jobs import Done, Failed, Job
from moe_infinity.server.problems import ApiError
from moe_infinity.server.sampling import Sampling
from moe_infinity.server.sink import LogprobsProcessor, Sink

_log = logging.getLogger(__name__)
_FIRST_GUESS_S = 10.0  # of a job's time, before any was served


class Worker:
    """Owns the model's requests. Its methods and properties are for other threads."""

    def __init__(self, moe: MoE, max_waiting: int) -> None:
        self.moe = moe
        self.caches = KeptCaches(moe.new_cache, moe.plan.max_context)
        self.eos_ids = eos_ids_of(moe)
        width = moe.model.get_output_embeddings().weight.shape[0]
        self.grammars = Grammars(moe.tokenizer, width, sorted(self.eos_ids))
        self.max_waiting = max_waiting
        self.running: Job | None = None
        self.last: Job | None = None  # that was answered
        self.lost: Exception | None = None  # why no request can be answered any more
        self._queue: FairQueue[Job] = FairQueue()
        self._changed = threading.Condition()
        self._mean_s = _FIRST_GUESS_S
        self._is_closing = False
        self._thread = threading.Thread(target=self._run, name="answers", daemon=True)
        self._thread.start()

    @property
    def num_waiting(self) -> int:
        with self._changed:
            return len(self._queue)

    def prompt_done(self, job: Job) -> int:
        """Tokens of its prompts that were read so far."""
        is_read = self.running is job and job.is_reading
        return max(0, job.num_begun - (self.moe.live.prompt_left() if is_read else 0))

    def submit(self, job: Job) -> None:
        """Put a job into the queue. Raises ApiError where it is full, or the server ends."""
        with self._changed:
            if self._is_closing:
                raise _closing()
            # One that is about to be taken does not wait.
            if len(self._queue) >= self.max_waiting + (self.running is None):
                wait_s = round(max(1.0, min(600.0, self._mean_s * len(self._queue))))
                raise ApiError(
                    429,
                    f"{len(self._queue)} requests are waiting, as many as are let in; try again in "
                    f"about {wait_s} s",
                    None,
                    "queue_full",
                    wait_s,
                )
            self._queue.put(job.client, job)
            self._changed.notify()

    def cancel(self, job: Job) -> None:
        """Nobody wants its answer any more: it leaves the queue, or ends before its next token; a
        prompt is left at the next layer, and what was read of it stays in the KV cache.

        A prompt that begins in this very moment may miss it: call again until the job has ended.
        """
        with self._changed:
            job.is_cancelled = True
            if self._queue.remove(job):
                job.post(Failed(CancelledError("the request was cancelled")))
            elif self.running is job and job.is_reading:
                self.moe.cancel()

    def close(self, grace_s: float) -> None:
        """Refuse what waits, let what runs end within the time, then cancel it. Joins the thread;
        idempotent."""
        self.refuse_all()
        self._thread.join(grace_s)
        while self._thread.is_alive():
            running = self.running
            if running is not None:
                self.cancel(running)
            self._thread.join(0.1)

    def refuse_all(self) -> None:
        """From now on no job is taken."""
        with self._changed:
            self._is_closing = True
            for job in self._queue.drain():
                job.post(Failed(_closing()))
            self._changed.notify()

    def abandon(self) -> None:
        """Tell whoever waits for the running job that it will not be finished."""
        running = self.running
        if running is not None:
            running.post(Failed(_closing()))

    def _run(self) -> None:
        while (job := self._next()) is not None:
            outcome: Done | Failed = Done()
            try:
                self._serve(job)
            except Exception as error:  # the server goes on, whatever a request failed with
                self._note(job, error)
                outcome = Failed(error)
            self._finish(job)
            job.post(outcome)

    def _next(self) -> Job | None:
        with self._changed:
            while not self._queue and not self._is_closing:
                self._changed.wait()
            if not self._queue:
                return None
            self.running = job = self._queue.take()
            job.times.started_s = time.monotonic()
            return job

    def _finish(self, job: Job) -> None:
        now_s = time.monotonic()
        with self._changed:
            job.times.ended_s = now_s
            self.running, self.last = None, job
        self._mean_s += 0.2 * (now_s - (job.times.started_s or now_s) - self._mean_s)

    def _note(self, job: Job, error: Exception) -> None:
        if isinstance(error, DeviceError):
            self.lost = error
        if not job.is_cancelled and not isinstance(error, ApiError):
            _log.error("%s failed: %s: %s", job.id, type(error).__name__, error, exc_info=error)

    def _serve(self, job: Job) -> None:
        if self.lost is not None:
            raise self.lost
        seed = job.sampling.seed
        first_seed = int.from_bytes(os.urandom(6), "big") if seed is None else seed
        for index, prompt in enumerate(p for p in job.prompts for _ in range(job.num_choices)):
            if job.is_cancelled:
                return
            torch.manual_seed((first_seed + index) % 2**63)
            self._answer(job, index, prompt)

    def _answer(self, job: Job, index: int, prompt: list[int]) -> None:
        sampling, moe = job.sampling, self.moe
        left = moe.plan.max_context - len(prompt)
        max_tokens = min(left, sampling.max_tokens or left)
        processors, logprobs = self._processors(sampling, len(prompt))
        text = AnswerText(moe.tokenizer, sampling.stop, job.keeps_special)
        eos_ids = frozenset() if sampling.goes_on else self.eos_ids
        cache, num_reused = self.caches.take(prompt, anew=not sampling.cache_prompt)
        if index % job.num_choices == 0:
            job.num_reused += num_reused
            job.num_begun += len(prompt)

        job.is_reading = True

        def on_token(num_new: int) -> None:
            job.is_reading = False
            self.caches.grow(len(prompt) + num_new)

        sink = Sink(job, index, text, eos_ids, max_tokens, logprobs, on_token)
        options: dict[str, Any] = sampling.options(moe.model.generation_config)
        if cache is not None:
            options["past_key_values"] = cache
        is_cut = True
        try:
            moe.generate(
                [prompt],
                max_new_tokens=max_tokens,
                # Or the library would take padding tokens in a prompt for padding.
                attention_mask=torch.ones((1, len(prompt)), dtype=torch.long),
                logits_processor=processors,
                stopping_criteria=StoppingCriteriaList([sink]),
                **options,
            )
            is_cut = False
        finally:
            self.caches.give_back(prompt + sink.ids, is_cut)

    def _processors(
        self, sampling: Sampling, prompt_length: int
    ) -> tuple[list[LogitsProcessor], LogprobsProcessor | None]:
        """What changes scores, and before it what notes them."""
        model = self.moe.model
        # A decoder of its own begins with one token that says so.
        start = 1 if model.config.is_encoder_decoder else prompt_length
        processors = sampling.processors(start, self.grammars, model.generation_config)
        if sampling.num_logprobs is None:
            return processors, None
        self.grammars.prepare()  # or the event loop would, for the text of the first token
        logprobs = LogprobsProcessor(sampling.num_logprobs)
        return [logprobs, *processors], logprobs


def _closing() -> ApiError:
    return ApiError(503, "the server is shutting down", None, "shutting_down")


def eos_ids_of(moe: MoE) -> frozenset[int]:
    """Tokens that end an answer, by the model's generation config."""
    ids = moe.model.generation_config.eos_token_id
    return frozenset(ids if isinstance(ids, list) else [] if ids is None else [ids])
