"""Bytes from a web server into a file: ranges, broken connections, several files at once."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import CancelledError, ThreadPoolExecutor, as_completed
from pathlib import Path

_NUM_CONNECTIONS = 8  # these two as in huggingface_hub
_MAX_FAILURES = 5  # attempts in a row that bring nothing
TIMEOUT_S = 10.0


class Progress:
    """One bar for all files, and how a failure or Ctrl-C in one thread stops the others."""

    def __init__(self, show: Callable[[int], object] = lambda num_bytes: None) -> None:
        self._show = show
        self._lock = threading.Lock()
        self._stopped = threading.Event()

    def add(self, num_bytes: int) -> None:
        self.pause(0)
        with self._lock:
            self._show(num_bytes)

    def stop(self) -> None:
        """Whoever adds from now on is told to end."""
        self._stopped.set()

    def pause(self, seconds: float) -> None:
        if self._stopped.wait(seconds):
            raise CancelledError

    def run(self, jobs: Iterable[Callable[[], None]]) -> None:
        """Run all in threads. The first failure is raised and stops the rest at their next byte."""
        with ThreadPoolExecutor(_NUM_CONNECTIONS) as pool:
            try:
                futures = [pool.submit(job) for job in jobs]
                for future in as_completed(futures):
                    future.result()
            finally:
                self.stop()
                pool.shutdown(cancel_futures=True)


def extend(file: Path, url: str, end: int, progress: Progress) -> None:
    """Download what a file lacks of the first ``end`` bytes."""
    with file.open("ab") as opened:
        fetch(url, opened.tell(), end, opened.write, progress)


def fetch(
    url: str, start: int, end: int, take: Callable[[bytes], object], progress: Progress
) -> None:
    """Hand the bytes start to end of a remote file to ``take``, through broken connections."""
    failures = 0
    while start < end:
        before = start
        reason: Exception = ConnectionError(f"no data from {url}")
        try:
            for data in stream(url, start, end):
                take(data)
                start += len(data)
                progress.add(len(data))
        except connection_errors() as error:
            if isinstance(error, OSError):  # the hub said no, or the disk is full
                raise
            reason = error
        failures = 0 if start > before else failures + 1
        if failures > _MAX_FAILURES:
            raise reason
        progress.pause(failures)


def stream(url: str, start: int, end: int) -> Iterator[bytes]:
    """Bytes start to end of a remote file, as they come.

    A server that ignores ranges is read from the beginning, and left at ``end``.
    """
    from huggingface_hub.utils import (  # type: ignore[attr-defined]
        build_hf_headers,
        hf_raise_for_status,
        http_stream_backoff,
    )

    asked = {"Range": f"bytes={start}-{end - 1}", "Accept-Encoding": "identity"}
    with http_stream_backoff(
        "GET", url, headers=build_hf_headers() | asked, timeout=TIMEOUT_S, retry_on_exceptions=()
    ) as response:
        hf_raise_for_status(response)
        position = start if response.status_code == 206 else 0
        for data in response.iter_bytes():
            wanted = data[max(start - position, 0) : end - position]
            position += len(data)
            if wanted:
                yield wanted
            if position >= end:
                return


def num_bytes_of(file: Path) -> int:
    return file.stat().st_size if file.exists() else 0


def sha256_of(file: Path) -> str:
    from huggingface_hub.utils.sha import sha_fileobj

    with file.open("rb") as opened:
        return sha_fileobj(opened).hex()


def connection_errors() -> tuple[type[Exception], ...]:
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]

    return (HTTPError, OSError, ValueError)
