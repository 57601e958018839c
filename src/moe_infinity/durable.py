"""Files that are whole or not there, and safely on disk. Knows nothing of what is in them."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import BinaryIO


def write_atomically(path: Path, data: bytes) -> None:
    """Replace ``path`` by ``data`` in one step: whoever is killed leaves the old file whole.

    The folder has to be there: one that was removed meanwhile is not made anew.
    """
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            sync(file)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Make a renaming in it last, where the system can."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
