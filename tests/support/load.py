"""A client that asks a server again and again, streams the answers, and sometimes leaves early."""

import asyncio
import json
import random
from dataclasses import dataclass
from typing import Literal

_WORDS = [
    "river",
    "mill",
    "sea",
    "cloud",
    "seven",
    "daughters",
    "miller",
    "bread",
    "stone",
    "winter",
    "door",
]


@dataclass(frozen=True)
class Outcome:
    """Of one request. left: the client went away before the end; num_tokens: pieces it saw."""

    kind: Literal["answered", "refused", "left", "failed"]
    num_tokens: int = 0
    reason: str = ""


class Client:
    """Asks one request after another, each on a connection of its own.

    leaves: how probably it goes away in the middle of one. Refused (429), it comes back later.
    """

    def __init__(self, url: str, rng: random.Random, num_requests: int, leaves: float) -> None:
        host, _, port = url.removeprefix("http://").rpartition(":")
        self._address = host, int(port)
        self._rng = rng
        self._num_requests = num_requests
        self._leaves = leaves

    async def run(self) -> list[Outcome]:
        outcomes = []
        for _ in range(self._num_requests):
            outcome = await self._ask()
            outcomes.append(outcome)
            if outcome.kind == "refused":
                await asyncio.sleep(self._rng.uniform(0.1, 0.5))
        return outcomes

    async def _ask(self) -> Outcome:
        reader, writer = await asyncio.open_connection(*self._address)
        stays = None if self._rng.random() >= self._leaves else self._rng.randrange(4)
        try:
            writer.write(self._request())
            await writer.drain()
            if stays == 0:
                return Outcome("left")
            return await self._read(reader, stays)
        except OSError as error:
            return Outcome("failed", reason=repr(error))
        finally:
            writer.close()

    async def _read(self, reader: asyncio.StreamReader, stays: int | None) -> Outcome:
        """stays: leave behind so many pieces."""
        status = int((await reader.readline()).split(b" ")[1])
        seen, last = 0, b""
        while line := await reader.readline():
            if line.startswith(b"data: "):
                seen, last = seen + 1, line.strip()
                if seen == stays:
                    return Outcome("left", seen)
        if status == 429:
            return Outcome("refused")
        if status != 200 or last != b"data: [DONE]":
            return Outcome("failed", reason=f"{status} {last!r}")
        return Outcome("answered", max(0, seen - 2))

    def _request(self) -> bytes:
        words = " ".join(self._rng.choices(_WORDS, k=self._rng.randint(2, 40)))
        body = {
            "messages": [{"role": "user", "content": words}],
            "max_tokens": self._rng.randint(1, 8),
            "stream": True,
        }
        raw = json.dumps(body).encode()
        head = (
            "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(raw)}\r\n\r\n"
        )
        return head.encode() + raw
