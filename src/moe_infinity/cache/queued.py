"""Transfers that the kernel carries out by itself, where nothing but reading is to be done.

The computing thread hands their chunks over and looks at every call whether some are over: no
thread has to be woken while all processors compute. What else there is to do (checksums that were
not looked at yet, buffers that are still written to, files without direct I/O, errors) is left to
the threads of TransferEngine.
"""

from __future__ import annotations

import ctypes
import itertools
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

from moe_infinity.cache.transfer import Transfer, TransferEngine
from moe_infinity.checkpoint.base import ExpertStore
from moe_infinity.checkpoint.kernel_reads import KernelRead, KernelReads
from moe_infinity.types import ExpertKey, Priority, ReadRange

_log = logging.getLogger(__name__)
DEPTH = 64  # chunks under way
# Of what is loaded ahead, under way at once: a demand that comes meanwhile waits for no more.
_MOST_AHEAD_BYTES = 16 * 1024**2
_TRIAL_CHUNKS = 64  # after which it is known whether the file system reads while we compute


@dataclass(slots=True)
class _Chunk:
    """Of a transfer, on its way through the kernel."""

    transfer: Transfer
    range: ReadRange
    fd: int
    ahead_bytes: int  # its own, if it was begun ahead
    begun_s: float = 0.0
    handing_s: float = 0.0  # that handing it over took, and others with it


class QueuedTransfers(TransferEngine):
    """A TransferEngine whose plain reads go through a queue in the kernel. One thread owns it.

    Seconds in which reads were under way last until they were seen to be over.
    """

    def __init__(
        self,
        store: ExpertStore,
        num_threads: int,
        chunk_bytes: int,
        reads: KernelReads,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._reads = reads
        self._numbers = itertools.count()
        # For the kernel, with chunks unclaimed, and the file of each of these.
        self._waiting: list[tuple[Transfer, list[int]]] = []
        self._under_way: dict[int, _Chunk] = {}  # by number: what the kernel may write to
        self._is_given_up = False
        self._num_tried, self._handing_s, self._whole_s = 0, 0.0, 0.0
        super().__init__(store, num_threads, chunk_bytes, clock)

    def submit(
        self,
        key: ExpertKey,
        buffer: memoryview,
        priority: Priority,
        after: Callable[[], None] | None = None,
    ) -> Transfer:
        transfer = super().submit(key, buffer, priority, after)
        self._hand_over()
        return transfer

    def promote(self, transfer: Transfer) -> None:
        super().promote(transfer)
        self._hand_over()

    def take_settled(self) -> list[Transfer]:
        self._look()
        return super().take_settled()

    def wait_any(self) -> float:
        start = self._clock()
        while True:
            self._look()
            with self._lock:
                assert self._finished or self._unsettled, (
                    "nothing is in flight: this would wait forever"
                )
                if self._finished:
                    return self._clock() - start
            self._reads.wait()

    def drain(self) -> None:
        self._stop()
        super().drain()

    def close(self) -> None:
        self._reads.end()
        self._forget()
        super().close()
        self._reads.close()

    def _enqueue(self, transfer: Transfer) -> None:
        """To the kernel what it can do by itself. The lock is held."""
        if any(transfer is each for each, _ in self._waiting):
            return  # promoted: it is handed over next
        found = None
        if transfer._after is None and not self._is_given_up:
            found = self._store.descriptors(transfer.key, transfer._unclaimed)
        if found is None:
            super()._enqueue(transfer)
        else:
            self._waiting.append((transfer, found))

    def _finish_chunk(
        self, transfer: Transfer, num_bytes: int, error: BaseException | None
    ) -> None:
        super()._finish_chunk(transfer, num_bytes, error)
        self._reads.ring()

    def _settle_if_over(self, transfer: Transfer) -> None:
        if not any(chunk.transfer is transfer for chunk in self._under_way.values()):
            super()._settle_if_over(transfer)

    def _hand_over(self) -> None:
        """Give the kernel what it has room for, demands first."""
        if not self._waiting:
            return
        with self._lock:
            claimed = self._claim_some()
        start = self._clock()
        num_taken = self._reads.begin([_request(n, chunk) for n, chunk in claimed.items()])
        handing_s = self._clock() - start
        for place, (number, chunk) in enumerate(claimed.items()):
            chunk.begun_s, chunk.handing_s = start, handing_s
            if place >= num_taken:  # the system has no room for it
                self._give_to_threads(number)

    def _claim_some(self) -> dict[int, _Chunk]:
        """The lock is held."""
        room = DEPTH - len(self._under_way)
        ahead_bytes = sum(chunk.ahead_bytes for chunk in self._under_way.values())
        claimed: dict[int, _Chunk] = {}
        for transfer, fds in sorted(self._waiting, key=lambda each: each[0].priority):
            is_ahead = transfer.priority is Priority.PREFETCH
            while transfer._unclaimed and len(claimed) < room:
                if is_ahead and ahead_bytes >= _MOST_AHEAD_BYTES:
                    break
                piece = transfer._unclaimed.pop()
                own_bytes = piece.num_bytes if is_ahead else 0
                chunk = _Chunk(transfer, piece, fds[len(transfer._unclaimed)], own_bytes)
                number = next(self._numbers)
                claimed[number] = self._under_way[number] = chunk
                ahead_bytes += own_bytes
        self._waiting = [each for each in self._waiting if each[0]._unclaimed]
        return claimed

    def _look(self) -> None:
        """Settle what is over, and hand over more."""
        for number, num_read in self._reads.take_finished():
            chunk = self._under_way[number]
            self._judge(chunk)
            if num_read < chunk.range.needed_bytes:
                self._give_to_threads(number)  # they try again, and say what is wrong
                continue
            with self._lock:
                del self._under_way[number]
                self._bytes_read += num_read
                self._settle_if_over(chunk.transfer)
        self._hand_over()

    def _give_to_threads(self, number: int) -> None:
        """What is left of a chunk's transfer."""
        with self._lock:
            chunk = self._under_way.pop(number)
            transfer = chunk.transfer
            self._waiting = [each for each in self._waiting if each[0] is not transfer]
            if not transfer.wanted:
                self._settle_if_over(transfer)
                return
            transfer._unclaimed.append(chunk.range)
            super()._enqueue(transfer)

    def _judge(self, chunk: _Chunk) -> None:
        """Some file systems read before they return: then threads are better."""
        self._num_tried += 1
        self._handing_s += chunk.handing_s
        self._whole_s += self._clock() - chunk.begun_s
        if self._num_tried == _TRIAL_CHUNKS and self._handing_s > self._whole_s / 2:
            self._give_up("the file system makes the caller wait")

    def _give_up(self, why: str) -> None:
        self._is_given_up = True
        _log.info("experts are read by threads from now on: %s", why)

    def _stop(self) -> None:
        """The kernel writes to no buffer any more, and is given nothing more of what was begun."""
        try:
            self._reads.stop()
        except OSError as error:
            self._give_up(str(error))
        self._forget()

    def _forget(self) -> None:
        self._under_way.clear()
        self._waiting.clear()


def _request(number: int, chunk: _Chunk) -> KernelRead:
    start = chunk.range.slot_offset
    address = ctypes.addressof(ctypes.c_char.from_buffer(chunk.transfer._buffer, start))
    return KernelRead(number, chunk.fd, chunk.range.file_offset, chunk.range.num_bytes, address)
