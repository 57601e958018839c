"""/v1/responses. Nothing is kept between requests: the conversation comes as input."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import AsyncIterator
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from moe_infinity.server.blocks import Blocks, Event, kind_of
from moe_infinity.server.bodies import read
from moe_infinity.server.chat import waiting_comment
from moe_infinity.server.conversation import Prepared
from moe_infinity.server.exchange import Exchange
from moe_infinity.server.jobs import Ended
from moe_infinity.server.parts import Call, Part
from moe_infinity.server.problems import ApiError
from moe_infinity.server.replies import EventStream, JsonReply, data_frame, while_there
from moe_infinity.server.response_bodies import ResponseBody
from moe_infinity.server.service import Service


async def create_response(service: Service, request: Request) -> Response:
    """An answer as output items, or a stream of events."""
    body = read(ResponseBody, await request.body())
    service.require_model(body.model)
    body.refuse_unsupported()
    tools = body.tool_choices()
    ready = await Prepared.of(service, body, tools, "input")
    sampling = body.sampling(service.config.max_new_tokens, ready.grammar)
    parsers = [ready.parser(service, tools)]
    lone_call = body.parallel_tool_calls is False
    prompts = [ready.prompt.ids]
    exchange = service.exchange("responses", request, prompts, sampling, parsers, lone_call)
    talk = _Response(service, body, exchange)
    if body.stream:
        return EventStream(talk.frames(), _failed, "error")
    return JsonReply(await while_there(request, talk.whole()))


def _failed(error: ApiError) -> dict[str, Any]:
    """Before the stream an ordinary error, in it an event; each reads its own fields."""
    event = {"type": "error", "message": error.message, "code": error.code, "param": error.param}
    return error.openai() | event


class _OutputItems(Blocks):
    """The answer's items, as they are at any moment, and events that tell of them."""

    def __init__(self) -> None:
        super().__init__()
        self.items: list[dict[str, Any]] = []
        self.logprobs: list[dict[str, Any]] = []  # of the open message's tokens, not yet told
        self._kind = "text"
        self._is_cut = False

    def finish_by(self, end: Ended | None) -> list[Event]:
        """The answer is over; what was open then may have been cut off. A call was not, if its
        arguments are whole."""
        self._is_cut = end is not None and end.reason == "length"
        if self._kind == "call" and self.items:
            self._is_cut &= not _is_json(self.items[-1]["arguments"])
        return self.finish()

    def begin(self, part: Part) -> list[Event]:
        self._kind = kind_of(part)
        item: dict[str, Any] = {"status": "in_progress"}
        if isinstance(part, Call):
            item |= {"type": "function_call", "id": _new_id("fc"), "call_id": part.id}
            item |= {"name": part.name, "arguments": ""}
        elif self._kind == "text":
            item |= {"type": "message", "id": _new_id("msg"), "role": "assistant", "content": []}
        else:
            item |= {"type": "reasoning", "id": _new_id("rs"), "summary": [], "content": []}
        self.items.append(item)
        told = [self._of_item("response.output_item.added", item=_copy(item))]
        if self._kind != "call":
            item["content"].append(_part(self._kind))
            told.append(self._of_part("response.content_part.added", part=_part(self._kind)))
        return told

    def more(self, text: str) -> list[Event]:
        item = self.items[-1]
        if self._kind == "call":
            item["arguments"] += text
            name = "response.function_call_arguments.delta"
            return [self._of_item(name, delta=text, item_id=item["id"])]
        item["content"][0]["text"] += text
        if self._kind == "reasoning":
            return [self._of_part("response.reasoning_text.delta", delta=text)]
        logprobs, self.logprobs = self.logprobs, []
        item["content"][0]["logprobs"] += logprobs
        return [self._of_part("response.output_text.delta", delta=text, logprobs=logprobs)]

    def end(self) -> list[Event]:
        item = self.items[-1]
        item["status"] = "incomplete" if self._is_cut else "completed"
        if self._kind == "call":
            name = "response.function_call_arguments.done"
            whole = {"arguments": item["arguments"], "name": item["name"], "item_id": item["id"]}
            return [self._of_item(name, **whole), self._done(item)]
        part = item["content"][0]
        if self._kind == "reasoning":
            told = self._of_part("response.reasoning_text.done", text=part["text"])
        else:
            more = {"text": part["text"], "logprobs": part["logprobs"]}
            told = self._of_part("response.output_text.done", **more)
        ended = self._of_part("response.content_part.done", part=dict(part))
        return [told, ended, self._done(item)]

    def _done(self, item: dict[str, Any]) -> Event:
        return self._of_item("response.output_item.done", item=_copy(item))

    def _of_item(self, kind: str, **fields: Any) -> Event:
        return {"type": kind, "output_index": len(self.items) - 1, **fields}

    def _of_part(self, kind: str, **fields: Any) -> Event:
        return self._of_item(kind, item_id=self.items[-1]["id"], content_index=0, **fields)


class _Response:
    """One exchange as a response."""

    def __init__(self, service: Service, body: ResponseBody, exchange: Exchange) -> None:
        self._service = service
        self._body = body
        self._exchange = exchange
        self._items = _OutputItems()
        self._created = time.time()
        self._sequence = 0

    async def whole(self) -> dict[str, Any]:
        end: Ended | None = None
        async for updates in self._exchange.updates(self._service.config.request_timeout_s):
            for update in updates:
                self._items.logprobs += map(self._service.logprob, update.logprobs)
                for part in update.parts:
                    self._items.add(part)
                end = update.ended or end
        self._items.finish_by(end)
        return self._document(end)

    async def frames(self) -> AsyncIterator[bytes]:
        end: Ended | None = None
        has_begun = False
        async for updates in self._exchange.updates(self._service.config.request_timeout_s):
            if not has_begun:
                has_begun = True
                for name in ("response.created", "response.in_progress"):
                    yield self._frame({"type": name, "response": self._document(None)})
            if not updates:
                yield waiting_comment(self._exchange)
            for update in updates:
                self._items.logprobs += map(self._service.logprob, update.logprobs)
                for part in update.parts:
                    for event in self._items.add(part):
                        yield self._frame(event)
                end = update.ended or end
        for event in self._items.finish_by(end):
            yield self._frame(event)
        document = self._document(end)
        yield self._frame({"type": f"response.{document['status']}", "response": document})

    def _frame(self, event: Event) -> bytes:
        self._sequence += 1
        return data_frame(event | {"sequence_number": self._sequence - 1}, event["type"])

    def _document(self, end: Ended | None) -> dict[str, Any]:
        body, job = self._body, self._exchange.job
        status = "in_progress" if end is None else "completed"
        reason = None
        if end is not None and end.reason == "length":
            status, reason = "incomplete", {"reason": "max_output_tokens"}
        usage = {
            "input_tokens": job.num_prompt,
            "input_tokens_details": {"cached_tokens": job.num_reused, "cache_write_tokens": 0},
            "output_tokens": job.num_new,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": job.num_prompt + job.num_new,
        }
        return {
            "id": job.id,
            "object": "response",
            "created_at": self._created,
            "status": status,
            "error": None,
            "incomplete_details": reason,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "model": self._service.name,
            "output": [_copy(item) for item in self._items.items],
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "temperature": body.temperature,
            "top_p": body.top_p,
            "tool_choice": _shown(body.tool_choice) or "auto",
            "tools": [{"strict": None} | _shown(tool) for tool in body.tools or []],
            "text": _shown(body.text) or {"format": {"type": "text"}},
            "reasoning": _shown(body.reasoning),
            "store": False,
            "metadata": body.metadata or {},
            "usage": None if end is None else usage,
        }


def _shown(value: Any) -> Any:
    return (
        value.model_dump(by_alias=True, exclude_unset=True)
        if hasattr(value, "model_dump")
        else value
    )


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True


def _part(kind: str) -> dict[str, Any]:
    if kind == "reasoning":
        return {"type": "reasoning_text", "text": ""}
    return {"type": "output_text", "text": "", "annotations": [], "logprobs": []}


def _copy(item: dict[str, Any]) -> dict[str, Any]:
    """As it is now: what is told may be read after the item went on."""
    if "content" in item:
        return item | {"content": [dict(part) for part in item["content"]]}
    return dict(item)


def _new_id(prefix: str) -> str:
    return f"{prefix}_{uuid.uuid4().hex[:24]}"
