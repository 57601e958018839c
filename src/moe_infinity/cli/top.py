"""``moe-infinity top``: what a running server does, in the terminal. Knows its address alone."""

from __future__ import annotations

import http.client
import json
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any
from urllib.parse import urlsplit

import typer

from moe_infinity.cli import common, top_screen
from moe_infinity.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import Console

_VERSION = 1  # of the statistics
_PARTS = frozenset(("model", "state", "queue", "totals", "memory", "experts"))
_PATH = "/v1/stats"
_TIMEOUT_S = 20  # a long pass of the model may hold the answer up
_MAX_BYTES = 16 * 1024**2  # the map of a thousand layers of a thousand experts is 2 MB


def top(
    url: Annotated[str, typer.Argument(help="The server's address.")] = "http://127.0.0.1:8000",
    api_key: Annotated[
        str | None,
        typer.Option(help="The key the server asks for.", envvar="MOE_INFINITY_API_KEY"),
    ] = None,
    interval: Annotated[float, typer.Option(min=0.1, help="Seconds between two looks.")] = 1.0,
    once: Annotated[
        bool, typer.Option("--once", help="One look; also where the output is no terminal.")
    ] = False,
    json: Annotated[
        bool, typer.Option("--json", help="One JSON object as the server gives it.")
    ] = False,
) -> None:
    """Watch a running server: state, speed, hit rate, reads, memory, and where every expert is."""
    from rich.console import Console

    watched = Server(url, api_key)
    first = watched.stats()
    console = Console(highlight=False)
    if json:
        common.print_json(first)
    elif once or not console.is_terminal:
        console.print(top_screen.Frame(first, watched.url), end="")
    else:
        _watch(console, watched, first, interval)


def _watch(console: Console, server: Server, first: dict[str, Any], interval: float) -> None:
    """Until Ctrl-C. A server that went away is asked again: it may come back."""
    from rich.live import Live

    before: dict[str, Any] | None = None
    now, trouble = first, ""
    try:
        with Live(console=console, screen=True, auto_refresh=False) as live:
            while True:
                frame = top_screen.Frame(now, server.url, before, trouble, console.height)
                live.update(frame, refresh=True)
                time.sleep(interval)
                try:
                    before, now, trouble = now, server.stats(), ""
                except ConfigError as error:
                    trouble = str(error)
    except KeyboardInterrupt:  # how one leaves
        pass


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """The key is for the server that was named, and for no other."""

    def redirect_request(self, *_: Any) -> None:
        return None


class Server:
    """A server's address and how it is asked. Every failure is a ConfigError that names it."""

    def __init__(self, url: str, api_key: str | None = None) -> None:
        address = url if "://" in url else f"http://{url}"
        self.url = address.rstrip("/").removesuffix("/v1")
        try:
            parts = urlsplit(self.url)
            is_good = parts.scheme in ("http", "https") and bool(parts.hostname)
            _ = parts.port  # raises ValueError unless it is a number
        except ValueError:
            is_good = False
        if not is_good or not self.url.isascii() or not self.url.isprintable() or " " in self.url:
            raise ConfigError(f"URL: got {url!r}, expected one such as http://127.0.0.1:8000")
        if api_key and not (api_key.isascii() and api_key.isprintable()):
            raise ConfigError("--api-key: got characters that no key has, expected plain ASCII")
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        is_near = parts.hostname in ("127.0.0.1", "localhost", "::1")
        handlers: list[Any] = [_NoRedirect]
        if is_near:  # a proxy would look for it at its own place
            handlers.append(urllib.request.ProxyHandler({}))
        self._open: Callable[..., Any] = urllib.request.build_opener(*handlers).open

    def stats(self) -> dict[str, Any]:
        """What the server says of itself. Raises ConfigError."""
        found = self._decode(self._ask())
        if not isinstance(found, dict) or "version" not in found:
            raise self._another(f"JSON that is no statistics of ours: {str(found)[:60]}")
        if found["version"] != _VERSION:
            raise ConfigError(
                f"{self.url}: got statistics of version {found['version']!r}, expected "
                f"{_VERSION}; use the moe-infinity that the server is of"
            )
        if missing := _PARTS - found.keys():
            raise self._another(f"statistics without {', '.join(sorted(missing))}")
        return found

    def _ask(self) -> bytes:
        request = urllib.request.Request(self.url + _PATH, headers=self._headers)
        try:
            with self._open(request, timeout=_TIMEOUT_S) as answer:
                return bytes(answer.read(_MAX_BYTES))
        except urllib.error.HTTPError as error:
            with error:
                raise self._refused(error.code) from None
        except http.client.HTTPException as error:
            raise self._another(f"no HTTP ({type(error).__name__})") from None
        except OSError as error:  # URLError among them
            why = getattr(error, "reason", error)
            raise ConfigError(
                f"{self.url}: got no connection ({why}), expected a running server; start one "
                f"with 'moe-infinity serve', or name its address"
            ) from None

    def _refused(self, status: int) -> ConfigError:
        if status == 401:
            got = "a wrong key" if self._headers else "no key"
            return ConfigError(
                f"{self.url}: got HTTP 401 for {got}, expected the one the server was started "
                f"with; give it with --api-key or MOE_INFINITY_API_KEY"
            )
        return self._another(f"HTTP {status}")

    def _decode(self, body: bytes) -> Any:
        try:
            return json.loads(body)
        except ValueError:
            shown = body[:40].decode(errors="replace")
            raise self._another(f"an answer that is no JSON: {shown!r}") from None

    def _another(self, got: str) -> ConfigError:
        return ConfigError(
            f"{self.url}{_PATH}: got {got}, expected the statistics of 'moe-infinity serve'; "
            f"another server may listen there"
        )
