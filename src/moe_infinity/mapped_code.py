"""Gives back the pages of libraries that starting up ran through and nothing runs any more.

Importing and loading touch 100 MiB of code and constants, a token 40. They lie in files: taken out
of the process, a page that is needed again comes back from the system's page cache.
"""

from __future__ import annotations

import ctypes
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

_SMAPS, _STATUS = Path("/proc/self/smaps"), Path("/proc/self/status")
_HEAD = re.compile(r"([0-9a-f]+)-([0-9a-f]+) (\S{4}) \S+ \S+ \S+ *(.*)")
_WORTH_BYTES = 256 * 1024  # of one mapping, resident
_MADV_DONTNEED = 4


class _Mapping(NamedTuple):
    start: int
    num_bytes: int
    resident_bytes: int


def can_let_go() -> bool:
    """Whether the system says what lies in files, page by page and in sum."""
    return sys.platform == "linux" and _SMAPS.exists() and "RssFile:" in _STATUS.read_text()


def let_go() -> None:
    """Take mapped files' pages out of this process, as far as they are what their files say.
    Takes some 30 ms, and what is used again a fault for each 64 KiB."""
    if not can_let_go():
        return
    libc = ctypes.CDLL(None)
    for mapping in _unchanged_mappings(_SMAPS.read_text()):
        # One that is locked, or gone by now, stays: nothing is lost but room.
        libc.madvise(
            ctypes.c_void_p(mapping.start), ctypes.c_size_t(mapping.num_bytes), _MADV_DONTNEED
        )


def _unchanged_mappings(smaps: str) -> Iterator[_Mapping]:
    """Private, of files, and not written to: what was written lies nowhere else."""
    for part in re.split(r"\n(?=[0-9a-f]+-[0-9a-f]+ )", smaps):
        head = _HEAD.match(part)
        if head is None or head[3] not in ("r-xp", "r--p") or not head[4].startswith("/"):
            continue
        sizes = dict(re.findall(r"^(\w+): +(\d+) kB$", part, re.MULTILINE))
        resident_bytes = int(sizes.get("Rss", 0)) * 1024
        if sizes.get("Anonymous") == "0" and resident_bytes > _WORTH_BYTES:
            start, end = int(head[1], 16), int(head[2], 16)
            yield _Mapping(start, end - start, resident_bytes)
