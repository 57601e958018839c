"""Anthropic's /v1/messages, which coding agents speak."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from moe_infinity.server.blocks import Blocks, Event, kind_of
from moe_infinity.server.bodies import read
from moe_infinity.server.conversation import Prepared, rendering_of
from moe_infinity.server.exchange import Exchange
from moe_infinity.server.jobs import Ended
from moe_infinity.server.message_bodies import CountBody, MessagesBody
from moe_infinity.server.parts import Call, Part
from moe_infinity.server.problems import ApiError
from moe_infinity.server.replies import EventStream, JsonReply, data_frame, while_there
from moe_infinity.server.service import Service, in_thread

_REASONS = {"length": "max_tokens", "cancelled": "end_turn"}
_DELTAS = {
    "text": ("text_delta", "text"),
    "reasoning": ("thinking_delta", "thinking"),
    "call": ("input_json_delta", "partial_json"),
}


async def create_message(service: Service, request: Request) -> Response:
    """An answer as content blocks, or a stream of them."""
    body = read(MessagesBody, await request.body())
    service.require_model(body.model)
    tools = body.tool_choices()
    ready = await Prepared.of(service, body, tools)
    parsers = [ready.parser(service, tools)]
    choice = body.tool_choice
    lone_call = choice is not None and bool(choice.disable_parallel_tool_use)
    sampling = body.sampling(ready.grammar)
    prompts = [ready.prompt.ids]
    exchange = service.exchange("messages", request, prompts, sampling, parsers, lone_call)
    talk = _Message(service, exchange)
    if body.stream:
        return EventStream(talk.frames(), ApiError.anthropic, "error")
    return JsonReply(await while_there(request, talk.whole()))


async def count_tokens(service: Service, request: Request) -> Response:
    """How many tokens the messages would be, whether they fit or not."""
    body = read(CountBody, await request.body())
    service.require_model(body.model)
    return JsonReply({"input_tokens": await in_thread(_count, service, body)})


def _count(service: Service, body: CountBody) -> int:
    how, _ = rendering_of(service, body, body.tool_choices())
    return service.prompts.count(body.plain_messages(), how)


class _ContentBlocks(Blocks):
    """The answer's blocks, as they are at any moment, and events that tell of them."""

    def __init__(self) -> None:
        super().__init__()
        self.content: list[dict[str, Any]] = []
        self._kind = "text"
        self._arguments = ""

    def begin(self, part: Part) -> list[Event]:
        self._kind = kind_of(part)
        self._arguments = ""
        block: dict[str, Any] = {"type": "text", "text": ""}
        if self._kind == "reasoning":
            block = {"type": "thinking", "thinking": "", "signature": ""}
        elif isinstance(part, Call):
            block = {"type": "tool_use", "id": part.id, "name": part.name, "input": {}}
        self.content.append(block)
        index = len(self.content) - 1
        return [{"type": "content_block_start", "index": index, "content_block": dict(block)}]

    def more(self, text: str) -> list[Event]:
        kind, name = _DELTAS[self._kind]
        if self._kind == "call":
            self._arguments += text
        else:
            self.content[-1][name] += text
        delta = {"type": kind, name: text}
        return [{"type": "content_block_delta", "index": len(self.content) - 1, "delta": delta}]

    def end(self) -> list[Event]:
        if self._kind == "call":
            self.content[-1]["input"] = _as_object(self._arguments)
        return [{"type": "content_block_stop", "index": len(self.content) - 1}]


class _Message:
    """One exchange as a message."""

    def __init__(self, service: Service, exchange: Exchange) -> None:
        self._service = service
        self._exchange = exchange
        self._blocks = _ContentBlocks()

    async def whole(self) -> dict[str, Any]:
        end: Ended | None = None
        async for updates in self._exchange.updates(self._service.config.request_timeout_s):
            for update in updates:
                for part in update.parts:
                    self._blocks.add(part)
                end = update.ended or end
        self._blocks.finish()
        return self._document(self._blocks.content) | self._stop(end) | {"usage": self._usage()}

    async def frames(self) -> AsyncIterator[bytes]:
        end: Ended | None = None
        has_begun = False
        async for updates in self._exchange.updates(self._service.config.request_timeout_s):
            if not has_begun:
                has_begun = True
                message = self._document([]) | self._stop(None) | {"usage": self._usage()}
                yield _frame({"type": "message_start", "message": message})
            if not updates:
                yield _frame({"type": "ping"})
            for update in updates:
                for part in update.parts:
                    for event in self._blocks.add(part):
                        yield _frame(event)
                end = update.ended or end
        for event in self._blocks.finish():
            yield _frame(event)
        yield _frame({"type": "message_delta", "delta": self._stop(end), "usage": self._usage()})
        yield _frame({"type": "message_stop"})

    def _document(self, content: list[dict[str, Any]]) -> dict[str, Any]:
        head = {"id": self._exchange.job.id, "type": "message", "role": "assistant"}
        return head | {"model": self._service.name, "content": content}

    def _stop(self, end: Ended | None) -> dict[str, Any]:
        if end is None:
            return {"stop_reason": None, "stop_sequence": None}
        reason = _REASONS.get(end.reason, "stop_sequence" if end.stop else "end_turn")
        if end.reason == "stop" and self._exchange.parsers[0].num_calls:
            reason = "tool_use"
        return {"stop_reason": reason, "stop_sequence": end.stop}

    def _usage(self) -> dict[str, int]:
        job = self._exchange.job
        return {
            "input_tokens": job.num_prompt - job.num_reused,
            "cache_read_input_tokens": job.num_reused,
            "cache_creation_input_tokens": 0,
            "output_tokens": job.num_new,
        }


def _as_object(arguments: str) -> dict[str, Any]:
    try:
        found = json.loads(arguments or "{}")
    except ValueError:  # cut off by max_tokens
        return {}
    return found if isinstance(found, dict) else {}


def _frame(event: Event) -> bytes:
    return data_frame(event, event["type"])
