"""Direct and buffered reads deliver the same bytes, and every failure has its named error."""

import ctypes
import errno
import mmap
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from moe_infinity.checkpoint import direct_io
from moe_infinity.checkpoint.direct_io import (
    ALIGNMENT_BYTES,
    HUGE_PAGE_BYTES,
    DirectFile,
    align_down,
    align_up,
    allocate,
    allocate_on_huge_pages,
)
from moe_infinity.errors import CheckpointChangedError, CheckpointNotFoundError, ReadError
from support.smaps import mappings

SIZE = 3 * ALIGNMENT_BYTES + 1234
DATA = bytes(i * i % 251 for i in range(SIZE))
Refuse = Callable[[pytest.MonkeyPatch], None]

pytestmark = pytest.mark.skipif(not hasattr(os, "preadv"), reason="no preadv")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "data"
    file.write_bytes(DATA)
    return file


def as_it_is(patch: pytest.MonkeyPatch) -> None:
    """Whatever the file system of the tests does."""


def refused_at_open(patch: pytest.MonkeyPatch) -> None:
    real = os.open

    def refuse(path: object, flags: int, *rest: int) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return real(path, flags, *rest)  # type: ignore[arg-type]

    patch.setattr(os, "open", refuse)


def refused_at_read(patch: pytest.MonkeyPatch) -> None:
    """O_DIRECT is taken at opening; reading fails for as long as the file has the flag."""
    import fcntl

    real_open, real_read = os.open, os.preadv
    has_flag: set[int] = set()

    def open_(path: object, flags: int, *rest: int) -> int:
        fd = real_open(path, flags & ~os.O_DIRECT, *rest)  # type: ignore[arg-type]
        if flags & os.O_DIRECT:
            has_flag.add(fd)
        return fd

    def set_flags(fd: int, command: int, flags: int = 0) -> int:
        if command == fcntl.F_SETFL and not flags & os.O_DIRECT:
            has_flag.discard(fd)
        return os.O_RDONLY | (os.O_DIRECT if fd in has_flag else 0)

    def read(fd: int, buffers: list[memoryview], offset: int) -> int:
        if fd in has_flag:
            raise OSError(errno.EINVAL, "Invalid argument")
        return real_read(fd, buffers, offset)

    patch.setattr(os, "open", open_)
    patch.setattr(fcntl, "fcntl", set_flags)
    patch.setattr(os, "preadv", read)


def in_short_steps(patch: pytest.MonkeyPatch) -> None:
    real = os.preadv
    patch.setattr(os, "preadv", lambda fd, b, offset: real(fd, [b[0][:ALIGNMENT_BYTES]], offset))


@pytest.fixture(params=[as_it_is, refused_at_open, refused_at_read, in_short_steps])
def file(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, path: Path
) -> Iterator[DirectFile]:
    request.param(monkeypatch)
    opened = DirectFile(path)
    yield opened
    opened.close()


@pytest.mark.parametrize(
    ("offset", "needed"),
    [(0, 1), (0, 4096), (4096, 4103), (0, SIZE), (3 * 4096, 1234), (2 * 4096, 5000)],
)
def test_every_way_gives_the_same_bytes(file: DirectFile, offset: int, needed: int) -> None:
    """Also where the file ends inside the last block of the buffer."""
    length = align_up(needed)
    buffer = memoryview(allocate(length + ALIGNMENT_BYTES))
    buffer[:] = b"\xee" * len(buffer)
    file.read_into(buffer[:length], offset, needed)
    assert bytes(buffer[:needed]) == DATA[offset : offset + needed]
    assert set(buffer[length:]) == {0xEE}  # nothing behind the buffer was touched


def test_the_fallbacks_are_taken(path: Path) -> None:
    ways = {refused_at_open: (False, False), refused_at_read: (True, False)}
    for refuse, expected in ways.items():
        with pytest.MonkeyPatch.context() as patch:
            refuse(patch)
            file = DirectFile(path)
            before = file.is_direct
            file.read_into(memoryview(allocate(ALIGNMENT_BYTES)), 0, 10)
            assert (before, file.is_direct) == expected
            file.close()


def test_an_open_that_fails_for_another_reason_is_not_tried_again(path: Path) -> None:
    calls = []

    def fail(*arguments: object) -> int:
        calls.append(arguments)
        raise OSError(errno.EACCES, "Permission denied")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "open", fail)
        with pytest.raises(CheckpointNotFoundError, match=f"{path}.*Permission denied"):
            DirectFile(path)
    assert len(calls) == 1


@pytest.mark.parametrize("extra", [1, 2000, ALIGNMENT_BYTES, 3 * ALIGNMENT_BYTES])
def test_a_file_shorter_than_promised(file: DirectFile, extra: int) -> None:
    buffer = memoryview(allocate(SIZE + extra))
    with pytest.raises(ReadError, match=f"{file.path}.*ends too early"):
        file.read_into(buffer, 0, SIZE + extra)


def test_an_offset_behind_the_end(file: DirectFile) -> None:
    with pytest.raises(ReadError, match="got 0 bytes"):
        file.read_into(memoryview(allocate(ALIGNMENT_BYTES)), align_up(SIZE), 1)


def test_a_file_that_ends_on_the_grid(tmp_path: Path) -> None:
    path = tmp_path / "even"
    path.write_bytes(DATA[: 2 * ALIGNMENT_BYTES])
    file = DirectFile(path)
    with pytest.raises(ReadError, match=str(path)):
        file.read_into(memoryview(allocate(3 * ALIGNMENT_BYTES)), 0, 2 * ALIGNMENT_BYTES + 1)
    file.close()


@pytest.mark.parametrize("change", ["grown", "truncated", "rewritten"])
def test_a_changed_file(file: DirectFile, change: str) -> None:
    path = file.path
    path.write_bytes({"grown": DATA + b"x", "truncated": DATA[:-1], "rewritten": DATA}[change])
    later = path.stat().st_mtime_ns + 10**9
    os.utime(path, ns=(later, later))
    with pytest.raises(CheckpointChangedError, match=f"{path} changed on disk"):
        file.read_into(memoryview(allocate(ALIGNMENT_BYTES)), 0, 1)


@pytest.mark.parametrize("code", [errno.EIO, errno.EINVAL])
def test_a_failing_disk(file: DirectFile, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    """An EINVAL that buffered reading does not cure is an error too, not an endless loop."""

    def fail(*_: object) -> int:
        raise OSError(code, "it failed")

    monkeypatch.setattr(os, "preadv", fail)
    with pytest.raises(ReadError, match=f"{file.path}.*it failed"):
        file.read_into(memoryview(allocate(ALIGNMENT_BYTES)), 0, 1)


def test_a_second_thread_is_refused_after_the_first_fell_back(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both were reading directly; the slower one's refusal is no reason to give up."""
    refused_at_open(monkeypatch)
    file = DirectFile(path)
    file.is_direct = True
    real, calls = direct_io._pread_into, []

    def refuse_once(fd: int, buffer: memoryview, offset: int) -> int:
        calls.append(offset)
        if len(calls) == 1:
            file.is_direct = False  # what the faster thread has done by now
            raise OSError(errno.EINVAL, "Invalid argument")
        return real(fd, buffer, offset)

    monkeypatch.setattr(direct_io, "_pread_into", refuse_once)
    buffer = memoryview(allocate(SIZE))
    file.read_into(buffer, 0, SIZE)
    assert bytes(buffer[:SIZE]) == DATA
    file.close()


def test_buffered_reads_may_stop_anywhere(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Network file systems deliver what they have; only direct reads end on the grid."""
    refused_at_open(monkeypatch)
    file = DirectFile(path)
    real = direct_io._pread_into
    monkeypatch.setattr(
        direct_io, "_pread_into", lambda fd, buffer, offset: real(fd, buffer[:1000], offset)
    )
    buffer = memoryview(allocate(SIZE))
    file.read_into(buffer, 0, SIZE)
    assert bytes(buffer[:SIZE]) == DATA
    file.close()


def test_without_preadv(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refused_at_open(monkeypatch)
    monkeypatch.delattr(os, "preadv")
    file = DirectFile(path)
    buffer = memoryview(allocate(SIZE))
    file.read_into(buffer, 0, SIZE)
    assert bytes(buffer[:SIZE]) == DATA
    file.close()


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointNotFoundError, match=str(tmp_path / "none")):
        DirectFile(tmp_path / "none")


def test_close_twice_and_read_after_it(path: Path) -> None:
    file = DirectFile(path)
    file.close()
    file.close()
    with pytest.raises(ReadError, match=f"{path}.*was the model closed"):
        file.read_into(memoryview(allocate(ALIGNMENT_BYTES)), 0, 1)


def test_alignment_and_memory() -> None:
    for value in (0, 1, 4095, 4096, 4097):
        assert align_down(value) <= value <= align_up(value)
        assert align_up(value) - align_down(value) in (0, ALIGNMENT_BYTES)
    assert len(allocate(0)) == direct_io.ALIGNMENT_BYTES
    assert len(allocate(4097)) == 2 * ALIGNMENT_BYTES


def flags_at(address: int) -> list[str]:
    """What the kernel was told of the memory at an address."""
    for part in mappings():
        start, end = (int(each, 16) for each in part.split()[0].split("-"))
        if start <= address < end:
            return part.split("VmFlags:")[1].split()
    raise AssertionError(f"nothing is mapped at {address:x}")


@pytest.mark.parametrize("rest", [0, 1, ALIGNMENT_BYTES, HUGE_PAGE_BYTES - 1])
def test_whole_pages_are_huge_and_the_rest_is_not(rest: int) -> None:
    size = 2 * HUGE_PAGE_BYTES + rest
    memory = allocate_on_huge_pages(size)
    memory[0], memory[-1] = 1, 2
    assert len(memory) == size and memory[0] + memory[-1] == 3
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    assert start % HUGE_PAGE_BYTES == 0
    if not Path("/sys/kernel/mm/transparent_hugepage").exists():
        return
    assert "hg" in flags_at(start) and "hg" in flags_at(start + 2 * HUGE_PAGE_BYTES - 1)
    assert "hg" not in flags_at(start + 2 * HUGE_PAGE_BYTES)
