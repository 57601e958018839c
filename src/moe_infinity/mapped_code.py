"""Gives back the pages of code that starting up ran through and nothing runs any more.

Importing and loading touch 90 MiB of libraries' code, requests 40. It lies in files: taken out of
the process, a page that is needed again comes back from the system's page cache.
"""

from __future__ import annotations

import ctypes
import io
import mmap
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

_MAPS, _PAGEMAP = Path("/proc/self/maps"), Path("/proc/self/pagemap")
_LINE = re.compile(r"([0-9a-f]+)-([0-9a-f]+) r-xp \S+ \S+ \S+ +(/.*)")
# Of a page in the pagemap, 8 bytes each: it is in memory; it is swapped out; it is what a file has.
_PRESENT, _SWAPPED, _OF_FILE = (np.uint64(1 << bit) for bit in (63, 62, 61))
_MADV_DONTNEED = 4


class Mapping(NamedTuple):
    start: int
    num_bytes: int
    resident_bytes: int


def can_let_go() -> bool:
    return sys.platform == "linux" and _MAPS.exists() and _PAGEMAP.exists()


def code_bytes() -> int:
    """Resident memory of this process that ``let_go`` would give back now."""
    return sum(mapping.resident_bytes for mapping in unchanged_code())


def let_go() -> None:
    """Take the pages of code out of this process, as far as they are what their files say. What is
    used again costs a fault for each 64 KiB."""
    for mapping in unchanged_code():  # what is locked stays
        ctypes.CDLL(None).madvise(
            ctypes.c_void_p(mapping.start), ctypes.c_size_t(mapping.num_bytes), _MADV_DONTNEED
        )


def unchanged_code() -> list[Mapping]:
    """Mappings of code in files that was not written to: what was written lies nowhere else. Code
    alone, for Python never unloads a library; other files may be gone, and memory be in their
    place, by the time their pages are let go of. Looked up page by page: /proc/self/smaps says the
    same, but looks at all memory there is for it. Empty where the system does not tell."""
    if not can_let_go():
        return []
    try:
        with _PAGEMAP.open("rb", buffering=0) as pages:
            found = [_unchanged(pages, *place) for place in code_places(_MAPS.read_text())]
    except OSError:  # a process with capabilities may not look at itself
        return []
    return [mapping for mapping in found if mapping is not None]


def code_places(maps: str) -> Iterator[tuple[int, int]]:
    """Where code of files lies: start, end."""
    for line in maps.splitlines():
        found = _LINE.fullmatch(line)
        if found is not None:
            yield int(found[1], 16), int(found[2], 16)


def _unchanged(pages: io.FileIO, start: int, end: int) -> Mapping | None:
    pages.seek(start // mmap.PAGESIZE * 8)
    words = np.frombuffer(pages.read((end - start) // mmap.PAGESIZE * 8), dtype=np.uint64)
    if len(words) * mmap.PAGESIZE != end - start:
        return None
    is_present = words & _PRESENT != 0
    if not is_present.any():  # or the system hides what is
        return None
    if (words & _SWAPPED).any() or (words[is_present] & _OF_FILE == 0).any():
        return None
    return Mapping(start, end - start, int(is_present.sum()) * mmap.PAGESIZE)
