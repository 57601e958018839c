"""A hub model whose weights are read over the network where asked for, and kept nowhere."""

from __future__ import annotations

from pathlib import Path

from moe_infinity.checkpoint.download import Progress, connection_errors, fetch
from moe_infinity.checkpoint.hub_names import Listing
from moe_infinity.checkpoint.safetensors import SafetensorsCheckpoint
from moe_infinity.errors import ReadError


class RemoteFile:
    """A file on the hub at one commit, so it does not change. num_bytes: its length."""

    def __init__(self, url: str, num_bytes: int) -> None:
        self.num_bytes = num_bytes
        self._url = url
        self._progress = Progress()

    def read_into(self, buffer: memoryview, offset: int, needed_bytes: int) -> None:
        """See OpenedFile. Goes on through broken connections."""
        done = 0

        def take(data: bytes) -> None:
            nonlocal done
            buffer[done : done + len(data)] = data
            done += len(data)

        try:
            fetch(self._url, offset, offset + needed_bytes, take, self._progress)
        except connection_errors() as error:
            said = f"{type(error).__name__}: {error}".splitlines()[0]
            raise ReadError(
                f"{self._url}: got {done} of {needed_bytes} bytes at {offset} ({said}); check the "
                f"connection and run again: what is done stays"
            ) from error

    def descriptor(self) -> None:
        """There is none."""

    def give_up(self) -> None:
        self._progress.stop()

    def version(self) -> str:
        return self._url

    def close(self) -> None:
        self.give_up()


def open_remote(listing: Listing, folder: Path) -> SafetensorsCheckpoint:
    """The checkpoint that ``folder`` describes (see hub.py, headers_only), read from the hub."""

    def open_file(path: Path) -> RemoteFile:
        name = path.relative_to(folder).as_posix()
        return RemoteFile(listing.url(name), listing.sizes[name])

    return SafetensorsCheckpoint(folder, open_file)
