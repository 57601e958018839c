"""Transfers by the kernel: the same promises as those by threads, over real files."""

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_infinity import MoE, bundled_model_path
from moe_infinity.cache.queued import DEPTH, QueuedTransfers
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

NUM_EXPERTS, PAGES = 6, 5
KEYS = [ExpertKey(0, expert) for expert in range(NUM_EXPERTS)]


def kernel_reads() -> KernelReads:
    try:
        return KernelReads(DEPTH)
    except OSError:
        pytest.skip("no kernel queues of reads here")


class Held(KernelReads):
    """Whose reads are not told of before a test says so."""

    def __init__(self) -> None:
        super().__init__(DEPTH)
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


@pytest.fixture
def files(tmp_path: Path) -> Iterator[list[DirectFile]]:
    """One of whole experts; one of a page each, the last of which is not whole."""
    for name, size in (("first", NUM_EXPERTS * PAGES * PAGE), ("second", NUM_EXPERTS * PAGE - 100)):
        (tmp_path / name).write_bytes(os.urandom(size))
    opened = [DirectFile(tmp_path / "first"), DirectFile(tmp_path / "second")]
    yield opened
    for file in opened:
        file.close()


@pytest.fixture
def store(files: list[DirectFile]) -> FileStore:
    specs = {}
    for number, key in enumerate(KEYS):
        ranges = (
            ReadRange(0, number * PAGES * PAGE, PAGES * PAGE, PAGES * PAGE, 0),
            ReadRange(1, number * PAGE, PAGE, 200, PAGES * PAGE),
        )
        specs[key] = ExpertSpec(key, (), ranges, PAGES * PAGE + 200)
    return FileStore(specs, files)


@pytest.fixture
def engine(store: FileStore) -> Iterator[QueuedTransfers]:
    engine = QueuedTransfers(store, 1, PAGE, kernel_reads())
    yield engine
    engine.close()


@pytest.fixture
def held() -> Held:
    kernel_reads().close()
    return Held()


@pytest.fixture
def held_engine(store: FileStore, held: Held) -> Iterator[QueuedTransfers]:
    engine = QueuedTransfers(store, 1, PAGE, held)
    yield engine
    engine.close()


def buffer() -> memoryview:
    return memoryview(allocate((PAGES + 1) * PAGE))


def content(files: Sequence[DirectFile], key: ExpertKey) -> bytes:
    first = files[0].path.read_bytes()[key.expert * PAGES * PAGE :][: PAGES * PAGE]
    return first + files[1].path.read_bytes()[key.expert * PAGE :][:200]


def settle(engine: TransferEngine, *transfers: Transfer) -> list[TransferState]:
    missing = set(transfers)
    while missing:
        engine.wait_any()
        missing -= set(engine.take_settled())
    return [transfer.state for transfer in transfers]


def forbid_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> int:
        raise AssertionError("a thread has read")

    monkeypatch.setattr(os, "preadv", refuse)


def test_every_expert_without_a_thread(
    engine: QueuedTransfers, files: list[DirectFile], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = {key: content(files, key) for key in KEYS}
    forbid_threads(monkeypatch)
    buffers = {key: buffer() for key in KEYS}
    transfers = [engine.submit(key, into, Priority.DEMAND) for key, into in buffers.items()]
    assert set(settle(engine, *transfers)) == {TransferState.DONE}
    for key, into in buffers.items():
        assert bytes(into[: PAGES * PAGE + 200]) == expected[key]
    busy_s, num_bytes = engine.take_activity()
    assert busy_s > 0
    assert num_bytes >= sum(map(len, expected.values()))


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_order_of_calls(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """Submits, promotions, cancellations and looks, in any order: what is done holds its bytes, and
    everything settles once."""
    folder = tmp_path_factory.mktemp("any")
    (folder / "first").write_bytes(os.urandom(NUM_EXPERTS * PAGES * PAGE))
    file = DirectFile(folder / "first")
    whole = {
        k: (ReadRange(0, k.expert * PAGES * PAGE, PAGES * PAGE, PAGES * PAGE, 0),) for k in KEYS
    }
    store = FileStore({k: ExpertSpec(k, (), r, PAGES * PAGE) for k, r in whole.items()}, [file])
    engine = QueuedTransfers(store, 2, PAGE, kernel_reads())
    raw, begun, settled = file.path.read_bytes(), {}, []
    try:
        for _ in range(data.draw(st.integers(1, 25))):
            key = data.draw(st.sampled_from(KEYS))
            word = data.draw(st.sampled_from(["submit", "cancel", "promote", "look", "wait"]))
            if word == "submit" and key not in begun:
                into = memoryview(allocate(PAGES * PAGE))
                after = data.draw(st.sampled_from([None, lambda: None]))
                priority = data.draw(st.sampled_from(Priority))
                begun[key] = (engine.submit(key, into, priority, after), into)
            elif word == "cancel" and key in begun:
                engine.cancel(begun[key][0])
            elif word == "promote" and key in begun:
                engine.promote(begun[key][0])
            elif word == "look":
                settled += engine.take_settled()
            elif word == "wait" and len(settled) < len(begun):
                engine.wait_any()
        while len(settled) < len(begun):
            engine.wait_any()
            settled += engine.take_settled()
        assert len(set(settled)) == len(settled)
        for key, (transfer, into) in begun.items():
            if transfer.state is not TransferState.DONE:
                assert transfer.state is TransferState.CANCELLED
                assert not transfer.wanted
            else:
                start = key.expert * PAGES * PAGE
                assert bytes(into) == raw[start : start + PAGES * PAGE]
    finally:
        engine.close()
        file.close()


def test_demands_go_first_and_little_is_loaded_ahead_at_once(
    held_engine: QueuedTransfers, held: Held, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moe_infinity.cache.queued._MOST_AHEAD_BYTES", 2 * PAGE)
    ahead = [held_engine.submit(key, buffer(), Priority.PREFETCH) for key in KEYS[:3]]
    assert len(held.begun) == 2
    demand = held_engine.submit(KEYS[3], buffer(), Priority.DEMAND)
    assert len(held.begun) == 2 + PAGES + 1
    held_engine.promote(ahead[1])
    assert len(held.begun) == 2 + 2 * (PAGES + 1)
    held.is_held = False
    assert set(settle(held_engine, demand, *ahead)) == {TransferState.DONE}


def test_what_is_cancelled_settles_when_the_kernel_has_done(
    held_engine: QueuedTransfers, held: Held, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moe_infinity.cache.queued._MOST_AHEAD_BYTES", PAGE)
    begun, waiting = (held_engine.submit(key, buffer(), Priority.PREFETCH) for key in KEYS[:2])
    held_engine.cancel(begun)
    held_engine.cancel(waiting)
    assert held_engine.take_settled() == [waiting]
    assert not begun.is_settled
    held.is_held = False
    assert settle(held_engine, begun) == [TransferState.CANCELLED]
    assert len(held.begun) == 1


def test_drain_waits_for_the_kernel(held_engine: QueuedTransfers, files: list[DirectFile]) -> None:
    into = buffer()
    transfer = held_engine.submit(KEYS[0], into, Priority.DEMAND)
    held_engine.drain()
    assert transfer.state is TransferState.CANCELLED
    into[:] = marked = b"\x5a" * len(into)
    other = held_engine.submit(KEYS[1], buffer(), Priority.DEMAND)
    held_engine._reads.is_held = False  # type: ignore[attr-defined]
    assert settle(held_engine, other) == [TransferState.DONE]
    assert bytes(into) == marked


def test_what_the_kernel_does_not_take_threads_do(
    held_engine: QueuedTransfers, held: Held, files: list[DirectFile]
) -> None:
    held.refuses = True
    into = buffer()
    transfer = held_engine.submit(KEYS[2], into, Priority.DEMAND)
    assert settle(held_engine, transfer) == [TransferState.DONE]
    assert bytes(into[: PAGES * PAGE + 200]) == content(files, KEYS[2])


def test_what_has_to_wait_for_its_buffer_waits_in_a_thread(engine: QueuedTransfers) -> None:
    may_go, into = threading.Event(), buffer()

    def wait() -> None:
        may_go.wait()

    transfer = engine.submit(KEYS[0], into, Priority.DEMAND, after=wait)
    other = engine.submit(KEYS[1], buffer(), Priority.DEMAND)
    assert settle(engine, other) == [TransferState.DONE]
    assert not any(into)
    may_go.set()
    assert settle(engine, transfer) == [TransferState.DONE]


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
    harm(files[0])
    transfer = engine.submit(KEYS[4], buffer(), priority)
    assert settle(engine, transfer) == [TransferState.FAILED]
    assert isinstance(transfer.error, expected)


def test_a_file_system_that_reads_at_once_is_left_to_threads(
    store: FileStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seconds are counted by a clock that goes on only while reads are handed over."""
    now = [0.0]

    class Blocking(KernelReads):
        def begin(self, reads: Sequence[KernelRead]) -> int:
            now[0] += 1.0
            return super().begin(reads)

    kernel_reads().close()
    engine = QueuedTransfers(store, 1, PAGE, Blocking(DEPTH), clock=lambda: now[0])
    try:
        for _ in range(12):
            assert settle(engine, engine.submit(KEYS[0], buffer(), Priority.DEMAND)) == [
                TransferState.DONE
            ]
        assert engine._is_given_up
        assert engine._num_tried < 12 * (PAGES + 1)
    finally:
        engine.close()


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
    kernel_reads().close()
    with MoE(bundled_model_path(), ram="8GiB", ram_slots=40) as moe:
        engine = moe._hierarchy._engine  # type: ignore[attr-defined]
        assert isinstance(engine, QueuedTransfers)
        with monkeypatch.context() as patch:
            forbid_threads(patch)
            moe.generate([[1, 2, 3]], max_new_tokens=4)
        assert moe.stats().decode.misses
    with MoE(bundled_model_path(), ram="8GiB", ram_slots=40, num_read_threads=2) as moe:
        assert type(moe._hierarchy._engine) is TransferEngine  # type: ignore[attr-defined]
