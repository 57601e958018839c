"""Keeps memory that was freed from counting against the budget: the C library holds on to it. And
has Python look for cycles while nobody waits."""

from __future__ import annotations

import ctypes
import gc
import sys
from collections.abc import Callable
from typing import Any

from moe_infinity.machine import resident_bytes

_WORTH_BYTES = 16 * 1024**2  # less than this since the last time is left where it is


def can_trim() -> bool:
    """Whether freed memory can be given back here: glibc has a call for it."""
    return _find_trim() is not None


def collect_if_due() -> None:
    """Make Python's next full collection now, if it is due: it walks through every object that the
    libraries are made of, a quarter of a second, and would come between two tokens."""
    due = gc.get_threshold()[2]
    if gc.isenabled() and 0 < due < gc.get_count()[2]:
        gc.collect()


class Heap:
    """Gives back what was freed once the budget would not hold what is needed next.

    A prompt's tensors differ in size from layer to layer, and glibc keeps them on its heap once it
    has seen a few freed: with prompts of 2,000 tokens on an AVX2 processor, 300 MiB that nobody
    used after three, and more after each. Handing every tensor back at once (its mmap threshold)
    makes prompts a tenth slower, for all pages are cleared anew. Without glibc nothing is done.
    """

    def __init__(
        self,
        budget_bytes: int,
        needed_bytes: int,
        untouched_bytes: Callable[[], int] = lambda: 0,
    ) -> None:
        """needed_bytes: of one pass, beside what is resident between two. untouched_bytes: of what
        is planned for, but not resident yet."""
        self._most_bytes = budget_bytes - needed_bytes
        self._untouched_bytes = untouched_bytes
        self._trim = _find_trim()
        self._after_bytes: int | None = None  # resident or to come, when it was trimmed last
        self.num_trims = 0

    def make_room(self, at_rest: bool = False) -> None:
        """Before much is allocated. at_rest: no pass runs, and what it had in use is free now."""
        if self._trim is None:
            return
        now = self._now_bytes()
        known = None if at_rest or self._after_bytes is None else min(now, self._after_bytes)
        has_grown = known is None or now > known + _WORTH_BYTES
        if now > self._most_bytes and has_grown:
            self._trim(0)
            known = self._now_bytes()
            self.num_trims += 1
        self._after_bytes = known

    def _now_bytes(self) -> int:
        return resident_bytes() + self._untouched_bytes()


def _find_trim() -> Any:
    if sys.platform != "linux":
        return None
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim.argtypes = (ctypes.c_size_t,)
    return trim
