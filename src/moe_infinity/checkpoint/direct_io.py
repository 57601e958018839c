"""Reading files past the page cache, into page-aligned memory. The one file that knows the OS."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import mmap
import os
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Protocol

from moe_infinity.errors import CheckpointChangedError, CheckpointNotFoundError, ReadError

# Direct I/O wants file offset, length and memory aligned to the logical block of the device: 512
# or 4096 bytes. 4096 satisfies both, and is a page.
ALIGNMENT_BYTES = 4096
HUGE_PAGE_BYTES = 2 * 1024**2
_SEEKING = threading.Lock()
_O_DIRECT = getattr(os, "O_DIRECT", 0)


def align_down(value: int) -> int:
    return value - value % ALIGNMENT_BYTES


def align_up(value: int) -> int:
    return -(-value // ALIGNMENT_BYTES) * ALIGNMENT_BYTES


def address_of(buffer: mmap.mmap | memoryview) -> int:
    """Of writable memory, where it begins."""
    return ctypes.addressof(ctypes.c_char.from_buffer(buffer))


def allocate(num_bytes: int, is_huge: bool = True) -> mmap.mmap:
    """Page-aligned anonymous memory, all 0; pages cost nothing before they are touched.

    is_huge: pages may be of 2 MiB, which is faster where most of it will be used.
    """
    size = max(align_up(num_bytes), ALIGNMENT_BYTES)
    if not hasattr(mmap, "MAP_ANONYMOUS"):
        return mmap.mmap(-1, size)
    # Private: shared anonymous memory is a file to the kernel, and is counted as page cache.
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without huge pages serves small ones
            memory.madvise(mmap.MADV_HUGEPAGE if is_huge else mmap.MADV_NOHUGEPAGE)
    return memory


def allocate_on_huge_pages(num_bytes: int) -> memoryview:
    """As ``allocate``, beginning where a page of 2 MiB does: for what is large and used as a whole.
    The part of a page at its end lies in small ones, so that no more memory becomes resident; of
    addresses it takes 2 MiB more."""
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return memoryview(allocate(num_bytes))[:num_bytes]
    room = allocate(num_bytes + HUGE_PAGE_BYTES, is_huge=False)
    start = -address_of(room) % HUGE_PAGE_BYTES
    with contextlib.suppress(OSError):
        room.madvise(mmap.MADV_HUGEPAGE, start, num_bytes - num_bytes % HUGE_PAGE_BYTES)
    return memoryview(room)[start : start + num_bytes]


class OpenedFile(Protocol):
    """A file that checkpoints read pieces of, wherever it lies."""

    num_bytes: int

    def read_into(self, buffer: memoryview, offset: int, needed_bytes: int) -> None:
        """Fill ``buffer`` from ``offset``; at least ``needed_bytes`` have to arrive. Offset and
        buffer are multiples of ALIGNMENT_BYTES. Thread-safe. Raises ReadError."""

    def descriptor(self) -> int | None:
        """Where the kernel can read by itself what ``read_into`` would; None where there is more
        to it than that."""

    def give_up(self) -> None:
        """Nobody waits for reads that are under way: they may fail now, and all later ones."""

    def version(self) -> str:
        """Changes when the content does, as far as can be told without reading it."""

    def close(self) -> None:
        """Idempotent."""


class DirectFile:
    """A read-only file, read with direct I/O; where that is refused, buffered, pages dropped.

    Thread-safe. Raises CheckpointChangedError when the file's size or time of change is no longer
    what it was when it was opened.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._fd, self.is_direct = _open(path)
        except OSError as error:
            raise CheckpointNotFoundError(
                f"{path}: got {error.strerror}, expected a readable file; is the checkpoint whole?"
            ) from error
        stat = os.fstat(self._fd)
        self.num_bytes = stat.st_size
        self._changed_ns = stat.st_mtime_ns

    def read_into(self, buffer: memoryview, offset: int, needed_bytes: int) -> None:
        """Fill ``buffer`` from ``offset``; at least ``needed_bytes`` have to arrive.

        offset, len(buffer) and the buffer's address are multiples of ALIGNMENT_BYTES; the end of
        the file may come between needed_bytes and len(buffer). Raises ReadError.
        """
        self.check_unchanged()
        done = 0
        while done < needed_bytes:
            done += self._read_once(buffer[done:], offset + done, needed_bytes - done)
            if self.is_direct and done < needed_bytes and done % ALIGNMENT_BYTES:
                # A short direct read ends off the grid only at the end of the file.
                raise ReadError(self._short(offset, done, needed_bytes))
        if not self.is_direct and hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._fd, offset, len(buffer), os.POSIX_FADV_DONTNEED)

    def descriptor(self) -> int | None:
        try:
            is_plain = self.is_direct and self._is_unchanged(os.fstat(self._fd))
        except OSError:  # read_into says why
            return None
        return self._fd if is_plain else None

    def check_unchanged(self) -> None:
        try:
            stat = os.fstat(self._fd)
        except OSError as error:
            raise ReadError(
                f"{self.path}: got {error.strerror}, expected an open file; was the model closed?"
            ) from error
        if not self._is_unchanged(stat):
            raise CheckpointChangedError(
                f"{self.path} changed on disk since it was opened (size {self.num_bytes} -> "
                f"{stat.st_size} bytes); open the model again"
            )

    def _is_unchanged(self, stat: os.stat_result) -> bool:
        return stat.st_size == self.num_bytes and stat.st_mtime_ns == self._changed_ns

    def give_up(self) -> None:
        """A disk answers soon."""

    def version(self) -> str:
        return str(self._changed_ns)

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _read_once(self, buffer: memoryview, offset: int, missing: int) -> int:
        was_direct = self.is_direct
        try:
            num_read = _pread_into(self._fd, buffer, offset)
        except OSError as error:
            if error.errno == errno.EINVAL and was_direct:
                self._fall_back()
                return self._read_once(buffer, offset, missing)
            raise ReadError(
                f"{self.path}: reading {len(buffer)} bytes at {offset} failed with "
                f"{error.strerror}; check the disk (dmesg, smartctl) and the file"
            ) from error
        if num_read == 0:
            raise ReadError(self._short(offset, 0, missing))
        return num_read

    def _fall_back(self) -> None:
        """The file system took O_DIRECT at opening but refuses it at reading. Several threads may
        find that out at once."""
        import fcntl  # where there is O_DIRECT there is this

        flags = fcntl.fcntl(self._fd, fcntl.F_GETFL)
        fcntl.fcntl(self._fd, fcntl.F_SETFL, flags & ~_O_DIRECT)
        self.is_direct = False

    def _short(self, offset: int, got: int, needed: int) -> str:
        return (
            f"{self.path}: got {got} bytes at {offset}, expected {needed}; the file ends too "
            f"early: download it again"
        )


def open_all(
    paths: Iterable[Path], open_file: Callable[[Path], OpenedFile] = DirectFile
) -> list[OpenedFile]:
    """All of them; if one refuses, none stays open."""
    with contextlib.ExitStack() as undo:
        opened = [undo.enter_context(contextlib.closing(open_file(path))) for path in paths]
        undo.pop_all()
    return opened


def _open(path: Path) -> tuple[int, bool]:
    flags = os.O_RDONLY | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
    if _O_DIRECT:
        try:
            return os.open(path, flags | _O_DIRECT), True
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
                raise
    return os.open(path, flags), False


def _pread_into(fd: int, buffer: memoryview, offset: int) -> int:
    if hasattr(os, "preadv"):
        return os.preadv(fd, [buffer], offset)
    with _SEEKING:  # Windows has neither preadv nor pread: one position for all threads
        os.lseek(fd, offset, os.SEEK_SET)
        data = os.read(fd, len(buffer))
    buffer[: len(data)] = data
    return len(data)
