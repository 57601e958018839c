"""Transfers that the kernel carries out by itself, where nothing but reading is to be done.

The computing thread hands a load over whole and looks at every call whether some are over: no
thread has to be woken while all processors compute. What else there is (checksums that were not
looked at yet, memory that is used for the first time or still written to, files without direct I/O,
more than a queue takes, errors) is left to the threads of TransferEngine.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from moe_infinity.cache.early_reads import Begun, EarlyReads
from moe_infinity.cache.transfer import Transfer, TransferEngine, TransferState
from moe_infinity.checkpoint.base import ExpertStore
from moe_infinity.checkpoint.direct_io import address_of
from moe_infinity.checkpoint.kernel_reads import KernelRead, KernelReads
from moe_infinity.types import ExpertKey, Priority, ReadRange

_log = logging.getLogger(__name__)
DEPTH = 128  # chunks under way, of a queue of ours
# Of what is loaded ahead, under way at once: a demand that comes meanwhile waits for no more.
_MOST_AHEAD_BYTES = 8 * 1024**2
# A file system that reads before it returns makes the caller wait: so many loads one after the
# other that were over when they had been handed over, each of which took so long.
_MOST_WAITED, _WAITED_S = 8, 1e-3


@dataclass(frozen=True, slots=True)
class _Chunk:
    """Of a transfer, on its way through the kernel."""

    transfer: Transfer
    range: ReadRange


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
        """reads: closed with the engine."""
        self._reads = reads
        self._numbers = itertools.count()
        # By number: what the kernel may write to. Under the lock, for threads settle transfers too.
        self._under_way: dict[int, _Chunk] = {}
        self._requests: list[KernelRead] = []  # of these, not handed over yet
        self._used: set[int] = set()  # addresses of buffers that were filled: their memory is there
        self._held: deque[Transfer] = deque()  # guesses, ahead of too much that is under way
        self._are_guesses = False
        self._num_waited = 0  # loads in a row
        self._is_given_up = False
        self._early = EarlyReads(reads, store.specs)
        self._begun_early: dict[ExpertKey, tuple[Transfer, int]] = {}  # not claimed; its spare
        super().__init__(store, num_threads, chunk_bytes, clock)

    def expect_guesses(self, are_guesses: bool) -> None:
        self._are_guesses = are_guesses

    @property
    def early(self) -> EarlyReads | None:
        return self._early

    def take_begun(self, key: ExpertKey) -> tuple[Transfer, int] | None:
        with self._lock:
            found = self._begun_early.pop(key, None)
            if found is not None and found[0].is_settled:
                self._finished.append(found[0])
        return found

    def plan_early(self, key: ExpertKey) -> None:
        if self._early.is_planned(key):
            return
        pieces = self._store.chunks(key, self._chunk_bytes)
        files = self._store.descriptors(key, pieces)
        if files is not None:
            self._early.plan(key, pieces, files)

    def take_settled(self) -> list[Transfer]:
        self._look()
        return super().take_settled()

    def take_activity(self) -> tuple[float, int]:
        self._look()
        return super().take_activity()

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
        if not self._closing:
            self._stop()
        super().drain()

    def close(self) -> None:
        self._reads.end()
        self._early.close()
        self._forget()
        super().close()
        self._reads.close()

    def _enqueue(self, transfer: Transfer) -> None:
        """To the kernel what it can do by itself. The lock is held."""
        descriptors = self._descriptors_of(transfer)
        if descriptors is None:
            super()._enqueue(transfer)
        elif not self._is_too_far_ahead(transfer):
            self._request(transfer, descriptors)
        elif self._are_guesses:
            self._held.append(transfer)
        else:
            super()._enqueue(transfer)

    def _request(self, transfer: Transfer, descriptors: Sequence[int]) -> None:
        start = address_of(transfer._buffer)
        pieces = list(zip(transfer._unclaimed, descriptors, strict=True))
        for piece, fd in reversed(pieces):  # the first is the last
            number = next(self._numbers)
            self._under_way[number] = _Chunk(transfer, piece)
            place = (piece.file_offset, piece.num_bytes, start + piece.slot_offset)
            self._requests.append(KernelRead(number, fd, *place))
        transfer._unclaimed.clear()

    def _descriptors_of(self, transfer: Transfer) -> list[int] | None:
        """Of the chunks that are left, if the kernel can and may read them."""
        chunks = transfer._unclaimed
        if not chunks or transfer._after is not None or self._is_given_up:
            return None
        if address_of(transfer._buffer) not in self._used:  # memory has to be found for it
            return None
        if len(self._under_way) + len(chunks) > self._reads.depth:
            return None
        return self._store.descriptors(transfer.key, chunks)

    def _is_too_far_ahead(self, transfer: Transfer) -> bool:
        """Whether it waits until others that were loaded ahead have arrived."""
        if transfer.priority is Priority.DEMAND:
            return False
        ahead_bytes = sum(
            chunk.range.num_bytes
            for chunk in self._under_way.values()
            if chunk.transfer.priority is Priority.PREFETCH
        )
        own_bytes = sum(chunk.num_bytes for chunk in transfer._unclaimed)
        return ahead_bytes > 0 and ahead_bytes + own_bytes > _MOST_AHEAD_BYTES

    def _begin_held(self) -> None:
        """What was held back, as far as there is room now."""
        if not self._held:
            return
        with self._lock:
            while self._held:
                transfer = self._held[0]
                if transfer._unclaimed and self._is_too_far_ahead(transfer):
                    break
                self._held.popleft()
                if transfer._unclaimed:  # else promoted or cancelled meanwhile
                    self._enqueue(transfer)
        self._hand_over()

    def _finish_chunk(
        self, transfer: Transfer, num_bytes: int, error: BaseException | None
    ) -> None:
        super()._finish_chunk(transfer, num_bytes, error)
        self._reads.ring()

    def _settle_if_over(self, transfer: Transfer) -> None:
        if not any(chunk.transfer is transfer for chunk in self._under_way.values()):
            super()._settle_if_over(transfer)
            if transfer.state is TransferState.DONE:
                self._used.add(address_of(transfer._buffer))
            if transfer.is_settled and transfer.key in self._begun_early:
                self._finished.remove(transfer)  # until somebody decides on it

    def _hand_over(self) -> None:
        requests, self._requests = self._requests, []
        if not requests:
            return
        start = self._clock()
        num_taken = self._reads.begin(requests)
        has_waited = self._clock() - start > _WAITED_S
        self._give_to_threads([each.number for each in requests[num_taken:]])  # there is no room
        if has_waited:
            self._look()
        are_over = has_waited and not any(r.number in self._under_way for r in requests)
        self._num_waited = self._num_waited + 1 if are_over else 0
        if self._num_waited == _MOST_WAITED:
            self._give_up("the file system reads before it returns")

    def _look(self) -> None:
        """Settle what is over."""
        for begun in self._early.unseen():
            self._take_over(begun)
        bad = []
        for number, num_read in self._reads.take_finished():
            chunk = self._under_way[number]
            if num_read < chunk.range.needed_bytes:
                bad.append(number)
                continue
            with self._lock:
                del self._under_way[number]
                self._bytes_read += num_read
                self._settle_if_over(chunk.transfer)
        self._give_to_threads(bad)  # they try again, and say what is wrong
        self._begin_held()

    def _take_over(self, begun: Begun) -> None:
        """As if it had been submitted, but that nobody is told of its end before it is claimed."""
        pieces = self._store.chunks(begun.key, self._chunk_bytes)
        transfer = Transfer(begun.key, begun.buffer, pieces, Priority.DEMAND, None)
        with self._lock:
            self._begin_busy(transfer)
            self._begun_early[begun.key] = transfer, begun.spare
            for number in range(begun.num_pieces):
                piece = transfer._unclaimed.pop()
                self._under_way[begun.number_of(number)] = _Chunk(transfer, piece)
            self._early.see(begun)
            if transfer._unclaimed:  # the queue was full
                super()._enqueue(transfer)

    def _give_to_threads(self, numbers: Sequence[int]) -> None:
        if not numbers:
            return
        with self._lock:
            chunks = [self._under_way.pop(number) for number in numbers]
            for chunk in chunks:
                if chunk.transfer.wanted and chunk.transfer.error is None:
                    chunk.transfer._unclaimed.append(chunk.range)
            for transfer in {chunk.transfer: None for chunk in chunks}:
                super()._enqueue(transfer)
                self._settle_if_over(transfer)

    def _give_up(self, why: str) -> None:
        self._is_given_up = True
        self._early.end()
        _log.info("experts are read by threads from now on: %s", why)

    def _stop(self) -> None:
        """The kernel writes to no buffer any more, whatever an exception has left of ours."""
        try:
            self._reads.stop()
        except OSError as error:
            self._give_up(str(error))
        self._forget()
        self._early.forget()

    def _forget(self) -> None:
        """Reads that the kernel does not carry out any more: their transfers have failed."""
        with self._lock:
            for chunk in self._under_way.values():
                chunk.transfer.wanted = False
            self._under_way.clear()
            self._requests.clear()
            self._begun_early.clear()
