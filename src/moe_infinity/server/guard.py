"""Who may come in: keys, hosts, origins, and bodies that are neither too large nor too slow.

An ASGI layer around the application; it sees headers and bytes, not what they mean.
"""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
from collections.abc import Callable
from urllib.parse import SplitResult, urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from moe_infinity.server.problems import ApiError
from moe_infinity.server.replies import error_response
from moe_infinity.server.settings import ServeConfig

_BODIES_AT_ONCE = 8
_OPEN_PATHS = frozenset({"/", "/health"})  # the page holds no secrets, and asks for the key itself
_LOCAL_NAMES = frozenset({"localhost", "localhost.localdomain"})


def error_body(path: str, error: ApiError) -> dict[str, object]:
    """In the words of the API that the path belongs to."""
    return error.anthropic() if path.startswith("/v1/messages") else error.openai()


class Guard:
    """Refuses, or passes on with a body that is bounded in size and time. Of all bodies together it
    holds ``_BODIES_AT_ONCE`` of the largest size at most."""

    def __init__(self, app: ASGIApp, config: ServeConfig, max_body_bytes: int) -> None:
        self._app = app
        self._config = config
        self._max_body_bytes = max_body_bytes
        self._held_bytes = 0  # of bodies whose requests are not answered yet
        self._keys = [key.encode() for key in config.api_keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        try:
            self._check(scope, headers)
        except ApiError as error:
            body = error_body(scope["path"], error)
            await error_response(error, body)(scope, receive, send)
            return
        bounded = _Bounded(receive, self._config.body_timeout_s, self._admit)
        try:
            await self._app(scope, bounded, send)
        finally:
            self._held_bytes -= bounded.num_bytes

    def _admit(self, num_bytes: int, of_body: int) -> None:
        """More of a body that has so many bytes by now."""
        if of_body > self._max_body_bytes:
            raise _too_large(self._max_body_bytes)
        if self._held_bytes + num_bytes > _BODIES_AT_ONCE * self._max_body_bytes:
            raise ApiError(
                503, "the requests that wait fill the memory that is meant for them", None,
                "too_much_waiting", 5,
            )  # fmt: skip
        self._held_bytes += num_bytes

    def _check(self, scope: Scope, headers: Headers) -> None:
        self._check_host(headers.get("host", ""))
        self._check_origin(headers)
        if self._keys and scope["path"] not in _OPEN_PATHS:
            self._check_key(headers)
        declared = headers.get("content-length", "0")
        if not declared.isascii() or not declared.isdigit() or len(declared) > 18:
            raise ApiError(400, "content-length: expected a number of bytes")
        if int(declared) > self._max_body_bytes:
            raise _too_large(self._max_body_bytes)

    def _check_host(self, host: str) -> None:
        """A page elsewhere may have its own name resolve to this machine: its requests arrive here
        under that name."""
        if self._keys or not self._config.is_local:
            return
        name = _parts(f"//{host}").hostname or ""
        if name in _LOCAL_NAMES or name == self._config.host or _is_loopback(name):
            return
        raise ApiError(
            403, f"host: got {host!r:.100}, expected localhost or 127.0.0.1; with --api-key this "
            f"server answers under any name", None, "wrong_host",
        )  # fmt: skip

    def _check_origin(self, headers: Headers) -> None:
        origin = headers.get("origin")
        if origin is None or origin in self._config.origins or "*" in self._config.origins:
            return
        if _parts(origin).netloc != headers.get("host"):
            raise ApiError(
                403, f"origin: got a request of a page at {origin!r:.100}; --origin lets it in",
                None, "wrong_origin",
            )  # fmt: skip

    def _check_key(self, headers: Headers) -> None:
        given = headers.get("x-api-key") or ""
        scheme, _, bearer = headers.get("authorization", "").partition(" ")
        if scheme.lower() == "bearer":
            given = bearer.strip()
        raw = given.encode(errors="replace")
        # All of them are compared, each in constant time: how long it takes tells nothing.
        if not any([hmac.compare_digest(raw, key) for key in self._keys]):
            message = "a wrong API key" if given else "no API key"
            raise ApiError(
                401,
                f"got {message}, expected the server's, as 'Authorization: Bearer KEY' or "
                f"'x-api-key: KEY'",
                None, "invalid_api_key",
            )  # fmt: skip


class _Bounded:
    """A request's ``receive``, until its body is there."""

    def __init__(
        self, receive: Receive, timeout_s: float, admit: Callable[[int, int], None]
    ) -> None:
        """admit: told of bytes that came, and how many the body has with them; may refuse."""
        self._receive = receive
        self._timeout_s = timeout_s
        self._admit = admit
        self._deadline_s = asyncio.get_running_loop().time() + timeout_s
        self.num_bytes = 0  # that were admitted
        self._is_whole = False

    async def __call__(self) -> Message:
        if self._is_whole:
            return await self._receive()
        left_s = self._deadline_s - asyncio.get_running_loop().time()
        try:
            message = await asyncio.wait_for(self._receive(), max(0.0, left_s))
        except asyncio.TimeoutError as error:
            raise ApiError(
                408, f"the request's body did not arrive within {self._timeout_s:g} s"
            ) from error
        came = len(message.get("body", b""))
        self._is_whole = not message.get("more_body", False)
        self._admit(came, self.num_bytes + came)
        self.num_bytes += came
        return message


def _too_large(most: int) -> ApiError:
    return ApiError(413, f"the request's body is larger than {most} bytes", None, "body_too_large")


def _parts(url: str) -> SplitResult:
    try:
        return urlsplit(url)
    except ValueError:  # brackets without an address
        return urlsplit("")


def _is_loopback(name: str) -> bool:
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False
