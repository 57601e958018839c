"""Hears of every token as it is chosen, and says when an answer is over."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import LogitsProcessor, StoppingCriteria

from moe_infinity.server.answer_text import AnswerText
from moe_infinity.server.jobs import PAUSE_S, Ended, FinishReason, Job, Piece, TokenLogprob

_MARGIN_S = 0.01  # so that who reads has read, and need not set a timer


class LogprobsProcessor(LogitsProcessor):  # type: ignore[misc]
    """Notes the model's own scores, before anything changes them. Is put before all others."""

    def __init__(self, num_top: int) -> None:
        self._num_top = num_top
        self._logprobs = torch.empty(0)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self._logprobs = torch.log_softmax(scores[0].float(), dim=-1)
        return scores

    def of(self, token: int) -> TokenLogprob:
        """Of the token that was chosen then."""
        values, ids = torch.topk(self._logprobs, min(self._num_top, len(self._logprobs)))
        top = tuple(zip(ids.tolist(), values.tolist(), strict=True))
        return TokenLogprob(token, float(self._logprobs[token]), top)


class Sink(StoppingCriteria):  # type: ignore[misc]
    """One answer: posts its text to the job, ends it at its end token, a stop text or its length.

    Asked by ``generate`` behind every token, before that token goes through the model.
    """

    def __init__(
        self,
        job: Job,
        index: int,
        text: AnswerText,
        eos_ids: frozenset[int],
        max_tokens: int,
        logprobs: LogprobsProcessor | None,
        on_token: Callable[[int], None],
    ) -> None:
        """on_token: told how many new tokens there are, of which the last has no place in the KV
        cache yet."""
        self._job = job
        self._index = index
        self._text = text
        self._eos_ids = eos_ids
        self._max_tokens = max_tokens
        self._logprobs = logprobs
        self._on_token = on_token
        self._says_all = logprobs is not None or text.may_stop
        self._says_again_s = 0.0  # time.monotonic()
        self.ids: list[int] = []

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        is_over = self._take(int(input_ids[0, -1]))
        return torch.tensor([is_over], device=input_ids.device)

    def _take(self, token: int) -> bool:
        job = self._job
        self.ids.append(token)
        job.num_new += 1
        if job.times.first_token_s is None:
            job.times.first_token_s = time.monotonic()
        self._on_token(len(self.ids))
        if job.is_cancelled:
            return self._end("cancelled")
        if token in self._eos_ids:
            return self._end("stop")
        said = self._say(token)
        logprob = self._logprobs.of(token) if self._logprobs else None
        if said or logprob:
            job.post(Piece(self._index, said, len(self.ids), logprob))
        if self._text.stopped:
            return self._end("stop")
        return len(self.ids) >= self._max_tokens and self._end("length")

    def _say(self, token: int) -> str:
        """What may be shown by now: text that is told a dozen times a second is decoded no more
        often, unless each token's counts."""
        now_s = time.monotonic()
        if now_s < self._says_again_s and not self._says_all:
            self._text.add(token)
            return ""
        self._says_again_s = now_s + PAUSE_S + _MARGIN_S
        return self._text.put(token)

    def _end(self, reason: FinishReason) -> bool:
        if not self._text.stopped:
            rest = self._text.end()
            if rest:
                self._job.post(Piece(self._index, rest, len(self.ids)))
            reason = "stop" if self._text.stopped else reason
        self._job.finish = reason
        self._job.post(Ended(self._index, reason, len(self.ids), self._text.stop))
        return True
