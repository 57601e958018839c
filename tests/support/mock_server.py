"""A server without a model: the page, moving statistics and a made-up answer, token by token.

``python -m support.mock_server --shape 48x128`` (in ``tests``) serves it to look at. A message that
says "mid-error" fails in mid-answer, "refuse" is refused, "long" is answered at length, and "hold"
waits in its prompt until ``app.state.go`` is set.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, Response, StreamingResponse

import moe_infinity
from support.mock_stats import FakeEngine

PAGE = Path(moe_infinity.__file__).parent / "server" / "page" / "index.html"
CSP = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
    "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'"
)
REASONING = "The question is short. A direct answer with one example will do. "
ANSWER = """A mixture of experts replaces one large feed-forward layer by **many small ones** and
a *router* that picks `top_k` of them for every token.

```python
def route(logits, top_k):
    chosen = sorted(range(len(logits)), key=lambda i: -logits[i])
    return chosen[:top_k]
```

So most weights rest while a token is computed: <b>they need not be in memory</b>.
"""
LONG = "One expert after another is called for, and the cache keeps what comes back. "


def build_app(engine: FakeEngine, *, key: str | None = None, token_s: float = 0.01) -> FastAPI:
    """``stopped`` in the app's state counts answers whose reader went away."""
    app = FastAPI()
    app.state.stopped = 0
    app.state.go = threading.Event()

    @app.middleware("http")
    async def require_key(request: Request, call_next: Any) -> Response:
        given = request.headers.get("authorization")
        if key and request.url.path not in ("/", "/health") and given != f"Bearer {key}":
            return _refusal(401, "no or a wrong API key", "invalid_api_key")
        answer: Response = await call_next(request)
        return answer

    @app.get("/")
    def page() -> HTMLResponse:
        return HTMLResponse(PAGE.read_text(), headers={"Content-Security-Policy": CSP})

    @app.get("/v1/stats")
    def stats(map: bool = True) -> dict[str, Any]:
        if engine.state == "idle":
            engine.uptime_s += 0.5
        return engine.stats(map)

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        text = str((await request.json())["messages"][-1]["content"])
        if "refuse" in text:
            return _refusal(400, "messages: got 'refuse', expected something else", "bad")
        return StreamingResponse(
            _answer(app, engine, text, token_s), media_type="text/event-stream"
        )

    return app


def _refusal(status: int, message: str, code: str) -> JSONResponse:
    error = {"message": message, "type": "invalid_request_error", "param": None, "code": code}
    return JSONResponse({"error": error}, status)


async def _answer(
    app: FastAPI, engine: FakeEngine, text: str, token_s: float
) -> AsyncIterator[str]:
    prompt, finish = 120, "cancelled"
    engine.begin(prompt, reused_tokens=20)
    try:
        yield ": waiting\n\n"
        for done in range(20, prompt + 1, 20):
            if done > 20:
                engine.read_prompt(20, 0.08)
            progress = {"total": prompt, "cached": 20, "processed": done, "time_ms": 1}
            yield _event({"choices": [{"delta": {}}], "prompt_progress": progress})
            await asyncio.sleep(3 * token_s)
            while "hold" in text and done == 60 and not app.state.go.is_set():
                await asyncio.sleep(0.01)
        for num, delta in enumerate(_deltas(text)):
            engine.step()
            yield _event({"choices": [{"index": 0, "delta": delta, "finish_reason": None}]})
            await asyncio.sleep(token_s)
            if "mid-error" in text and num == 20:
                yield _event({"error": {"message": "the disk failed", "type": "server_error"}})
                return
        finish = "stop"
        yield _event({"choices": [{"index": 0, "delta": {}, "finish_reason": finish}]})
        usage = {"prompt_tokens": prompt, "completion_tokens": num + 1}
        yield _event({"choices": [], "usage": usage})
        yield "data: [DONE]\n\n"
    finally:
        app.state.stopped += finish == "cancelled"
        engine.end(finish)


def _deltas(text: str) -> Iterator[dict[str, str]]:
    yield {"role": "assistant", "content": ""}
    for word in REASONING.split(" "):
        yield {"reasoning_content": word + " "}
    for word in (LONG * 60 if "long" in text else ANSWER).split(" "):
        yield {"content": word + " "}


def _event(chunk: dict[str, Any]) -> str:
    return f"data: {json.dumps(chunk)}\n\n"


@contextmanager
def served(app: FastAPI) -> Iterator[str]:
    """Its address, while a thread serves it."""
    config = uvicorn.Config(app, port=0, log_level="error", lifespan="off", ws="none")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        while not server.started:
            thread.join(0.01)
            assert thread.is_alive(), "the server ended at once"
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = server.force_exit = True
        thread.join(10)


def _main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", default="8x32", help="layers x experts")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--key")
    parser.add_argument("--device", action="store_true")
    parser.add_argument("--token-s", type=float, default=0.03)
    given = parser.parse_args()
    num_layers, num_experts = map(int, given.shape.split("x"))
    engine = FakeEngine(num_layers, num_experts, device=given.device)
    app = build_app(engine, key=given.key, token_s=given.token_s)
    uvicorn.run(app, port=given.port, log_level="warning")


if __name__ == "__main__":
    _main()
