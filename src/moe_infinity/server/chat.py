"""/v1/chat/completions."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from moe_infinity.server.bodies import read
from moe_infinity.server.chat_bodies import ChatBody, Tools
from moe_infinity.server.conversation import Prepared
from moe_infinity.server.exchange import Exchange, Update
from moe_infinity.server.jobs import Job
from moe_infinity.server.parts import Arguments, Call, Content, Part
from moe_infinity.server.problems import ApiError
from moe_infinity.server.replies import EventStream, JsonReply, comment, data_frame, while_there
from moe_infinity.server.service import Service


async def chat_completions(service: Service, request: Request) -> Response:
    """An answer, or a stream of its parts."""
    body = read(ChatBody, await request.body())
    service.require_model(body.model)
    exchange = await _exchange(service, request, body)
    talk = _Talk(service, body, exchange)
    if body.stream:
        return EventStream(talk.frames(), ApiError.openai)
    return JsonReply(await while_there(request, talk.whole()))


async def _exchange(service: Service, request: Request, body: ChatBody) -> Exchange:
    body.refuse_unsupported()
    tools = Tools.of_chat(body)
    ready = await Prepared.of(service, body, tools)
    num_ids, limit = service.num_ids, service.config.max_new_tokens
    sampling = body.sampling(num_ids, limit, body.num_logprobs, ready.grammar)
    parsers = [ready.parser(service, tools) for _ in range(body.n or 1)]
    lone_call = body.parallel_tool_calls is False
    return service.exchange("chat", request, [ready.prompt.ids], sampling, parsers, lone_call)


def usage_of(job: Job) -> dict[str, Any]:
    """Tokens of a job, as OpenAI counts them."""
    return {
        "prompt_tokens": job.num_prompt,
        "completion_tokens": job.num_new,
        "total_tokens": job.num_prompt + job.num_new,
        "prompt_tokens_details": {"cached_tokens": job.num_reused},
    }


def progress_of(exchange: Exchange) -> dict[str, Any]:
    """How far the prompt was read."""
    job = exchange.job
    return {
        "total": job.num_prompt,
        "cached": job.num_reused,
        "processed": exchange.prompt_done(),
        "time_ms": round((time.monotonic() - job.times.asked_s) * 1000),
    }


def waiting_comment(exchange: Exchange) -> bytes:
    """What a client is told that need not hear it."""
    done, total = exchange.prompt_done(), exchange.job.num_prompt
    is_running = exchange.job.times.started_s is not None
    return comment(f"prompt: {done} of {total} tokens" if is_running else "waiting for its turn")


@dataclass
class _Answer:
    """What one answer has come to."""

    content: str = ""
    reasoning: str = ""
    calls: list[dict[str, Any]] = field(default_factory=list)
    logprobs: list[dict[str, Any]] = field(default_factory=list)
    finish: str | None = None

    def add(self, part: Part) -> None:
        if isinstance(part, Call):
            self.calls.append(_call(part))
        elif isinstance(part, Arguments):
            self.calls[part.number]["function"]["arguments"] += part.text
        elif isinstance(part, Content):
            self.content += part.text
        else:
            self.reasoning += part.text


class _Talk:
    """One exchange as chat completions show it."""

    def __init__(self, service: Service, body: ChatBody, exchange: Exchange) -> None:
        self._service = service
        self._body = body
        self._exchange = exchange
        self._created = int(time.time())  # the same in all chunks
        self._has_begun: set[int] = set()

    async def whole(self) -> dict[str, Any]:
        answers = [_Answer() for _ in self._exchange.parsers]
        async for updates in self._exchange.updates(self._service.config.request_timeout_s):
            for update in updates:
                answer = answers[update.index]
                for part in update.parts:
                    answer.add(part)
                answer.logprobs += map(self._service.logprob, update.logprobs)
                answer.finish = self._finish(update) or answer.finish
        choices = [self._choice(index, answer) for index, answer in enumerate(answers)]
        head = self._head("chat.completion", choices)
        return head | {"usage": usage_of(self._exchange.job)}

    async def frames(self) -> AsyncIterator[bytes]:
        async for updates in self._exchange.updates(self._service.config.request_timeout_s):
            if updates:
                deltas = [choice for update in updates for choice in self._deltas(update)]
                yield b"".join(self._chunk([choice]) for choice in deltas)
            elif self._body.return_progress and not self._has_begun:
                yield self._chunk([], prompt_progress=progress_of(self._exchange))
            else:
                yield waiting_comment(self._exchange)
        if self._body.wants_usage:
            yield self._chunk([], usage=usage_of(self._exchange.job))
        yield b"data: [DONE]\n\n"

    def _deltas(self, update: Update) -> list[dict[str, Any]]:
        deltas = [_delta(part) for part in update.parts]
        if update.index not in self._has_begun:
            self._has_begun.add(update.index)
            deltas.insert(0, {"role": "assistant", "content": ""})
        found = [self._delta_choice(update.index, delta) for delta in deltas]
        if update.logprobs:
            if len(found) == 0:
                found = [self._delta_choice(update.index, {"content": ""})]
            content = [self._service.logprob(each) for each in update.logprobs]
            found[-1]["logprobs"] = {"content": content, "refusal": None}
        if update.ended:
            found.append(self._delta_choice(update.index, {}, self._finish(update)))
        return found

    def _delta_choice(
        self, index: int, delta: dict[str, Any], finish: str | None = None
    ) -> dict[str, Any]:
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": finish}

    def _chunk(self, choices: list[dict[str, Any]], **more: Any) -> bytes:
        head = self._head("chat.completion.chunk", choices)
        if self._body.wants_usage:
            head["usage"] = None
        return data_frame(head | more)

    def _head(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        job, service = self._exchange.job, self._service
        head = {"id": job.id, "object": kind, "created": self._created, "model": service.name}
        return head | {"choices": choices}

    def _choice(self, index: int, answer: _Answer) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": answer.content, "refusal": None}
        if answer.reasoning:
            message["reasoning_content"] = answer.reasoning
        if answer.calls:
            message["tool_calls"] = answer.calls
            message["content"] = answer.content or None
        logprobs = {"content": answer.logprobs, "refusal": None} if self._body.logprobs else None
        found = {"index": index, "message": message, "logprobs": logprobs}
        return found | {"finish_reason": answer.finish}

    def _finish(self, update: Update) -> str | None:
        if update.ended is None:
            return None
        has_calls = self._exchange.parsers[update.index].num_calls > 0
        reason = update.ended.reason
        return "tool_calls" if has_calls and reason == "stop" else reason


def _call(part: Call) -> dict[str, Any]:
    function = {"name": part.name, "arguments": ""}
    return {"id": part.id, "type": "function", "function": function}


def _delta(part: Part) -> dict[str, Any]:
    if isinstance(part, Call):
        return {"tool_calls": [{"index": part.number} | _call(part)]}
    if isinstance(part, Arguments):
        return {"tool_calls": [{"index": part.number, "function": {"arguments": part.text}}]}
    if isinstance(part, Content):
        return {"content": part.text}
    return {"reasoning_content": part.text}
