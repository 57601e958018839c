"""The transfer engine, with reads that wait for the test's word: nothing here depends on time."""

import threading
import time
from collections.abc import Iterator

import pytest

from moe_infinity.cache.transfer import TransferEngine, TransferState
from moe_infinity.checkpoint.direct_io import ALIGNMENT_BYTES as PAGE
from moe_infinity.checkpoint.direct_io import allocate
from moe_infinity.errors import ReadError
from moe_infinity.types import ExpertKey, Priority
from support.routing import grid
from support.stores import ScriptedStore, memory_store, settle, wait_until

SHAPE = grid(1, 6)
PAGES = 3  # of the first part; the second is one more chunk
A, B, C, D = (ExpertKey(0, expert) for expert in range(4))


def buffer() -> memoryview:
    return memoryview(allocate((PAGES + 1) * PAGE))


@pytest.fixture
def store() -> ScriptedStore:
    return ScriptedStore(memory_store(SHAPE, PAGES))


@pytest.fixture
def engine(store: ScriptedStore) -> Iterator[TransferEngine]:
    """One worker, so that the order of service shows."""
    engine = TransferEngine(store, num_threads=1, chunk_bytes=PAGE)
    yield engine
    for key in store.specs:
        store.release(key)
    engine.close()


def test_fills_the_buffer_chunk_by_chunk(store: ScriptedStore, engine: TransferEngine) -> None:
    into = buffer()
    assert settle(engine, engine.submit(B, into, Priority.DEMAND)) == [TransferState.DONE]
    first, second = store.specs[B].ranges
    raw = store._store._files
    whole = raw[0][first.file_offset : first.file_offset + first.num_bytes]
    assert bytes(into[: PAGES * PAGE]) == whole
    assert bytes(into[PAGES * PAGE :][:200]) == raw[1][second.file_offset :][:200]
    assert store.reads == [(B, page * PAGE) for page in range(PAGES + 1)]


def test_demand_waits_for_one_chunk_of_a_prefetch(
    store: ScriptedStore, engine: TransferEngine
) -> None:
    store.hold(A)
    prefetch = engine.submit(A, buffer(), Priority.PREFETCH)
    store.wait_for_reads(1)
    demand = engine.submit(B, buffer(), Priority.DEMAND)
    store.release(A, 1)
    assert settle(engine, demand) == [TransferState.DONE]
    store.release(A)
    assert settle(engine, prefetch) == [TransferState.DONE]
    assert [key for key, _ in store.reads] == [A] + [B] * 4 + [A] * 3


def test_promotion_goes_ahead_of_other_prefetches(
    store: ScriptedStore, engine: TransferEngine
) -> None:
    store.hold(A)
    first = engine.submit(A, buffer(), Priority.PREFETCH)
    store.wait_for_reads(1)
    second = engine.submit(B, buffer(), Priority.PREFETCH)
    third = engine.submit(C, buffer(), Priority.PREFETCH)
    engine.promote(third)
    engine.promote(third)  # twice changes nothing
    store.release(A)
    assert settle(engine, first, second, third) == [TransferState.DONE] * 3
    assert [key for key, _ in store.reads] == [A] + [C] * 4 + [A] * 3 + [B] * 4


def test_prefetches_are_served_in_order(store: ScriptedStore, engine: TransferEngine) -> None:
    store.hold(A)
    transfers = [engine.submit(key, buffer(), Priority.PREFETCH) for key in (A, B, C)]
    store.release(A)
    settle(engine, *transfers)
    assert [key for key, _ in store.reads] == [A] * 4 + [B] * 4 + [C] * 4


def test_a_cancelled_transfer_that_no_one_reads_settles_at_once(
    store: ScriptedStore, engine: TransferEngine
) -> None:
    store.hold(A)
    engine.submit(A, buffer(), Priority.DEMAND)
    store.wait_for_reads(1)
    queued = engine.submit(B, buffer(), Priority.PREFETCH)
    engine.cancel(queued)
    assert queued.is_settled and queued.state is TransferState.CANCELLED
    engine.cancel(queued)
    assert engine.take_settled() == [queued]
    store.release(A)
    engine.wait_any()
    assert B not in {key for key, _ in store.reads}


def test_a_cancelled_transfer_finishes_the_chunk_being_read(
    store: ScriptedStore, engine: TransferEngine
) -> None:
    store.hold(A)
    transfer = engine.submit(A, buffer(), Priority.PREFETCH)
    store.wait_for_reads(1)
    engine.cancel(transfer)
    engine.promote(transfer)  # too late to save it
    assert not transfer.is_settled, "a thread still writes to its buffer"
    store.release(A)
    assert settle(engine, transfer) == [TransferState.CANCELLED]
    assert len(store.reads) == 1


def test_an_error_ends_a_transfer_and_no_other(
    store: ScriptedStore, engine: TransferEngine
) -> None:
    broken = ReadError("the disk is on fire")
    store.errors[A] = [broken]
    failed = engine.submit(A, buffer(), Priority.DEMAND)
    sound = engine.submit(B, buffer(), Priority.DEMAND)
    assert settle(engine, failed, sound) == [TransferState.FAILED, TransferState.DONE]
    assert failed.error is broken
    assert [key for key, _ in store.reads] == [A] + [B] * 4


def test_short_reads_are_errors(engine: TransferEngine, store: ScriptedStore) -> None:
    files = store._store._files
    files[1] = files[1][: 3 * PAGE + 50]
    whole = engine.submit(C, buffer(), Priority.DEMAND)
    short = engine.submit(D, buffer(), Priority.DEMAND)
    assert settle(engine, whole, short) == [TransferState.DONE, TransferState.FAILED]
    assert isinstance(short.error, ReadError)


def test_chunks_of_one_expert_are_read_by_several_threads(store: ScriptedStore) -> None:
    store.hold(A)
    engine = TransferEngine(store, num_threads=3, chunk_bytes=PAGE)
    transfer = engine.submit(A, buffer(), Priority.DEMAND)
    store.wait_for_reads(3)
    store.release(A)
    assert settle(engine, transfer) == [TransferState.DONE]
    assert sorted(offset for _, offset in store.reads) == [page * PAGE for page in range(4)]
    engine.close()


def test_an_error_waits_for_the_chunks_still_being_read(store: ScriptedStore) -> None:
    """Until the last thread is out of the buffer, its slot must not be given away."""
    store.hold(A)
    store.errors[A] = [ReadError("first"), ReadError("second")]
    engine = TransferEngine(store, num_threads=2, chunk_bytes=PAGE)
    transfer = engine.submit(A, buffer(), Priority.DEMAND)
    store.wait_for_reads(2)
    store.release(A, 1)
    wait_until(lambda: len(store.errors[A]) == 1)
    assert not transfer.is_settled
    store.release(A)
    assert settle(engine, transfer) == [TransferState.FAILED]
    assert str(transfer.error) == "first" and len(store.reads) == 2
    engine.close()


def test_waiting_for_nothing_is_refused(engine: TransferEngine) -> None:
    with pytest.raises(AssertionError, match="nothing is in flight"):
        engine.wait_any()


def test_waiting_measures_with_the_clock_it_was_given(store: ScriptedStore) -> None:
    times: list[float] = []

    def clock() -> float:
        times.append(10.0 * len(times))
        if len(times) == 2:  # the waiting has begun
            store.release(A)
        return times[-1]

    engine = TransferEngine(store, 1, PAGE, clock)
    store.hold(A)
    transfer = engine.submit(A, buffer(), Priority.DEMAND)
    assert engine.wait_any() >= 10.0
    assert engine.wait_any() == 0.0, "what has settled and was not taken is not waited for"
    assert engine.take_settled() == [transfer]
    engine.close()


def test_drain_forgets_everything_once_no_thread_writes(
    store: ScriptedStore, engine: TransferEngine
) -> None:
    done = engine.submit(C, buffer(), Priority.DEMAND)
    engine.wait_any()
    store.hold(A)
    reading = engine.submit(A, buffer(), Priority.DEMAND)
    store.wait_for_reads(5)
    queued = engine.submit(B, buffer(), Priority.PREFETCH)

    def release_once_cancelled() -> None:
        while reading.wanted:
            time.sleep(0.001)
        store.release(A)

    threading.Thread(target=release_once_cancelled).start()
    engine.drain()
    assert [t.state for t in (done, reading, queued)] == [
        TransferState.DONE,
        TransferState.CANCELLED,
        TransferState.CANCELLED,
    ]
    assert engine.take_settled() == []
    engine.drain()


def test_close_ends_every_thread_and_drops_what_is_queued(store: ScriptedStore) -> None:
    before = set(threading.enumerate())
    engine = TransferEngine(store, num_threads=3, chunk_bytes=PAGE)
    mine = set(threading.enumerate()) - before
    assert {t.name for t in mine} == {f"moe-infinity-read-{i}" for i in range(3)}
    store.hold(A)
    reading = engine.submit(A, buffer(), Priority.DEMAND)
    store.wait_for_reads(3)
    queued = engine.submit(B, buffer(), Priority.DEMAND)
    closer = threading.Thread(target=engine.close)
    closer.start()
    wait_until(lambda: queued.is_settled)
    store.release(A)
    closer.join()
    engine.close()
    assert reading.is_settled and B not in {key for key, _ in store.reads}
    assert not any(thread.is_alive() for thread in mine)
    with pytest.raises(RuntimeError, match="closed"):
        engine.submit(C, buffer(), Priority.DEMAND)
