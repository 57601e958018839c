"""Moves experts into slots on worker threads: demand before prefetch, chunk by chunk.

Knows nothing of who is evicted for whom; it is given a key and a buffer and fills it.
"""

from __future__ import annotations

import heapq
import itertools
import threading
import time
from collections.abc import Callable, Iterable
from enum import Enum

from moe_infinity.cache.early_reads import EarlyReads
from moe_infinity.checkpoint.base import ExpertStore
from moe_infinity.types import ExpertKey, Priority, ReadRange

# A demand load waits for at most one chunk per worker; SSDs reach full speed at 1-8 MiB a read.
CHUNK_BYTES = 2 * 1024**2
READ_THREADS = 4


class TransferState(Enum):
    QUEUED = "queued"
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"


class Transfer:
    """One expert on its way into a buffer. Its fields belong to the engine's lock."""

    __slots__ = (
        "_after",
        "_buffer",
        "_reading",
        "_unclaimed",
        "error",
        "key",
        "priority",
        "state",
        "wanted",
    )

    def __init__(
        self,
        key: ExpertKey,
        buffer: memoryview,
        chunks: Iterable[ReadRange],
        priority: Priority,
        after: Callable[[], None] | None,
    ) -> None:
        self.key = key
        self.priority = priority
        self.state = TransferState.QUEUED
        self.error: BaseException | None = None
        self.wanted = True  # False once cancelled; chunks already being read still finish
        self._after = after
        self._buffer = buffer
        self._unclaimed = list(chunks)[::-1]
        self._reading = 0  # chunks that workers are reading now

    @property
    def is_settled(self) -> bool:
        """Whether nobody will write to the buffer any more."""
        return self.state is not TransferState.QUEUED


class TransferEngine:
    """Worker threads behind one queue with two priorities.

    ``submit`` begins a transfer, ``wait_any`` and ``take_settled`` see its end: loads are
    two-phase. Errors are kept in the transfer and raised by whoever needs it. No lock is held
    while reading.
    """

    def __init__(
        self,
        store: ExpertStore,
        num_threads: int,
        chunk_bytes: int = CHUNK_BYTES,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._store = store
        self._chunk_bytes = chunk_bytes
        self._clock = clock
        self._lock = threading.Lock()
        self._work = threading.Condition(self._lock)
        self._settled = threading.Condition(self._lock)
        self._queue: list[tuple[Priority, int, Transfer]] = []
        self._order = itertools.count()
        self._unsettled: set[Transfer] = set()
        self._finished: list[Transfer] = []
        self._closing = False
        self._busy_since_s = 0.0  # while something is unsettled
        self._busy_s = 0.0
        self._bytes_read = 0
        self._threads = [
            threading.Thread(target=self._serve, name=f"moe-infinity-read-{i}", daemon=True)
            for i in range(num_threads)
        ]
        for thread in self._threads:
            thread.start()

    def submit(
        self,
        key: ExpertKey,
        buffer: memoryview,
        priority: Priority,
        after: Callable[[], None] | None = None,
    ) -> Transfer:
        """Begin filling ``buffer`` with the expert; it must stay untouched until settled. after:
        waits, on a reader thread, until the buffer may be written to."""
        chunks = self._store.chunks(key, self._chunk_bytes)
        transfer = Transfer(key, buffer, chunks, priority, after)
        with self._lock:
            if self._closing:
                raise RuntimeError("the transfer engine is closed")
            self._begin_busy(transfer)
            self._enqueue(transfer)
        self._hand_over()
        return transfer

    @property
    def early(self) -> EarlyReads | None:
        """Where compiled code can begin loads by itself: how, and what it has begun."""
        return None

    def take_begun(self, key: ExpertKey) -> tuple[Transfer, int] | None:
        """A load that compiled code has begun already, now wanted as one that was submitted; and
        the number of the spare memory that it goes into, which is not spare any more."""
        return None

    def plan_early(self, key: ExpertKey) -> None:
        """Say how compiled code may read an expert, if it may."""

    def promote(self, transfer: Transfer) -> None:
        """A demand has joined a prefetch: its remaining chunks go ahead of all prefetches."""
        with self._lock:
            if transfer.priority is not Priority.DEMAND and not transfer.is_settled:
                transfer.priority = Priority.DEMAND
                self._enqueue(transfer)
        self._hand_over()

    def cancel(self, transfer: Transfer) -> None:
        """Read no further chunk of it; it settles when those being read have ended."""
        with self._lock:
            self._cancel(transfer)

    def drain(self) -> None:
        """Cancel every transfer and wait until no thread touches a buffer; forget them all."""
        with self._lock:
            for transfer in list(self._unsettled):
                self._cancel(transfer)
            while not all(transfer.is_settled for transfer in self._unsettled):
                self._settled.wait()
            self._unsettled.clear()
            self._finished.clear()

    def take_settled(self) -> list[Transfer]:
        """Transfers that settled since the last call, in the order in which they did."""
        with self._lock:
            finished, self._finished = self._finished, []
            return finished

    def take_activity(self) -> tuple[float, int]:
        """Seconds in which reads were under way, and bytes read, since the last call."""
        with self._lock:
            if self._unsettled:
                self._count_busy()
            taken = self._busy_s, self._bytes_read
            self._busy_s, self._bytes_read = 0.0, 0
            return taken

    def expect_guesses(self, are_guesses: bool) -> None:
        """Whether what is loaded ahead from now on may turn out wrong, as in decode: a demand
        should not be far behind it. Else the disk is to be kept busy, whatever the caller does."""

    def skip_time(self) -> None:
        """Until now nobody computed: what was read meanwhile is nobody's, bytes and seconds."""
        self.take_activity()

    def wait_any(self) -> float:
        """Wait until some transfer has settled and was not taken. Returns the seconds waited."""
        with self._lock:
            assert self._finished or self._unsettled, (
                "nothing is in flight: this would wait forever"
            )
            if self._finished:
                return 0.0
            start = self._clock()
            while not self._finished:
                self._settled.wait()
            return self._clock() - start

    def close(self) -> None:
        """Drop what is queued, let chunks being read end, join every thread. Idempotent."""
        with self._lock:
            self._closing = True
            for transfer in list(self._unsettled):
                self._cancel(transfer)
            self._work.notify_all()
        for thread in self._threads:
            thread.join()

    def _enqueue(self, transfer: Transfer) -> None:
        for _ in transfer._unclaimed:
            heapq.heappush(self._queue, (transfer.priority, next(self._order), transfer))
        self._work.notify(len(transfer._unclaimed))

    def _hand_over(self) -> None:
        """Begin what was enqueued for others than the threads."""

    def _serve(self) -> None:
        while True:
            claimed = self._claim()
            if claimed is None:
                return
            transfer, chunk = claimed
            error: BaseException | None = None
            try:
                if transfer._after is not None:
                    transfer._after()
                start = chunk.slot_offset
                buffer = transfer._buffer[start : start + chunk.num_bytes]
                self._store.read_into(transfer.key, buffer, chunk)
            except BaseException as caught:  # raised again in the call that needs the expert
                error = caught
            self._finish_chunk(transfer, chunk.num_bytes, error)

    def _claim(self) -> tuple[Transfer, ReadRange] | None:
        with self._lock:
            while True:
                while self._queue and not self._is_held_back():
                    transfer = heapq.heappop(self._queue)[2]
                    if transfer._unclaimed:  # else promoted or cancelled: a stale entry
                        transfer._reading += 1
                        return transfer, transfer._unclaimed.pop()
                if self._closing:
                    return None
                self._work.wait()

    def _is_held_back(self) -> bool:
        """Prefetches take half of the workers at most: that keeps an idle disk busy, and a demand
        load that comes meanwhile starts at once beside few chunks."""
        if self._queue[0][0] is Priority.DEMAND:
            return False
        ahead = (t._reading for t in self._unsettled if t.priority is Priority.PREFETCH)
        return sum(ahead) >= max(1, len(self._threads) // 2)

    def _finish_chunk(
        self, transfer: Transfer, num_bytes: int, error: BaseException | None
    ) -> None:
        with self._lock:
            self._bytes_read += num_bytes
            transfer._reading -= 1
            if error is not None:
                transfer.error = transfer.error or error
                transfer._unclaimed.clear()
            self._settle_if_over(transfer)
            self._work.notify()  # a worker may have been held back

    def _cancel(self, transfer: Transfer) -> None:
        transfer.wanted = False
        transfer._unclaimed.clear()
        self._settle_if_over(transfer)

    def _settle_if_over(self, transfer: Transfer) -> None:
        if transfer.is_settled or transfer._reading or transfer._unclaimed:
            return
        transfer.state = self._outcome(transfer)
        self._unsettled.discard(transfer)
        if not self._unsettled:
            self._count_busy()
        self._finished.append(transfer)
        self._settled.notify_all()

    def _begin_busy(self, transfer: Transfer) -> None:
        if not self._unsettled:
            self._busy_since_s = self._clock()
        self._unsettled.add(transfer)

    def _count_busy(self) -> None:
        now = self._clock()
        self._busy_s += now - self._busy_since_s
        self._busy_since_s = now

    @staticmethod
    def _outcome(transfer: Transfer) -> TransferState:
        if transfer.error is not None:
            return TransferState.FAILED
        return TransferState.DONE if transfer.wanted else TransferState.CANCELLED
