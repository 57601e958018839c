"""Who is let in, how large and how slow a request may be; bytes no client library would send."""

import asyncio
import contextlib
import json
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from openai import AuthenticationError, OpenAI
from starlette.types import Message, Receive, Scope, Send

from moe_infinity import MoE
from moe_infinity.server import running as running_module
from moe_infinity.server.guard import Guard
from moe_infinity.server.problems import ApiError
from moe_infinity.server.settings import ServeConfig
from support.serving import Local, Server, request_bytes, running, wait_for

BODY = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 1}
CHAT = "/v1/chat/completions"


@pytest.fixture(scope="module")
def strict(moe: MoE) -> Iterator[Local]:
    """Two keys, one page elsewhere, small and quick bodies."""
    settings = {"api_keys": ("key-1", "key-2"), "origins": ("https://a.example",)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(running_module, "_HEADERS_S", 0.2)
        with running(
            lambda: Local(moe, body_timeout_s=0.2, max_body_bytes=100_000, **settings)
        ) as local:
            yield local


def read_until(sock: Any, end: bytes) -> bytes:
    found = b""
    while not found.endswith(end):
        found += sock.recv(65536)
    return found


class TestKeys:
    @pytest.mark.parametrize(
        "headers",
        [
            {"authorization": "Bearer key-1"},
            {"authorization": "bearer  key-2"},
            {"x-api-key": "key-2"},
        ],
    )
    def test_that_open(self, strict: Local, headers: Any) -> None:
        assert strict.post(CHAT, BODY, **headers).status == 200

    @pytest.mark.parametrize(
        "headers",
        [
            {},
            {"authorization": "Bearer key-3"},
            {"authorization": "Bearer "},
            {"authorization": "Basic key-1"},
            {"authorization": "key-1"},
            {"x-api-key": "key-1 x"},
            {"x-api-key": "k\xe9y"},
            {"authorization": "Bearer key-12"},
        ],
    )
    def test_that_do_not(self, strict: Local, headers: Any) -> None:
        for path in (CHAT, "/v1/models", "/v1/stats", "/metrics", "/openapi.json", "/nowhere"):
            reply = strict.ask("GET", path, None, headers)
            assert reply.status == 401 and reply.headers["www-authenticate"] == "Bearer"
            assert reply.error["code"] == "invalid_api_key"
            assert reply.error["type"] == "authentication_error"
        reply = strict.post("/v1/messages", {}, **headers)
        assert reply.json["error"]["type"] == "authentication_error"

    def test_what_is_open(self, strict: Local) -> None:
        assert strict.get("/health").status == strict.get("/").status == 200

    def test_the_client_says_so(self, strict: Local) -> None:
        with OpenAI(base_url=f"{strict.url}/v1", api_key="wrong", max_retries=0) as client:
            with pytest.raises(AuthenticationError):
                client.models.list()
            assert client.with_options(api_key="key-1").models.list().data

    def test_any_name_will_do_with_a_key(self, strict: Local) -> None:
        headers = {"host": "evil.example", "x-api-key": "key-1"}
        assert strict.ask("GET", "/v1/models", None, headers).status == 200


class TestHosts:
    @pytest.mark.parametrize(
        "host", ["localhost", "LOCALHOST:80", "127.0.0.1:1", "[::1]:8000", "localhost:x"]
    )
    def test_names_of_this_machine(self, server: Server, host: str) -> None:
        assert server.ask("GET", "/v1/models", None, {"host": host}).status == 200

    @pytest.mark.parametrize(
        "host",
        ["evil.example", "", "10.0.0.1", "localhost.evil.example", "[", "[::1", "a@localhost@b"],
    )
    def test_other_names(self, server: Server, host: str) -> None:
        reply = server.ask("GET", "/health", None, {"host": host})
        assert reply.status == 403 and reply.error["code"] == "wrong_host"

    def test_pages_elsewhere(self, server: Server) -> None:
        own = server.url.removeprefix("http://")
        assert server.ask("GET", "/", None, {"host": own, "origin": f"http://{own}"}).status == 200
        for origin in ("https://evil.example", "null", "http://[", "", f"http://{own}.evil"):
            reply = server.ask("POST", CHAT, b"{}", {"host": own, "origin": origin})
            assert reply.status == 403 and reply.error["code"] == "wrong_origin"

    def test_a_page_that_may(self, strict: Local) -> None:
        headers = {"origin": "https://a.example", "x-api-key": "key-1"}
        reply = strict.ask("GET", "/v1/models", None, headers)
        assert reply.status == 200
        assert reply.headers["access-control-allow-origin"] == "https://a.example"
        asked = {
            "origin": "https://a.example",
            "access-control-request-method": "POST",
            "access-control-request-headers": "authorization",
        }
        assert strict.ask("OPTIONS", CHAT, None, asked).status == 200
        assert (
            strict.ask("OPTIONS", CHAT, None, asked | {"origin": "https://b.example"}).status == 400
        )

    def test_a_page_that_may_reads_why_it_is_refused(self, strict: Local) -> None:
        headers = {"origin": "https://a.example", "x-api-key": "wrong"}
        large = {"content-length": str(10**9)}
        for more, status in ((headers, 401), (headers | {"x-api-key": "key-1"} | large, 413)):
            reply = strict.ask("POST", CHAT, None, more)
            assert reply.status == status
            assert reply.headers["access-control-allow-origin"] == "https://a.example"


class TestBodies:
    def test_a_claim_of_a_gigabyte(self, server: Server) -> None:
        """Is refused before a byte of it comes."""
        head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {1024**3}\r\n\r\n"
        with server.connect() as sock:
            sock.sendall(head.encode())
            reply = read_until(sock, b"}}")
        assert reply.startswith(b"HTTP/1.1 413 ") and b"body_too_large" in reply

    @pytest.mark.parametrize("length", ["-1", "x", "1e3", "99999999999999999999", "\u0661"])
    def test_a_length_that_is_no_number(self, strict: Local, length: str) -> None:
        head = f"POST {CHAT} HTTP/1.1\r\nHost: a\r\nx-api-key: key-1\r\nContent-Length: {length}"
        reply = strict.send(head.encode() + b"\r\nConnection: close\r\n\r\n")
        assert reply.split(b" ")[1] in (b"400", b"413")

    def test_more_than_is_let_in_piece_by_piece(self, strict: Local) -> None:
        """The connection is not kept open for the rest, however long somebody sends."""
        head = f"POST {CHAT} HTTP/1.1\r\nHost: a\r\nx-api-key: key-1\r\n"
        with strict.connect() as sock:
            sock.sendall(head.encode() + b"Transfer-Encoding: chunked\r\n\r\n")
            piece = b"4000\r\n" + b" " * 0x4000 + b"\r\n"
            for _ in range(10):
                sock.sendall(piece)
            seen = sock.recv(65536)
            assert seen.startswith(b"HTTP/1.1 413 ")
            assert wait_for(lambda: _is_refused(sock, piece))

    def test_one_that_does_not_come(self, strict: Local) -> None:
        head = f"POST {CHAT} HTTP/1.1\r\nHost: a\r\nx-api-key: key-1\r\nContent-Length: 10\r\n\r\n"
        with strict.connect() as sock:
            sock.sendall(head.encode() + b"{")
            reply = read_until(sock, b"}}")
        assert reply.startswith(b"HTTP/1.1 408 ") and b"timeout_error" in reply

    def test_headers_that_do_not_come(self, strict: Local) -> None:
        assert strict.send(b"POST / HTTP/1.1\r\nHost: a\r\nX-Slow: ") == b""
        assert strict.send(b"") == b""
        wait_for(lambda: strict.num_connections == 0)

    def test_headers_drop_by_drop(self, strict: Local) -> None:
        """Some bytes now and then do not keep a connection either."""
        with strict.connect() as sock:
            is_over = threading.Event()

            def drip() -> None:
                try:
                    while not is_over.wait(0.02):
                        sock.sendall(b"x")
                except OSError:
                    pass

            thread = threading.Thread(target=drip)
            thread.start()
            try:
                assert sock.recv(10) == b""
            except ConnectionResetError:
                pass
            finally:
                is_over.set()
                thread.join()

    def test_headers_without_end(self, strict: Local) -> None:
        with strict.connect() as sock:
            try:
                sock.sendall(b"GET / HTTP/1.1\r\nX: " + b"a" * 300_000)
                seen = sock.recv(65536)
            except OSError:
                return
        assert seen == b"" or seen.startswith(b"HTTP/1.1 400 ")

    @pytest.mark.parametrize(
        "raw",
        [
            b"nonsense\r\n\r\n",
            b"\x16\x03\x01\x02\x00\x01\x00",
            b"POST / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
            b"POST /v1/models HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\nZZ\r\n",
        ],
    )
    def test_what_is_no_http(self, strict: Local, raw: bytes) -> None:
        with strict.connect() as sock:
            sock.sendall(raw)
            sock.settimeout(10)
            assert sock.recv(65536)[:13] in (b"HTTP/1.1 400 ", b"HTTP/1.1 401 ", b"")
        assert strict.get("/health").status == 200


def _is_refused(sock: Any, piece: bytes) -> bool:
    try:
        sock.sendall(piece)
    except OSError:
        return True
    return False


class TestBadInput:
    """Against the process itself; its log stays clean."""

    @pytest.mark.parametrize(
        "raw",
        [
            b"",
            b"{",
            b'{"messages": "\xff"}',
            b'{"messages": [{"role": "user", "content": "\\ud83d"}]}',
            b"[" * 50_000,
            b'{"messages": [' + b"{}," * 300_000 + b"{}]}",
            b"5",
        ],
    )
    def test_every_endpoint_says_400(self, server: Server, raw: bytes) -> None:
        for path in (CHAT, "/v1/completions", "/v1/responses"):
            reply = server.post(path, raw)
            assert reply.status == 400 and reply.error["type"] == "invalid_request_error"
        for path in ("/v1/messages", "/v1/messages/count_tokens"):
            reply = server.post(path, raw)
            assert reply.status == 400 and reply.json["type"] == "error"

    def test_deep_nesting_where_anything_goes(self, server: Server) -> None:
        deep: Any = {"type": "object"}
        for _ in range(60):
            deep = {"type": "object", "properties": {"a": deep}}
        tool = {"type": "function", "function": {"name": "f", "parameters": deep}}
        body = BODY | {"tools": [tool], "tool_choice": "required"}
        assert server.post(CHAT, body).status in (200, 400)
        body = BODY | {"chat_template_kwargs": {"a": deep}, "metadata": deep}
        assert server.post(CHAT, body).status == 200

    @pytest.mark.parametrize(
        "content", ["\x00", "\U0010ffff", "<|endoftext|>", "{{ 1/0 }}", " " * 900]
    )
    def test_odd_texts(self, server: Server, content: str) -> None:
        body = BODY | {"messages": [{"role": "user", "content": content}]}
        assert server.post(CHAT, body).status == 200

    @pytest.mark.parametrize(
        ("method", "path", "status"),
        [
            ("GET", CHAT, 405),
            ("PUT", "/v1/models", 405),
            ("GET", "/v1/nothing", 404),
            ("GET", "/v1/models/nothing", 404),
            ("GET", "/v1/models/%ff%00", 404),
            ("GET", "/../../etc/passwd", 404),
            ("DELETE", "/", 405),
        ],
    )
    def test_paths_and_methods(self, server: Server, method: str, path: str, status: int) -> None:
        reply = server.ask(method, path, None, {})
        assert reply.status == status and reply.error["message"]

    def test_connections_that_end_anywhere(self, server: Server) -> None:
        raw = request_bytes(CHAT, json.dumps(BODY | {"stream": True}).encode())
        for length in range(0, len(raw) + 1, 23):
            with server.connect() as sock:
                sock.sendall(raw[:length])
        assert server.post(CHAT, BODY).status == 200


def is_closed_to(local: Local) -> bool:
    try:
        return local.get("/health").status != 200
    except ConnectionError:
        return True


def test_connections_have_a_limit(moe: MoE, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(running_module, "_MAX_CONNECTIONS", 8)
    with running(lambda: Local(moe)) as local:
        with contextlib.ExitStack() as held:
            before = [held.enter_context(local.connect()) for _ in range(8)]
            wait_for(lambda: is_closed_to(local))
            before[0].sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert before[0].recv(100).startswith(b"HTTP/1.1 200")
        wait_for(lambda: not is_closed_to(local))


def test_bodies_of_those_who_wait_have_a_limit_together() -> None:
    """Eight of the largest size; what an answered one held is free again."""

    async def ask(guard: Guard, leave: asyncio.Event | None = None) -> int:
        sent: list[Message] = []

        async def receive() -> Message:
            return {"type": "http.request", "body": b"x" * 100, "more_body": False}

        async def send(message: Message) -> None:
            sent.append(message)

        headers = [(b"host", b"localhost")]
        scope = {"type": "http", "method": "POST", "path": "/v1/x", "headers": headers}
        await guard(scope | {"leave": leave}, receive, send)
        return int(sent[0]["status"])

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await receive()
            if scope["leave"]:
                await scope["leave"].wait()
            status = 200
        except ApiError as error:
            status = error.status
        await send({"type": "http.response.start", "status": status, "headers": []})

    async def all_of_it() -> None:
        guard, leave = Guard(app, ServeConfig(), max_body_bytes=100), asyncio.Event()
        waiting = [asyncio.ensure_future(ask(guard, leave)) for _ in range(8)]
        while guard._held_bytes < 800:
            await asyncio.sleep(0)
        assert await ask(guard) == 503
        leave.set()
        assert await asyncio.gather(*waiting) == [200] * 8
        assert await ask(guard) == 200 and guard._held_bytes == 0

    asyncio.run(all_of_it())
