"""A file of what has safely arrived on disk, line by line, sound as far as it was written."""

from __future__ import annotations

import contextlib
import json
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from moe_infinity.durable import sync, write_atomically
from moe_infinity.errors import ConfigError


class Journal:
    """JSON objects, a line each, with a checksum before each; the first names the job."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def resume(self, job: dict[str, Any]) -> list[dict[str, Any]]:
        """The lines of the same job so far; begins anew where there is none to go on with.

        A line that was cut off, and all after it, do not count.
        """
        lines = list(_sound_lines(self.path)) if self.path.exists() else []
        if not lines or lines[0] != job:
            lines = [job]
        self.restart(lines[0], lines[1:])  # without what was cut off
        return lines[1:]

    def restart(self, job: dict[str, Any], lines: list[dict[str, Any]]) -> None:
        """Only these lines count from now on."""
        write_atomically(self.path, b"".join(map(line_of, [job, *lines])))

    def append(self, line: dict[str, Any]) -> None:
        """Safely on disk when this returns."""
        with open(self.path, "ab") as file:
            file.write(line_of(line))
            sync(file)


def line_of(value: dict[str, Any]) -> bytes:
    return _with_checksum(json.dumps(value, separators=(",", ":")).encode()) + b"\n"


@contextlib.contextmanager
def only_one_in(folder: Path) -> Iterator[None]:
    """Lock a folder, where the system can. Raises ConfigError if another process has it."""
    try:
        import fcntl
    except ImportError:
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConfigError(
                f"{folder}: another process is writing there, expected to be the only one; wait "
                f"for it, or stop it"
            ) from error
        yield
    finally:
        os.close(handle)


def _sound_lines(path: Path) -> Iterator[dict[str, Any]]:
    for line in path.read_bytes().split(b"\n")[:-1]:
        body = line.partition(b" ")[2]
        if line != _with_checksum(body):
            return
        yield json.loads(body)


def _with_checksum(body: bytes) -> bytes:
    return f"{zlib.crc32(body):08x} ".encode() + body
