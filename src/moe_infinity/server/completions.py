"""/v1/completions: plain text goes on, several prompts at once if there are several."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from moe_infinity.server.bodies import read
from moe_infinity.server.chat import progress_of, usage_of, waiting_comment
from moe_infinity.server.chat_bodies import CompletionBody
from moe_infinity.server.exchange import Exchange, Update
from moe_infinity.server.jobs import TokenLogprob
from moe_infinity.server.parts import AnswerParser, Content
from moe_infinity.server.problems import ApiError
from moe_infinity.server.replies import EventStream, JsonReply, data_frame, while_there
from moe_infinity.server.service import Service, in_thread

_DEFAULT_MAX_TOKENS = 16  # OpenAI's, of this endpoint
_MAX_PROMPTS = 64


async def completions(service: Service, request: Request) -> Response:
    """An answer to each prompt, or a stream of their parts."""
    body = read(CompletionBody, await request.body())
    service.require_model(body.model)
    body.refuse_unsupported()
    prompts = await in_thread(_prompts, service, body)
    sampling = body.sampling(service.num_ids, _DEFAULT_MAX_TOKENS, body.logprobs)
    num_answers = len(prompts) * (body.n or 1)
    parsers: Any = [AnswerParser(None, "", None) for _ in range(num_answers)]
    exchange = service.exchange("completions", request, prompts, sampling, parsers)
    talk = _Completion(service, body, exchange)
    if body.stream:
        return EventStream(talk.frames(), ApiError.openai)
    return JsonReply(await while_there(request, talk.whole()))


def _prompts(service: Service, body: CompletionBody) -> list[list[int]]:
    given = body.prompts()
    if not 1 <= len(given) <= _MAX_PROMPTS:
        raise ApiError(400, f"prompt: got {len(given)}, expected 1 to {_MAX_PROMPTS}", "prompt")
    return [_ids(service, prompt) for prompt in given]


def _ids(service: Service, prompt: str | list[int]) -> list[int]:
    if isinstance(prompt, str):
        return service.prompts.of_text(prompt, "prompt")
    wrong = [token for token in prompt if not 0 <= token < service.num_ids]
    if wrong:
        raise ApiError(
            400, f"prompt: got token {wrong[0]}, expected 0 to {service.num_ids - 1}", "prompt"
        )
    return service.prompts.checked(prompt, "prompt")


class _Logprobs:
    """The older form of log-probabilities: four lists beside each other."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._offset = 0

    def of(self, found: list[TokenLogprob]) -> dict[str, Any]:
        """Of the answer's next tokens."""
        rows = [self._service.logprob(each) for each in found]
        offsets = []
        for row in rows:
            offsets.append(self._offset)
            self._offset += len(row["token"])
        return {
            "tokens": [row["token"] for row in rows],
            "token_logprobs": [row["logprob"] for row in rows],
            "top_logprobs": [
                {top["token"]: top["logprob"] for top in row["top_logprobs"]} for row in rows
            ],
            "text_offset": offsets,
        }


class _Completion:
    """One exchange as text completions show it."""

    def __init__(self, service: Service, body: CompletionBody, exchange: Exchange) -> None:
        self._service = service
        self._body = body
        self._exchange = exchange
        self._created = int(time.time())  # the same in all chunks
        self._logprobs = [_Logprobs(service) for _ in exchange.parsers]

    async def whole(self) -> dict[str, Any]:
        num_answers = len(self._exchange.parsers)
        texts, finish = [""] * num_answers, [""] * num_answers
        found: list[list[TokenLogprob]] = [[] for _ in range(num_answers)]
        async for updates in self._exchange.updates(self._service.config.request_timeout_s):
            for update in updates:
                texts[update.index] += _text(update)
                found[update.index] += update.logprobs
                finish[update.index] = update.ended.reason if update.ended else ""
        choices = [
            self._choice(index, text, found[index], finish[index])
            for index, text in enumerate(texts)
        ]
        return self._head(choices) | {"usage": usage_of(self._exchange.job)}

    async def frames(self) -> AsyncIterator[bytes]:
        async for updates in self._exchange.updates(self._service.config.request_timeout_s):
            for update in updates:
                reason = update.ended.reason if update.ended else None
                choice = self._choice(update.index, _text(update), update.logprobs, reason)
                yield self._chunk([choice])
            if not updates and self._body.return_progress:
                yield self._chunk([], prompt_progress=progress_of(self._exchange))
            elif not updates:
                yield waiting_comment(self._exchange)
        if self._body.wants_usage:
            yield self._chunk([], usage=usage_of(self._exchange.job))
        yield b"data: [DONE]\n\n"

    def _chunk(self, choices: list[dict[str, Any]], **more: Any) -> bytes:
        head = self._head(choices)
        if self._body.wants_usage:
            head["usage"] = None
        return data_frame(head | more)

    def _head(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        head = {"id": self._exchange.job.id, "object": "text_completion", "created": self._created}
        return head | {"model": self._service.name, "choices": choices}

    def _choice(
        self, index: int, text: str, found: list[TokenLogprob], finish: str | None
    ) -> dict[str, Any]:
        shows = self._body.logprobs is not None
        logprobs = self._logprobs[index].of(found) if shows else None
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish}


def _text(update: Update) -> str:
    return "".join(part.text for part in update.parts if isinstance(part, Content))
