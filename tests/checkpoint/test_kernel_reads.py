"""Reads that the kernel carries out: bytes, errors, waiting, and an end at any time."""

import ctypes
import os
import platform
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from moe_infinity.checkpoint import kernel_reads
from moe_infinity.checkpoint.direct_io import ALIGNMENT_BYTES as PAGE
from moe_infinity.checkpoint.direct_io import DirectFile, allocate
from moe_infinity.checkpoint.kernel_reads import KernelRead, KernelReads
from support.kernel_queues import queues_of_their_own, require_kernel_queues

NUM_PAGES = 40


@pytest.fixture(scope="module", autouse=True)
def possible() -> Iterator[None]:
    with queues_of_their_own():
        require_kernel_queues()
        yield


@pytest.fixture
def reads() -> Iterator[KernelReads]:
    found = KernelReads(8)
    yield found
    found.close()


@pytest.fixture
def file(tmp_path: Path) -> Iterator[DirectFile]:
    path = tmp_path / "data"
    path.write_bytes(os.urandom(NUM_PAGES * PAGE - 100))
    opened = DirectFile(path)
    yield opened
    opened.close()


def address(buffer: memoryview) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(buffer))


def read_of(number: int, file: DirectFile, page: int, pages: int, into: memoryview) -> KernelRead:
    fd = file.descriptor()
    assert fd is not None
    return KernelRead(number, fd, page * PAGE, pages * PAGE, address(into))


def all_finished(reads: KernelReads, count: int) -> dict[int, int]:
    found: dict[int, int] = {}
    while len(found) < count:
        reads.wait()
        found |= dict(reads.take_finished())
    return found


def test_reads_what_is_there(reads: KernelReads, file: DirectFile) -> None:
    buffers = [memoryview(allocate(5 * PAGE)) for _ in range(8)]
    wanted = [read_of(n, file, 5 * n, 5, into) for n, into in enumerate(buffers)]
    assert reads.begin(wanted) == 8
    found = all_finished(reads, 8)
    raw = file.path.read_bytes()
    assert found == {n: 5 * PAGE - (100 if n == 7 else 0) for n in range(8)}
    for number, into in enumerate(buffers):
        assert bytes(into)[: found[number]] == raw[5 * number * PAGE :][: found[number]]
    assert reads.take_finished() == []


def test_takes_no_more_than_there_is_room_for(reads: KernelReads, file: DirectFile) -> None:
    into = memoryview(allocate(PAGE))
    wanted = [read_of(n, file, n, 1, into) for n in range(12)]
    assert reads.begin(wanted) == 8
    assert reads.begin(wanted) == 0
    assert set(all_finished(reads, 8)) == set(range(8))
    assert reads.begin(wanted[8:]) == 4
    assert set(all_finished(reads, 4)) == {8, 9, 10, 11}


@pytest.mark.parametrize("fault", ["closed", "unaligned", "nowhere"])
def test_an_error_is_a_result_or_is_not_taken(
    reads: KernelReads, file: DirectFile, fault: str
) -> None:
    """And what comes after it in the same call is not lost: it is taken, or it is not."""
    into = memoryview(allocate(2 * PAGE))
    good = read_of(1, file, 0, 1, into)
    bad = {
        "closed": good._replace(number=0, fd=10**6),
        "unaligned": good._replace(number=0, offset=1),
        "nowhere": good._replace(number=0, address=PAGE),
    }[fault]
    taken = reads.begin([bad, good])
    found = all_finished(reads, taken)
    assert all(number == 1 or result < 0 for number, result in found.items())
    assert reads.begin([good]) == 1
    assert all_finished(reads, 1) == {1: PAGE}


def test_ringing_ends_a_wait(reads: KernelReads) -> None:
    timer = threading.Timer(0.05, reads.ring)
    timer.start()
    reads.wait()
    timer.join()
    assert reads.take_finished() == []


def test_stop_leaves_nothing_under_way(reads: KernelReads, file: DirectFile) -> None:
    """Also where an earlier attempt at it was interrupted."""
    into = memoryview(allocate(NUM_PAGES * PAGE))
    reads.begin([read_of(0, file, 0, NUM_PAGES, into)])
    reads.end()
    reads.stop()
    marked = b"\x5a" * len(into)
    into[:] = marked
    other = memoryview(allocate(PAGE))
    assert reads.begin([read_of(1, file, 0, 1, other)]) == 1
    assert all_finished(reads, 1) == {1: PAGE}
    assert bytes(into) == marked
    reads.close()
    reads.close()


def test_no_queue_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_reads, "_CALLS", {})
    with pytest.raises(OSError, match="no kernel queues"):
        KernelReads(8)


def test_a_refused_queue_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_reads, "_CALLS", {platform.machine(): (10**6,) * 4})
    with pytest.raises(OSError, match="io_setup: Function not implemented"):
        KernelReads(8)
