"""Transfers by the kernel: the same promises as those by threads, over real files."""

import ctypes
import errno
import os
import random
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_infinity import MoE, bundled_model_path
from moe_infinity.cache import queued
from moe_infinity.cache.queued import QueuedTransfers
from moe_infinity.cache.transfer import Transfer, TransferEngine, TransferState
from moe_infinity.checkpoint.direct_io import ALIGNMENT_BYTES as PAGE
from moe_infinity.checkpoint.direct_io import DirectFile, allocate
from moe_infinity.checkpoint.kernel_reads import KernelRead, KernelReads
from moe_infinity.checkpoint.packed import PackedCheckpoint
from moe_infinity.checkpoint.packing import pack
from moe_infinity.checkpoint.safetensors import FileStore
from moe_infinity.errors import CheckpointChangedError, ReadError
from moe_infinity.preparation import opened_source, packing_job
from moe_infinity.types import ExpertKey, ExpertSpec, Priority, ReadRange
from support.kernel_queues import require_kernel_queues
from support.stores import settle, wait_until

NUM_EXPERTS, PAGES = 6, 5
WORDS = ("submit", "submit", "submit", "cancel", "promote", "look", "look", "drain")
KEYS = [ExpertKey(0, expert) for expert in range(NUM_EXPERTS)]


@pytest.fixture(scope="module", autouse=True)
def possible() -> None:
    require_kernel_queues()


class Held(KernelReads):
    """Whose reads are not told of before a test says so, and which may refuse."""

    def __init__(self) -> None:
        super().__init__(queued.DEPTH)
        self.begun: list[KernelRead] = []
        self.is_held = True
        self.refuses = False

    def begin(self, reads: Sequence[KernelRead]) -> int:
        if self.refuses:
            return 0
        self.begun += reads
        return super().begin(reads)

    def take_finished(self) -> list[tuple[int, int]]:
        return [] if self.is_held else super().take_finished()


class Unreliable(KernelReads):
    """Whose every call a die decides about; of a read that goes wrong no byte is right."""

    def __init__(self, throw: Callable[[], int]) -> None:
        super().__init__(14)
        self._throw = throw
        self._places: dict[int, tuple[int, int]] = {}  # address and bytes, by number

    def begin(self, reads: Sequence[KernelRead]) -> int:
        self._places |= {each.number: (each.address, each.num_bytes) for each in reads}
        return super().begin(reads[: self._throw()])

    def take_finished(self) -> list[tuple[int, int]]:
        return [(n, self._result(n, done)) for n, done in super().take_finished()]

    def _result(self, number: int, done: int) -> int:
        bad = {0: -errno.EIO, 1: 0, 2: 100}.get(self._throw())
        if bad is None:
            return done
        address, num_bytes = self._places[number]
        ctypes.memset(address, 0xAB, num_bytes)
        return bad


def make_files(folder: Path) -> list[DirectFile]:
    """One of whole experts; one of a page each, the last of which is not whole."""
    for name, size in (("first", NUM_EXPERTS * PAGES * PAGE), ("second", NUM_EXPERTS * PAGE - 100)):
        (folder / name).write_bytes(os.urandom(size))
    return [DirectFile(folder / "first"), DirectFile(folder / "second")]


def store_of(files: list[DirectFile]) -> FileStore:
    specs = {}
    for number, key in enumerate(KEYS):
        ranges = (
            ReadRange(0, number * PAGES * PAGE, PAGES * PAGE, PAGES * PAGE, 0),
            ReadRange(1, number * PAGE, PAGE, 200, PAGES * PAGE),
        )
        specs[key] = ExpertSpec(key, (), ranges, PAGES * PAGE + 200)
    return FileStore(specs, files)


@pytest.fixture
def files(tmp_path: Path) -> Iterator[list[DirectFile]]:
    opened = make_files(tmp_path)
    yield opened
    for file in opened:
        file.close()


@pytest.fixture
def raw(files: list[DirectFile]) -> list[bytes]:
    return [file.path.read_bytes() for file in files]


@pytest.fixture
def engine(files: list[DirectFile]) -> Iterator[QueuedTransfers]:
    engine = QueuedTransfers(store_of(files), 1, PAGE, KernelReads(queued.DEPTH))
    yield engine
    engine.close()


@pytest.fixture
def held() -> Held:
    return Held()


@pytest.fixture
def held_engine(files: list[DirectFile], held: Held) -> Iterator[QueuedTransfers]:
    engine = QueuedTransfers(store_of(files), 1, PAGE, held)
    yield engine
    engine.close()


def buffer() -> memoryview:
    return memoryview(allocate((PAGES + 1) * PAGE))


def warm(engine: QueuedTransfers, buffers: Sequence[memoryview]) -> None:
    """Only what was used before is the kernel's."""
    settle(engine, *(engine.submit(KEYS[0], into, Priority.DEMAND) for into in buffers))
    assert not engine._under_way


def warm_buffers(engine: QueuedTransfers, count: int) -> list[memoryview]:
    buffers = [buffer() for _ in range(count)]
    warm(engine, buffers)
    return buffers


def content(raw: Sequence[bytes], key: ExpertKey) -> bytes:
    first = raw[0][key.expert * PAGES * PAGE :][: PAGES * PAGE]
    return first + raw[1][key.expert * PAGE :][:200]


def forbid_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> int:
        raise AssertionError("a thread has read")

    monkeypatch.setattr(os, "preadv", refuse)


def test_memory_is_first_used_by_threads(held_engine: QueuedTransfers, held: Held) -> None:
    """Whoever finds it waits for it; being asked for alone does not make it there."""
    into = buffer()
    transfer = held_engine.submit(KEYS[0], into, Priority.PREFETCH)
    held_engine.cancel(transfer)
    settle(held_engine, transfer)
    if transfer.state is TransferState.CANCELLED:
        assert not held_engine._used
    warm(held_engine, [into])
    assert not held.begun
    held_engine.submit(KEYS[1], into, Priority.DEMAND)
    offsets = [each.offset for each in held.begun]
    assert offsets == sorted(offsets[:PAGES]) + offsets[PAGES:]
    assert len(offsets) == PAGES + 1


def test_every_expert_without_a_thread(
    engine: QueuedTransfers, raw: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    buffers = dict(zip(KEYS, warm_buffers(engine, NUM_EXPERTS), strict=True))
    engine.take_activity()
    forbid_threads(monkeypatch)
    transfers = [engine.submit(key, into, Priority.DEMAND) for key, into in buffers.items()]
    assert set(settle(engine, *transfers)) == {TransferState.DONE}
    for key, into in buffers.items():
        assert bytes(into[: PAGES * PAGE + 200]) == content(raw, key)
    busy_s, num_bytes = engine.take_activity()
    assert busy_s > 0
    assert num_bytes == NUM_EXPERTS * (PAGES + 1) * PAGE - 100


STEP = st.tuples(
    st.sampled_from(WORDS), st.sampled_from(KEYS), st.sampled_from(Priority), st.integers(0, 99)
)


@settings(max_examples=60, deadline=None)
@given(steps=st.lists(STEP, max_size=30), seed=st.integers(0, 10**6))
def test_any_order_of_calls(
    tmp_path_factory: pytest.TempPathFactory,
    steps: list[tuple[str, ExpertKey, Priority, int]],
    seed: int,
) -> None:
    """Loads into buffers used before, promotions, cancellations, looks and drains in any order, of
    a queue that is short, refuses, and whose reads fail: what is done holds its bytes, everything
    settles once, and nothing writes to a buffer afterwards."""
    folder = tmp_path_factory.mktemp("any")
    files = make_files(folder)
    raw = [file.path.read_bytes() for file in files]
    die = random.Random(seed)  # thrown as often as time will have it
    reads = Unreliable(lambda: die.randrange(10))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(queued, "_MOST_AHEAD_BYTES", 7 * PAGE)
        engine = QueuedTransfers(store_of(files), 2, PAGE, reads)
        engine.expect_guesses(seed % 2 == 0)
        free = [buffer() for _ in range(4)]
        warm(engine, free)
        begun: list[tuple[Transfer, memoryview]] = []
        try:
            for word, key, priority, which in steps:
                if word == "submit" and free:
                    into = free.pop()
                    into[:] = bytes(len(into))
                    begun.append((engine.submit(key, into, priority), into))
                elif word in ("cancel", "promote") and begun:
                    getattr(engine, word)(begun[which % len(begun)][0])
                elif word == "drain":
                    engine.drain()
                    assert all(transfer.is_settled for transfer, _ in begun)
                    free += [into for _, into in begun]
                    begun.clear()
                elif begun:
                    engine.wait_any()
                    for transfer in engine.take_settled():
                        (found,) = [each for each in begun if each[0] is transfer]
                        begun.remove(found)
                        check(raw, *found)
                        free.append(found[1])
        finally:
            engine.close()
            for file in files:
                file.close()


def check(raw: Sequence[bytes], transfer: Transfer, into: memoryview) -> None:
    if transfer.state is TransferState.DONE:
        assert bytes(into[: PAGES * PAGE + 200]) == content(raw, transfer.key)
    else:
        assert transfer.state is TransferState.CANCELLED
        assert not transfer.wanted


def test_what_is_loaded_ahead_for_sure_keeps_the_disk_busy(
    held_engine: QueuedTransfers, held: Held, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Threads read what is beyond, and nobody has to look."""
    monkeypatch.setattr(queued, "_MOST_AHEAD_BYTES", (PAGES + 1) * PAGE)
    one, other = warm_buffers(held_engine, 2)
    first = held_engine.submit(KEYS[0], one, Priority.PREFETCH)
    second = held_engine.submit(KEYS[1], other, Priority.PREFETCH)
    assert len(held.begun) == PAGES + 1
    assert settle(held_engine, second) == [TransferState.DONE]
    held.is_held = False
    assert settle(held_engine, first) == [TransferState.DONE]


def test_few_guesses_are_loaded_at_once(
    held_engine: QueuedTransfers, held: Held, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is beyond waits until that has arrived, in its order; a demand goes at once."""
    monkeypatch.setattr(queued, "_MOST_AHEAD_BYTES", (PAGES + 1) * PAGE)
    held_engine.expect_guesses(True)
    buffers = warm_buffers(held_engine, 4)
    ahead = [
        held_engine.submit(key, into, Priority.PREFETCH)
        for key, into in zip(KEYS, buffers[:3], strict=False)
    ]
    assert len(held.begun) == PAGES + 1
    demand = held_engine.submit(KEYS[3], buffers[3], Priority.DEMAND)
    assert len(held.begun) == 2 * (PAGES + 1)
    assert held_engine.take_settled() == []
    held.is_held = False
    assert settle(held_engine, demand, *ahead) == [TransferState.DONE] * 4
    firsts = [read.offset for read in held.begun[:: PAGES + 1]]
    assert firsts == [key.expert * PAGES * PAGE for key in (KEYS[0], KEYS[3], KEYS[1], KEYS[2])]


def test_what_is_larger_than_the_bound_is_loaded_alone(
    held_engine: QueuedTransfers, held: Held, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(queued, "_MOST_AHEAD_BYTES", PAGE)
    held_engine.expect_guesses(True)
    one, other = warm_buffers(held_engine, 2)
    held.is_held = False
    first = held_engine.submit(KEYS[0], one, Priority.PREFETCH)
    second = held_engine.submit(KEYS[1], other, Priority.PREFETCH)
    assert settle(held_engine, first, second) == [TransferState.DONE] * 2


def test_what_waits_for_others_can_be_cancelled(
    held_engine: QueuedTransfers, held: Held, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(queued, "_MOST_AHEAD_BYTES", PAGE)
    held_engine.expect_guesses(True)
    one, other = warm_buffers(held_engine, 2)
    held_engine.submit(KEYS[0], one, Priority.PREFETCH)
    second = held_engine.submit(KEYS[1], other, Priority.PREFETCH)
    held_engine.cancel(second)
    assert second.state is TransferState.CANCELLED
    held.is_held = False
    held_engine.drain()
    assert len(held.begun) == PAGES + 1


def test_no_more_is_handed_over_than_there_is_room_for(
    held_engine: QueuedTransfers, held: Held
) -> None:
    held.depth = 2 * PAGES + 1
    one, other = warm_buffers(held_engine, 2)
    first = held_engine.submit(KEYS[0], one, Priority.DEMAND)
    assert settle(held_engine, held_engine.submit(KEYS[1], other, Priority.DEMAND)) == [
        TransferState.DONE
    ]
    assert len(held.begun) == PAGES + 1
    held.is_held = False
    assert settle(held_engine, first) == [TransferState.DONE]


def test_a_demand_goes_ahead_of_what_it_waited_for(
    held_engine: QueuedTransfers, held: Held, monkeypatch: pytest.MonkeyPatch, raw: list[bytes]
) -> None:
    monkeypatch.setattr(queued, "_MOST_AHEAD_BYTES", PAGE)
    held_engine.expect_guesses(True)
    other, into = warm_buffers(held_engine, 2)
    first = held_engine.submit(KEYS[1], other, Priority.PREFETCH)
    transfer = held_engine.submit(KEYS[2], into, Priority.PREFETCH)
    assert len(held.begun) == PAGES + 1
    held_engine.promote(transfer)
    assert len(held.begun) == 2 * (PAGES + 1)
    held.is_held = False
    assert settle(held_engine, transfer, first) == [TransferState.DONE] * 2
    assert bytes(into[: PAGES * PAGE + 200]) == content(raw, KEYS[2])
    assert len(held.begun) == 2 * (PAGES + 1)


def test_a_demand_takes_what_threads_have_not_begun(
    held_engine: QueuedTransfers, held: Held, monkeypatch: pytest.MonkeyPatch, raw: list[bytes]
) -> None:
    (into,) = warm_buffers(held_engine, 1)
    with monkeypatch.context() as patch:
        patch.setattr(held, "depth", 0)
        patch.setattr(held_engine, "_is_held_back", lambda: True)
        transfer = held_engine.submit(KEYS[2], into, Priority.PREFETCH)
    assert not held.begun
    held_engine.promote(transfer)
    assert len(held.begun) == PAGES + 1
    held.is_held = False
    assert settle(held_engine, transfer) == [TransferState.DONE]
    assert bytes(into[: PAGES * PAGE + 200]) == content(raw, KEYS[2])


def test_what_is_cancelled_settles_when_the_kernel_has_done(
    held_engine: QueuedTransfers, held: Held
) -> None:
    (into,) = warm_buffers(held_engine, 1)
    transfer = held_engine.submit(KEYS[0], into, Priority.PREFETCH)
    held_engine.cancel(transfer)
    assert held_engine.take_settled() == []
    assert not transfer.is_settled
    held.is_held = False
    assert settle(held_engine, transfer) == [TransferState.CANCELLED]


@pytest.mark.parametrize("is_lost", [False, True])
def test_drain_waits_for_the_kernel(
    held_engine: QueuedTransfers, held: Held, is_lost: bool
) -> None:
    """Also for what an interrupt has made it forget."""
    into, other = warm_buffers(held_engine, 2)
    transfer = held_engine.submit(KEYS[0], into, Priority.DEMAND)
    if is_lost:
        held_engine._under_way.clear()
    held_engine.drain()
    assert transfer.state is TransferState.CANCELLED
    into[:] = marked = b"\x5a" * len(into)
    again = held_engine.submit(KEYS[1], other, Priority.DEMAND)
    held.is_held = False
    assert settle(held_engine, again) == [TransferState.DONE]
    assert bytes(into) == marked


def test_what_the_kernel_does_not_take_threads_do(
    held_engine: QueuedTransfers, held: Held, raw: list[bytes]
) -> None:
    (into,) = warm_buffers(held_engine, 1)
    held.refuses = True
    transfer = held_engine.submit(KEYS[2], into, Priority.DEMAND)
    assert settle(held_engine, transfer) == [TransferState.DONE]
    assert bytes(into[: PAGES * PAGE + 200]) == content(raw, KEYS[2])


def test_what_has_to_wait_for_its_buffer_waits_in_a_thread(engine: QueuedTransfers) -> None:
    may_go, (into, other) = threading.Event(), warm_buffers(engine, 2)
    into[:] = bytes(len(into))

    def wait() -> None:
        may_go.wait()

    transfer = engine.submit(KEYS[0], into, Priority.DEMAND, after=wait)
    beside = engine.submit(KEYS[1], other, Priority.DEMAND)
    assert settle(engine, beside) == [TransferState.DONE]
    assert not any(into)
    may_go.set()
    assert settle(engine, transfer) == [TransferState.DONE]


def test_time_in_which_nobody_computed_is_nobodys(files: list[DirectFile], held: Held) -> None:
    now = [0.0]
    engine = QueuedTransfers(store_of(files), 1, PAGE, held, clock=lambda: now[0])
    try:
        (into,) = warm_buffers(engine, 1)
        engine.take_activity()
        transfer = engine.submit(KEYS[0], into, Priority.PREFETCH)
        now[0] = 100.0
        engine.skip_time()
        now[0] = 101.0
        held.is_held = False
        assert settle(engine, transfer) == [TransferState.DONE]
        assert engine.take_activity() == (1.0, (PAGES + 1) * PAGE)
        held.is_held = True
        transfer = engine.submit(KEYS[0], into, Priority.PREFETCH)
        held.is_held = False
        wait_until(lambda: engine._look() or transfer.is_settled)
        engine.skip_time()
        assert engine.take_activity() == (0.0, 0)
    finally:
        engine.close()


def truncate(file: DirectFile) -> None:
    os.truncate(file.path, PAGE)
    stat = file.path.stat()
    file.num_bytes, file._changed_ns = stat.st_size, stat.st_mtime_ns


def touch(file: DirectFile) -> None:
    with file.path.open("ab") as other:
        other.write(b"more")


@pytest.mark.parametrize(
    ("harm", "expected"),
    [(truncate, ReadError), (touch, CheckpointChangedError), (DirectFile.close, ReadError)],
)
@pytest.mark.parametrize("priority", Priority)
def test_errors_are_those_of_threads(
    engine: QueuedTransfers,
    files: list[DirectFile],
    harm: Callable[[DirectFile], None],
    expected: type[Exception],
    priority: Priority,
) -> None:
    (into,) = warm_buffers(engine, 1)
    harm(files[0])
    transfer = engine.submit(KEYS[4], into, priority)
    assert settle(engine, transfer) == [TransferState.FAILED]
    assert isinstance(transfer.error, expected)


@pytest.mark.parametrize("handing_s", [1.0, 1e-4])
def test_a_file_system_that_reads_at_once_is_left_to_threads(
    files: list[DirectFile], handing_s: float
) -> None:
    """Unless it is quick. Seconds go by only while reads are handed over."""
    now = [0.0]

    class Blocking(KernelReads):
        def begin(self, reads: Sequence[KernelRead]) -> int:
            now[0] += handing_s
            taken = super().begin(reads)
            while len(self.over) < taken:
                self.over += super().take_finished()
            return taken

        def take_finished(self) -> list[tuple[int, int]]:
            found, self.over = self.over, []
            return found

        over: list[tuple[int, int]] = []  # noqa: RUF012

    engine = QueuedTransfers(store_of(files), 1, PAGE, Blocking(64), clock=lambda: now[0])
    try:
        (into,) = warm_buffers(engine, 1)
        for _ in range(8):
            assert not engine._is_given_up
            assert settle(engine, engine.submit(KEYS[0], into, Priority.DEMAND)) == [
                TransferState.DONE
            ]
        assert engine._is_given_up is (handing_s > 0.01)
    finally:
        engine.close()


def test_closing_leaves_no_queue_behind(engine: QueuedTransfers) -> None:
    engine.submit(KEYS[0], warm_buffers(engine, 1)[0], Priority.DEMAND)
    engine.close()
    engine.drain()
    assert not engine._reads._context.value
    with pytest.raises(RuntimeError, match="closed"):
        engine.submit(KEYS[0], buffer(), Priority.DEMAND)


def test_pieces_are_checked_before_the_kernel_reads_them(tmp_path: Path) -> None:
    with opened_source(bundled_model_path()) as opened:
        pack(packing_job(opened, tmp_path / "packed", "int4"), lambda _: None)
    checkpoint = PackedCheckpoint(tmp_path / "packed")
    key, spec = next(iter(checkpoint.packed_specs.items()))
    store = checkpoint.expert_store(checkpoint.packed_specs)
    chunks = store.chunks(key, 2**20)
    assert store.descriptors(key, chunks) is None
    slot = memoryview(allocate(spec.slot_bytes))
    for chunk in chunks:
        store.read_into(key, slot[chunk.slot_offset :][: chunk.num_bytes], chunk)
    assert store.descriptors(key, chunks) is not None
    checkpoint.close()


def test_a_model_reads_that_way(monkeypatch: pytest.MonkeyPatch) -> None:
    with MoE(bundled_model_path(), ram="8GiB", ram_slots=40) as moe:
        engine = moe._hierarchy._engine  # type: ignore[attr-defined]
        assert isinstance(engine, QueuedTransfers)
        moe.generate([[1, 2, 3]], max_new_tokens=4)  # the slots are used
        with monkeypatch.context() as patch:
            forbid_threads(patch)
            moe.generate([[1, 2, 3]], max_new_tokens=4)
        assert moe.stats().decode.misses
    assert not engine._reads._context.value
    with MoE(bundled_model_path(), ram="8GiB", ram_slots=40, num_read_threads=2) as moe:
        assert type(moe._hierarchy._engine) is TransferEngine  # type: ignore[attr-defined]
