"""Memory made ready shortly before it is needed.

The first use of a page costs its allocation. In a virtual machine whose host takes back free memory
that is slow: 0.5 GB/s were measured, where the disk delivers 2. So a thread walks ahead.
"""

from __future__ import annotations

import ctypes
import sys
import threading
from collections.abc import Sequence

LEAD_BYTES = 1024**3  # a prompt uses them faster than any thread can walk
# In decode the walk would hold a processor that computes, for memory that is not used for long.
DECODE_LEAD_BYTES = 64 * 1024**2
_STEP_BYTES = 4 * 1024**2  # whoever closes the memory waits for one
_POPULATE_WRITE = 23  # madvise of Linux 5.14; Python's own would hold up all other threads


class Toucher:
    """Walks ahead through regions of memory, each used from its beginning on, and stays ahead.

    memory: what the regions, addresses and bytes, are part of; it is held until ``close``. Nothing
    is touched before ``start``, nor where the system has no call for it.
    """

    def __init__(
        self,
        memory: object,
        regions: Sequence[tuple[int, int]],
        lead_bytes: int = LEAD_BYTES,
    ) -> None:
        self._memory: object = memory
        self._regions = list(regions)
        self._lead_bytes = lead_bytes
        self._used = [0] * len(regions)  # bytes
        self._done = [0] * len(regions)  # that were touched, or used
        self._changed = threading.Condition()
        self._is_over = False
        self._thread = threading.Thread(target=self._walk, name="moe-infinity-touch", daemon=True)

    def start(self) -> None:
        """Begin to walk. Once."""
        if sys.platform == "linux":
            self._thread.start()

    def use(self, region: int, end: int) -> None:
        """The region's first ``end`` bytes are in use now. Cheap, for it is told of every load."""
        if end <= self._used[region]:
            return
        with self._changed:
            self._used[region] = end
            self._done[region] = max(self._done[region], end)
            self._changed.notify()

    def keep_lead(self, num_bytes: int) -> None:
        """From now on stay so far ahead, and no further."""
        if num_bytes != self._lead_bytes:
            with self._changed:
                self._lead_bytes = num_bytes
                self._changed.notify()

    def untouched_bytes(self) -> int:
        """Of all regions, what costs no memory yet."""
        return sum(size for _, size in self._regions) - sum(self._done)

    def close(self) -> None:
        """End the walk; the memory may go then. Idempotent."""
        with self._changed:
            self._is_over = True
            self._changed.notify()
        if self._thread.ident is not None:
            self._thread.join()
        self._memory = None

    def _walk(self) -> None:
        madvise = ctypes.CDLL(None).madvise
        while (step := self._next_step()) is not None:
            address, size = step
            if madvise(ctypes.c_void_p(address), ctypes.c_size_t(size), _POPULATE_WRITE):
                return  # an older system, or no memory left: it is touched when it is used

    def _next_step(self) -> tuple[int, int] | None:
        with self._changed:
            while not self._is_over:
                for number, (address, num_bytes) in enumerate(self._regions):
                    start = self._done[number]
                    end = min(self._used[number] + self._lead_bytes, num_bytes)
                    if start < end:
                        self._done[number] = min(start + _STEP_BYTES, end)
                        return address + start, self._done[number] - start
                self._changed.wait()
        return None
