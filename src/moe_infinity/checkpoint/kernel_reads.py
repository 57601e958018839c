"""Direct reads that the kernel carries out while the caller does something else (Linux AIO).

A thread that reads has to be woken, to get a processor that is computing, and in Python the
interpreter as well. Here the computing thread hands reads over in one call, and looks later.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import struct
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

# Of io_setup, io_destroy, io_getevents, io_submit.
_CALLS = {"x86_64": (206, 207, 208, 209), "aarch64": (0, 1, 4, 2)}
_REQUEST = struct.Struct("<QIiHhIQQqQII")  # struct iocb
_READ, _RINGS = 0, 1
_RESULT = struct.Struct("<QQqq")  # struct io_event


class KernelRead(NamedTuple):
    """number: the caller's name for it. address: of memory that stays until the read is over.
    All but the number are multiples of what direct I/O wants (direct_io.py)."""

    number: int
    fd: int
    offset: int
    num_bytes: int
    address: int


class KernelReads:
    """A queue of reads in the kernel. One thread owns it; any may ``ring``.

    Raises OSError where the system has no such queues, or gives no more of them.
    """

    def __init__(self, depth: int) -> None:
        """depth: reads that are under way at most."""
        names = _CALLS.get(platform.machine())
        if names is None or sys.platform != "linux" or not hasattr(os, "eventfd"):
            raise OSError(errno.ENOSYS, "no kernel queues of reads")
        self.depth = depth
        self.num_begun = 0  # at most, and not taken yet: an exception may have struck anywhere
        # What compiled code adds to the queue by itself, and not counted above yet.
        self.begun_elsewhere = ctypes.c_ulong(0)
        self._setup, self._destroy, self._getevents, self._submit = names
        self._call: Any = ctypes.CDLL(None, use_errno=True).syscall
        self._requests = (ctypes.c_char * (depth * _REQUEST.size))()
        at = ctypes.addressof(self._requests)
        self._pointers = (ctypes.c_void_p * depth)(
            *range(at, at + len(self._requests), _REQUEST.size)
        )
        self._results = (ctypes.c_char * (depth * _RESULT.size))()
        self._no_time = (ctypes.c_long * 2)(0, 0)
        self._context = ctypes.c_ulong(0)
        self._bell = os.eventfd(0, os.EFD_CLOEXEC)
        try:
            self._begin_context()
        except OSError:
            self.close()
            raise

    @property
    def context_at(self) -> int:
        """Where the queue's number is; 0 while there is none."""
        return ctypes.addressof(self._context)

    @property
    def bell(self) -> int:
        """The descriptor that reads ring with."""
        return self._bell

    def begin(self, reads: Sequence[KernelRead]) -> int:
        """Hand over as many as there is room for; returns how many, in their order."""
        self._count()
        reads = reads[: max(0, self.depth - self.num_begun)]
        for place, read in enumerate(reads):
            _REQUEST.pack_into(
                *(self._requests, place * _REQUEST.size, read.number, 0, 0, _READ, 0, read.fd),
                *(read.address, read.num_bytes, read.offset, 0, _RINGS, self._bell),
            )
        taken = 0
        self.num_begun += len(reads)
        while taken < len(reads):
            rest = ctypes.byref(self._pointers, taken * ctypes.sizeof(ctypes.c_void_p))
            done = self._call(self._submit, self._context, len(reads) - taken, rest)
            if done <= 0:
                break
            taken += done
        self.num_begun -= len(reads) - taken
        return taken

    def take_finished(self) -> list[tuple[int, int]]:
        """Numbers of reads that are over since the last call, with the bytes that came, or less
        than 0: an error."""
        self._count()
        if not self.num_begun:
            return []
        count = self._call(
            self._getevents, self._context, 0, self.depth, self._results, self._no_time
        )
        found = [_RESULT.unpack_from(self._results, i * _RESULT.size) for i in range(max(0, count))]
        self.num_begun -= len(found)
        return [(number, result) for number, _, result, _ in found]

    def wait(self) -> None:
        """Until a read is over, or somebody has rung, since the last call."""
        os.read(self._bell, 8)

    def ring(self) -> None:
        os.eventfd_write(self._bell, 1)

    def stop(self) -> None:
        """Wait until no read is under way, and forget them all. Raises OSError where no more can be
        taken."""
        self._count()
        if self.num_begun:  # else the context may stay: destroying one takes 30 ms
            self.end()
        if not self._context.value:
            self._begin_context()

    def end(self) -> None:
        """The same, and take no more. Idempotent."""
        if self._context.value:  # destroying it waits for what cannot be called back
            self._call(self._destroy, self._context)
            self._context.value = 0
        self.num_begun = self.begun_elsewhere.value = 0

    def close(self) -> None:
        """``end``, and nobody rings any more. Idempotent."""
        self.end()
        if self._bell >= 0:
            os.close(self._bell)
            self._bell = -1

    def _count(self) -> None:
        if self.begun_elsewhere.value:
            self.num_begun += self.begun_elsewhere.value
            self.begun_elsewhere.value = 0

    def _begin_context(self) -> None:
        if self._call(self._setup, self.depth, ctypes.byref(self._context)) != 0:
            number = ctypes.get_errno()
            raise OSError(number, f"io_setup: {os.strerror(number)}")
