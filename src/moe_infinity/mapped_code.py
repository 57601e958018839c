"""Gives back the pages of libraries that starting up went through and nothing needs any more.

Importing and loading touch 140 MiB of libraries' code and constants, requests 40. They lie in
files: taken out of the process, a page that is needed again comes back from the system's page
cache.
"""

from __future__ import annotations

import ctypes
import io
import itertools
import mmap
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

_MAPS, _PAGEMAP = Path("/proc/self/maps"), Path("/proc/self/pagemap")
_LINE = re.compile(r"([0-9a-f]+)-([0-9a-f]+) (\S{4}) ([0-9a-f]+) \S+ \S+ +(/.*)")
# Of a page in the pagemap, 8 bytes each: it is in memory; it is swapped out; it is what a file has.
_PRESENT, _SWAPPED, _OF_FILE = (np.uint64(1 << bit) for bit in (63, 62, 61))
_MADV_DONTNEED = 4


class _Line(NamedTuple):
    start: int
    end: int
    access: str
    offset: int
    path: str


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
    """Take the pages of libraries out of this process, as far as they are what their files say.
    What is used again costs a fault for each 64 KiB."""
    for mapping in unchanged_code():  # what is locked stays
        ctypes.CDLL(None).madvise(
            ctypes.c_void_p(mapping.start), ctypes.c_size_t(mapping.num_bytes), _MADV_DONTNEED
        )


def unchanged_code() -> list[Mapping]:
    """Mappings of libraries that were not written to: what was written lies nowhere else. Libraries
    alone, for Python never unloads one; other files may be gone, and memory be in their place, by
    the time their pages are let go of. And those alone that lie there before and behind the look:
    another thread may be loading one. Looked up page by page: /proc/self/smaps says the same, but
    looks at all memory there is for it. Empty where the system does not tell."""
    if not can_let_go():
        return []
    try:
        with _PAGEMAP.open("rb", buffering=0) as pages:
            found = [_unchanged(pages, *place) for place in code_places(_MAPS.read_text())]
        still = set(code_places(_MAPS.read_text()))
    except OSError:  # a process with capabilities may not look at itself
        return []
    return [each for each in found if each and (each.start, each.start + each.num_bytes) in still]


def code_places(maps: str) -> Iterator[tuple[int, int]]:
    """Where code of files lies, and constants beside it: start, end. A library is mapped piece by
    piece, side by side and in the file's order; what of its file lies elsewhere somebody else has
    mapped, for a while."""
    library: list[_Line] = []
    for text in itertools.chain(maps.splitlines(), [""]):
        found = _LINE.fullmatch(text)
        line = None
        if found:
            start, end, access, offset, path = found.groups()
            line = _Line(int(start, 16), int(end, 16), access, int(offset, 16), path)
        if line and library and _goes_on(library[-1], line):
            library.append(line)
            continue
        if any(piece.access == "r-xp" for piece in library):
            yield from ((p.start, p.end) for p in library if p.access in ("r-xp", "r--p"))
        library = [line] if line else []


def _goes_on(piece: _Line, following: _Line) -> bool:
    is_beside = (following.start, following.path) == (piece.end, piece.path)
    return is_beside and following.offset > piece.offset


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
