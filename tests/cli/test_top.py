"""``moe-infinity top`` against servers that are ours, are not, or are not there."""

import io
import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from moe_infinity.cli import top
from moe_infinity.cli.app import build_app
from moe_infinity.cli.top_screen import Frame, rates
from moe_infinity.errors import ConfigError
from support import command_line
from support.mock_stats import EXPERT_BYTES, FakeEngine

KEY = "a-key"


@contextmanager
def answering(body: bytes, *, status: int = 200, key: str | None = None) -> Iterator[str]:
    """A server that has one answer; with a key, only for those who have it."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            is_known = key is None or self.headers["Authorization"] == f"Bearer {key}"
            self.send_response(status if is_known else 401)
            if status in (301, 302):
                self.send_header("Location", "http://127.0.0.1:9/v1/stats")
            self.end_headers()
            self.wfile.write(body if self.path == "/v1/stats" and is_known else b"{}")

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


def engine_at_work(num_layers: int = 8, num_experts: int = 32, **options: Any) -> FakeEngine:
    engine = FakeEngine(num_layers, num_experts, **options)
    engine.begin(100, reused_tokens=20)
    engine.read_prompt(80, 0.2)
    for _ in range(5):
        engine.step()
    return engine


def encoded(engine: FakeEngine) -> bytes:
    return json.dumps(engine.stats()).encode()


def drawn(frame: Frame, width: int = 100, height: int = 40, **options: Any) -> str:
    buffer = io.StringIO()
    options = {"force_terminal": True, "color_system": None} | options
    console = Console(file=buffer, width=width, height=height, highlight=False, **options)
    console.print(frame, end="")
    return buffer.getvalue()


def unused_url() -> str:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{taken.getsockname()[1]}"


def test_one_look_names_what_there_is() -> None:
    with answering(encoded(engine_at_work())) as url:
        result = command_line.run("top", url, "--once")
    assert result.code == 0, result.both
    for words in ("mock-8x32", "5 tokens", "hit rate", "6.74 GiB of 8.00 GiB", "next_use"):
        assert words in result.out


def test_json_is_what_the_server_said() -> None:
    engine = engine_at_work()
    with answering(encoded(engine)) as url:
        result = command_line.run("top", url.removeprefix("http://"), "--json")
    assert (result.code, json.loads(result.out)) == (0, engine.stats())


def test_the_key_is_asked_for() -> None:
    with answering(encoded(engine_at_work()), key=KEY) as url:
        assert "MOE_INFINITY_API_KEY" in command_line.refused("top", url, "--once")
        assert "wrong key" in command_line.refused("top", url, "--api-key", "other")
        assert command_line.run("top", url, "--once", "--api-key", KEY).code == 0
        environment = {"MOE_INFINITY_API_KEY": KEY}
        assert (
            CliRunner().invoke(build_app(), ["top", url, "--once"], env=environment).exit_code == 0
        )


def test_nothing_listens() -> None:
    message = command_line.refused("top", unused_url(), "--once")
    assert "no connection" in message
    assert "moe-infinity serve" in message


@pytest.mark.parametrize(
    ("body", "status", "expected"),
    [
        (b"<html>", 200, "no JSON"),
        (b"\xff\xfe", 200, "no JSON"),
        (b"[1, 2]", 200, "no statistics of ours"),
        (b'{"object": "list"}', 200, "no statistics of ours"),
        (b'{"version": 2}', 200, "version 2"),
        (b'{"version": 1, "model": "x"}', 200, "without"),
        (b"{}", 404, "HTTP 404"),
        (b"{}", 503, "HTTP 503"),
        (b"{}", 302, "HTTP 302"),  # a key does not follow
    ],
)
def test_another_server(body: bytes, status: int, expected: str) -> None:
    with answering(body, status=status) as url, pytest.raises(ConfigError, match=expected):
        top.Server(url, KEY).stats()


def test_no_http_at_all() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer() -> None:
            connection, _ = server.accept()
            with connection:
                connection.recv(1000)
                connection.sendall(b"SSH-2.0-something\r\n")

        thread = threading.Thread(target=answer)
        thread.start()
        with pytest.raises(ConfigError, match="no HTTP"):
            top.Server(f"127.0.0.1:{server.getsockname()[1]}").stats()
        thread.join()


@pytest.mark.parametrize(
    "url", ["file:///etc/hosts", "http://", "http://a:b", "http://a b", "ftp://a"]
)
def test_what_is_no_address(url: str) -> None:
    with pytest.raises(ConfigError, match="URL: got"):
        top.Server(url)


def test_a_key_that_is_no_header() -> None:
    with pytest.raises(ConfigError, match="--api-key"):
        top.Server("http://127.0.0.1:8000", "a\nb")


def test_watching_ends_with_ctrl_c_and_outlives_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, looks = engine_at_work(), []
    server = top.Server(unused_url())

    def sleep(_: float) -> None:
        looks.append(console.file.getvalue())
        console.file.truncate(0)
        if len(looks) == 3:
            raise KeyboardInterrupt
        if len(looks) == 2:
            monkeypatch.undo()  # from now on nothing answers
            monkeypatch.setattr(top.time, "sleep", sleep)
        engine.step()

    monkeypatch.setattr(top.time, "sleep", sleep)
    monkeypatch.setattr(server, "stats", engine.stats)
    console = Console(
        file=io.StringIO(), force_terminal=True, width=100, height=40, color_system=None
    )
    top._watch(console, server, engine.stats(), 1.0)
    assert "Ctrl-C ends" in looks[0]
    assert "33.3 /s" in looks[1]
    assert "no connection" in looks[2]


def test_rates_are_of_the_time_between() -> None:
    engine = engine_at_work()
    before = engine.stats()
    engine.step(0.5)
    now = engine.stats()
    decode, earlier = now["totals"]["decode"], before["totals"]["decode"]
    found = rates(before, now)
    misses = decode["misses"] - earlier["misses"]
    hits = decode["hits"] - earlier["hits"]
    assert found["tokens"] == pytest.approx(2.0)
    assert found["read"] == pytest.approx(misses * EXPERT_BYTES / 0.5)
    assert found["hits"] == pytest.approx(hits / (hits + misses))
    assert rates(now, before) == {}  # the server began anew
    assert rates(now, now) == {}


@pytest.mark.parametrize("shape", [(8, 32), (48, 128), (94, 160)])
@pytest.mark.parametrize("size", [(40, 12), (80, 24), (140, 50)])
@pytest.mark.parametrize("colours", [None, "truecolor"])
def test_it_fits(shape: tuple[int, int], size: tuple[int, int], colours: str | None) -> None:
    engine = engine_at_work(*shape, device=True)
    engine.faults.append("prefetch failed: the disk was slow")
    text = drawn(Frame(engine.stats(), "http://x", height=size[1]), *size, color_system=colours)
    lines = Console(width=1000).render_str(text).plain.split("\n") if colours is None else []
    assert all(len(line) <= size[0] for line in lines)
    if size[1] > 20:
        assert text.count("\n") < size[1]
        assert "the disk was slow" in text


def test_the_map_tells_tiers_apart_without_colours() -> None:
    stats = FakeEngine(2, 8, device=True).stats()
    stats["experts"] |= {"tiers": ["01201201", "0120"], "uses": ["00000000", "9999"]}
    text = drawn(Frame(stats, "http://x"))
    assert "·▒█·▒█·▒\n" in text
    assert "·▒█·    \n" in text


def test_a_look_without_the_map_and_with_a_strange_name() -> None:
    stats = engine_at_work().stats(with_map=False) | {"model": "a\x1b[31mb\nc"}
    text = drawn(Frame(stats, "http://x"))
    assert text.startswith("a [31mb c")


def test_a_prompt_shows_how_far_it_is() -> None:
    engine = FakeEngine()
    engine.begin(100, reused_tokens=20)
    text = drawn(Frame(engine.stats(), "http://x"))
    assert "20 of 100 tokens" in text
    assert "● prompt" in text
