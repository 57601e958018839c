"""Servers to ask: one in a process of its own, and one in a thread, whose inside can be seen."""

import http.client
import json
import os
import re
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from moe_infinity import MoE
from support.command_line import Process

PATIENCE_S = 60
SMALL = ("--port", 0, "--ram-slots", 64, "--max-context", 512, "--dtype", "float32")


@dataclass(frozen=True)
class Reply:
    """What came back over HTTP. headers: names in small letters."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> dict[str, Any]:
        """OpenAI's form of an error, complete."""
        found = self.json["error"]
        assert found.keys() == {"message", "type", "param", "code"}, found
        return found


class Asked:
    """Whatever listens at a URL."""

    url: str

    @property
    def address(self) -> tuple[str, int]:
        host, _, port = self.url.removeprefix("http://").rpartition(":")
        return host, int(port)

    def get(self, path: str, **headers: str) -> Reply:
        return self.ask("GET", path, None, headers)

    def post(self, path: str, body: Any, **headers: str) -> Reply:
        """body: bytes as they are, anything else as JSON."""
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        return self.ask("POST", path, raw, {"content-type": "application/json"} | headers)

    def ask(self, method: str, path: str, body: bytes | None, headers: dict[str, str]) -> Reply:
        connection = http.client.HTTPConnection(*self.address, timeout=PATIENCE_S)
        try:
            connection.request(method, path, body, headers)
            response = connection.getresponse()
            found = {name.lower(): value for name, value in response.getheaders()}
            return Reply(response.status, found, response.read())
        finally:
            connection.close()

    def connect(self) -> socket.socket:
        return socket.create_connection(self.address, timeout=PATIENCE_S)

    def send(self, raw: bytes) -> bytes:
        """Raw bytes, and all that comes until the server closes or says enough."""
        with self.connect() as sock:
            sock.sendall(raw)
            return _read_all(sock)

    def begin_stream(self, path: str, body: dict[str, Any]) -> socket.socket:
        """A request whose answer has begun to come; close it to vanish."""
        sock = self.connect()
        sock.sendall(request_bytes(path, body | {"stream": True}))
        wait_for(lambda: b"data:" in sock.recv(65536))
        return sock


class Server(Asked):
    """``moe-infinity serve`` in a process of its own."""

    def __init__(self, *options: object) -> None:
        self._folder = tempfile.TemporaryDirectory()
        self._errors = Path(self._folder.name, "stderr")
        out = Path(self._folder.name, "stdout")
        self._process = Process(
            ("serve", *options),
            stdin="/dev/null",
            stdout=str(out),
            stderr=str(self._errors),
            seconds=900,
        )
        self.pid = self._process.number
        self.url = str(wait_for(self._announced))

    @property
    def log(self) -> str:
        return self._errors.read_text() if self._errors.exists() else ""

    def _announced(self) -> str | None:
        found = re.search(r" at (http://\S+): live view", self.log)
        if found is None and not _is_alive(self.pid):
            raise AssertionError(self.log)
        return found and found[1]

    def signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def wait(self) -> tuple[int, str]:
        """Its exit code and all it has said; it leaves no process behind."""
        code, left_running = self._process.wait()
        assert not left_running
        log = self.log
        self._folder.cleanup()
        return code, log

    def stop(self) -> tuple[int, str]:
        self.signal(signal.SIGTERM)
        return self.wait()


class Local(Asked):
    """A server in a thread of this process over an opened model, which it does not close."""

    def __init__(self, moe: MoE, **settings: Any) -> None:
        from moe_infinity.server import running
        from moe_infinity.server.service import Service
        from moe_infinity.server.settings import ServeConfig

        self.moe = moe
        self.service = Service(moe, ServeConfig(port=0, **settings), "bundled")
        self._servers: list[Any] = []
        sock = running.bind("127.0.0.1", 0)
        self.url = running.url_of(sock)
        has_begun = threading.Event()
        make = running._Server
        running._Server = lambda *args: self._noted(make(*args))  # type: ignore[misc, assignment]
        try:
            self._thread = threading.Thread(
                target=running.serve, args=(self.service, sock, has_begun.set), name="serving"
            )
            self._thread.start()
            assert has_begun.wait(PATIENCE_S)
        finally:
            running._Server = make  # type: ignore[misc]

    @property
    def worker(self) -> Any:
        return self.service.worker

    @property
    def num_connections(self) -> int:
        return len(self._servers[0].server_state.connections)

    def is_idle(self) -> bool:
        return self.worker.running is None and self.worker.num_waiting == 0

    def wait_idle(self) -> None:
        wait_for(self.is_idle)

    def forget(self) -> None:
        """Every conversation that was kept."""
        self.wait_idle()
        self.worker.caches.clear()

    def stop(self) -> None:
        self._servers[0].should_exit = True
        self._thread.join(PATIENCE_S)
        assert not self._thread.is_alive()

    def _noted(self, server: Any) -> Any:
        self._servers.append(server)
        return server


class Script:
    """Instead of the model: texts that are said token by token, in turn."""

    def __init__(self, moe: MoE, *texts: str) -> None:
        self._moe = moe
        self._texts = list(texts)
        self.prompts: list[list[int]] = []
        self.may_go_on = threading.Event()  # behind the first token
        self.may_go_on.set()

    def generate(
        self, prompts: list[list[int]], max_new_tokens: int, stopping_criteria: Any, **_: Any
    ) -> None:
        self.prompts += prompts
        ids = [*self._moe.tokenizer(self._texts.pop(0)).input_ids, 0]
        said = list(prompts[0])
        for number, token in enumerate(ids):
            if number == 1:
                assert self.may_go_on.wait(PATIENCE_S)
            said.append(token)
            if any(bool(each(torch.tensor([said]), None)) for each in stopping_criteria):
                return
        raise AssertionError("the answer should have ended")


@contextmanager
def running(make: Callable[[], Any]) -> Iterator[Any]:
    """A server that is stopped in the end."""
    server = make()
    try:
        yield server
    finally:
        server.stop()


def assert_clean(log: str) -> None:
    """Nothing but the announcement and a line for each request."""
    before, _, after = log.partition(": live view there")
    assert not re.search(r"WARNING|ERROR|Traceback|Exception", before), log
    assert all(" INFO " in line for line in after.splitlines()[1:]), log


def request_bytes(path: str, body: Any, *headers: str) -> bytes:
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    lines = [
        f"POST {path} HTTP/1.1",
        "Host: localhost",
        f"Content-Length: {len(raw)}",
        "Connection: close",
        *headers,
    ]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + raw


def wait_for(found: Callable[[], Any]) -> Any:
    """Ask again and again until there is something; returns it."""
    deadline_s = time.monotonic() + PATIENCE_S
    while not (value := found()):
        assert time.monotonic() < deadline_s, "it does not come"
        time.sleep(0.005)
    return value


def _read_all(sock: socket.socket) -> bytes:
    found = b""
    while True:
        try:
            more = sock.recv(65536)
        except ConnectionResetError:
            return found
        if not more:
            return found
        found += more


def _is_alive(pid: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False
