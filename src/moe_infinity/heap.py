"""Keeps memory that was freed from counting against the budget: the C library holds on to it."""

from __future__ import annotations

import ctypes
import sys
from typing import Any

from moe_infinity.machine import resident_bytes


class Heap:
    """Gives back what was freed once the budget would not hold what is needed next.

    A prompt's tensors differ in size from layer to layer, and glibc keeps them on its heap once it
    has seen a few freed: measured, 300 MiB that nobody used after three prompts of 2,000 tokens,
    and more after each. Handing each back at once (its mmap threshold) made prompts a tenth slower:
    every page is then cleared anew. Without glibc nothing is done.
    """

    def __init__(self, budget_bytes: int, needed_bytes: int) -> None:
        """needed_bytes: of one pass, beside what is resident between two."""
        self._most_bytes = budget_bytes - needed_bytes
        self._trim = _find_trim()
        self.num_trims = 0

    def make_room(self) -> None:
        """Before a layer's tensors are allocated. About 30 us, and 10 ms where there is need."""
        if self._trim is not None and resident_bytes() > self._most_bytes:
            self._trim(0)
            self.num_trims += 1


def _find_trim() -> Any:
    if sys.platform != "linux":
        return None
    return getattr(ctypes.CDLL(None), "malloc_trim", None)
