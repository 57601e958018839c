"""Answers on the wire: streams of events, or one JSON document, and clients that go away."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from moe_infinity.server.problems import ApiError

T = TypeVar("T")
ErrorBody = Callable[[ApiError], dict[str, Any]]
_HEADERS = {"cache-control": "no-cache", "x-accel-buffering": "no"}


class ClientGone(Exception):
    """Nobody is there to read the answer."""


def data_frame(value: Any, event: str | None = None) -> bytes:
    """One server-sent event."""
    name = "" if event is None else f"event: {event}\n"
    return f"{name}data: {json.dumps(value, ensure_ascii=False)}\n\n".encode(errors="replace")


def comment(text: str) -> bytes:
    """A line that clients skip, so that a connection is not taken for dead."""
    return f": {text}\n\n".encode()


class JsonReply(JSONResponse):
    """What a model says may decode to half of a surrogate pair, which no UTF-8 can tell."""

    def render(self, content: Any) -> bytes:
        text = json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
        return text.encode(errors="replace")


def error_response(error: ApiError, body: dict[str, Any]) -> JsonReply:
    return JsonReply(body, error.status, headers=error.headers)


class EventStream(Response):
    """Frames as they come. What fails before the first one is answered with its status.

    A client that goes away ends the frames, wherever they wait.
    """

    media_type = "text/event-stream"

    def __init__(
        self, frames: AsyncIterator[bytes], error_body: ErrorBody, error_event: str | None = None
    ) -> None:
        """error_event: the name under which what fails later is sent."""
        self.background = None
        self._frames = frames
        self._error_body = error_body
        self._error_event = error_event

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        sending = asyncio.ensure_future(self._send_all(scope, receive, send))
        await _first_of(sending, _gone(receive))

    async def _send_all(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with contextlib.aclosing(self._frames) as frames:  # type: ignore[type-var]
            try:
                first = await anext(frames)
            except ApiError as error:
                await error_response(error, self._error_body(error))(scope, receive, send)
                return
            await send(_start())
            await send(_body(first))
            try:
                async for frame in frames:
                    await send(_body(frame))
            except ApiError as error:
                await send(_body(data_frame(self._error_body(error), self._error_event)))
            await send({"type": "http.response.body", "body": b"", "more_body": False})


async def while_there(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """What the work comes to. Raises ClientGone, and cancels it, if the client goes before."""
    task = asyncio.ensure_future(work)
    if not await _first_of(task, _gone(request.receive)):
        raise ClientGone
    return task.result()


async def _first_of(work: asyncio.Future[Any], gone: Coroutine[Any, Any, None]) -> bool:
    """Whether the work was over before the client was gone; then the other one is ended."""
    watching = asyncio.ensure_future(gone)
    try:
        await asyncio.wait((work, watching), return_when=asyncio.FIRST_COMPLETED)
        is_done = work.done()
    finally:
        for task in (work, watching):
            if not task.done():
                task.cancel()
        await asyncio.gather(work, watching, return_exceptions=True)
    if is_done:
        work.result()
    return is_done


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _start() -> dict[str, Any]:
    headers = {"content-type": "text/event-stream; charset=utf-8"} | _HEADERS
    raw = [(name.encode(), value.encode()) for name, value in headers.items()]
    return {"type": "http.response.start", "status": 200, "headers": raw}


def _body(frame: bytes) -> dict[str, Any]:
    return {"type": "http.response.body", "body": frame, "more_body": True}
