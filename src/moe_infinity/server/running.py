"""Runs the application on a socket: connections that dawdle are closed, an end is orderly."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from moe_infinity.errors import ConfigError
from moe_infinity.server.app import build_app
from moe_infinity.server.service import Service

_log = logging.getLogger(__name__)
_HEADERS_S = 10.0  # that headers may take to arrive, and the rest of a body nobody reads
_STALLED_S = 60.0  # that a client may take nothing of what is sent to it
_MAX_HEADER_BYTES = 64 * 1024
_BACKLOG = 512
_MAX_CONNECTIONS = 512  # others are closed at once, before this process has no files left
_LAST_WORDS_S = 1.0  # that clients get to hear of the end
_ENDING_S, _ENDING_STEPS = 2.0, 40  # that tasks get when their connections are gone


def bind(host: str, port: int) -> socket.socket:
    """A socket at this address, before anything expensive is done. Raises ConfigError if it cannot
    be had."""
    try:
        family, kind, proto, _, address = socket.getaddrinfo(
            host.strip("[]"), port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        sock = socket.socket(family, kind, proto)
    except (OSError, UnicodeError) as error:
        raise ConfigError(
            f"host: got {host!r}, expected an address of this machine ({error})"
        ) from error
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
    except OSError as error:
        sock.close()
        raise ConfigError(
            f"port: cannot listen at {host}:{port} ({error.strerror or error}); choose another "
            f"with --port"
        ) from error
    return sock


def url_of(sock: socket.socket) -> str:
    """Where a browser finds what listens on it."""
    host, port = sock.getsockname()[:2]
    if sock.family == socket.AF_INET6:
        host = f"[{host}]"
    return f"http://{host}:{port}"


def serve(service: Service, sock: socket.socket, on_start: Callable[[], None]) -> None:
    """Answer requests until the process is told to stop (Ctrl-C, SIGTERM); then running ones get
    ``shutdown_s`` to finish, and waiting ones are refused. Closes the service and the socket."""
    config = uvicorn.Config(
        build_app(service),
        http=_PatientProtocol,
        ws="none",
        loop="asyncio",
        lifespan="off",
        access_log=False,
        log_config=None,
        server_header=False,
        h11_max_incomplete_event_size=_MAX_HEADER_BYTES,
        backlog=_BACKLOG,
    )
    logging.getLogger("uvicorn.error").setLevel(logging.WARNING)
    try:
        _Server(config, service, on_start).run([sock])
    finally:
        sock.close()
        service.close()


class _Server(uvicorn.Server):
    def __init__(
        self, config: uvicorn.Config, service: Service, on_start: Callable[[], None]
    ) -> None:
        super().__init__(config)
        self._service = service
        self._on_start = on_start

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._on_start()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """What runs may finish, within its time; then its client is told, then cut off."""
        worker, grace_s = self._service.worker, self._service.config.shutdown_s
        worker.refuse_all()
        grace = f": what runs has {grace_s:g} s, Ctrl-C again cuts it off" if worker.running else ""
        _log.info("ending%s", grace)
        loop = asyncio.get_running_loop()
        late = [
            loop.call_later(grace_s, worker.abandon),
            loop.call_later(grace_s + _LAST_WORDS_S, self._cut_off),
        ]
        await super().shutdown(sockets)
        for timer in late:
            timer.cancel()
        worker.abandon()
        self._cut_off()  # who is still there was in the way of a second Ctrl-C
        for _ in range(_ENDING_STEPS):
            if self.server_state.tasks:
                await asyncio.sleep(_ENDING_S / _ENDING_STEPS)

    def _cut_off(self) -> None:
        for connection in list(self.server_state.connections):
            connection.transport.abort()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """As uvicorn's own, but nothing is raised again at the end: the model is still to be
        closed."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self.handle_exit) for number in _SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class _PatientProtocol(H11Protocol):
    """Closes a connection whose headers take too long, that still sends a body when it was
    answered, or that takes nothing of its answer; uvicorn itself would wait for ever."""

    _timer: asyncio.TimerHandle | None = None
    _stall: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        if len(self.connections) > _MAX_CONNECTIONS:
            transport.abort()
            return
        transport.set_write_buffer_limits(0)  # writing pauses as soon as anything has to wait
        self._watch(True)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        theirs = self.conn.their_state
        is_answered = self.conn.our_state is h11.DONE and theirs is h11.SEND_BODY
        self._watch(theirs is h11.IDLE or is_answered)

    def connection_lost(self, exc: Exception | None) -> None:
        self._watch(False)
        self._forget_stall()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._expect_less(self.transport.get_write_buffer_size())

    def resume_writing(self) -> None:
        self._forget_stall()
        super().resume_writing()

    def _expect_less(self, num_bytes: int) -> None:
        self._stall = self.loop.call_later(_STALLED_S, self._look, num_bytes)

    def _look(self, before: int) -> None:
        waiting = self.transport.get_write_buffer_size()
        if waiting < before:
            self._expect_less(waiting)
        else:
            self.transport.abort()

    def _forget_stall(self) -> None:
        if self._stall is not None:
            self._stall.cancel()
            self._stall = None

    def _watch(self, is_incomplete: bool) -> None:
        if is_incomplete and self._timer is None:
            self._timer = self.loop.call_later(_HEADERS_S, self.transport.close)
        elif not is_incomplete and self._timer is not None:
            self._timer.cancel()
            self._timer = None
