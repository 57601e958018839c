"""Reads that go wrong after so many, whoever carries them out: threads, or the kernel by itself."""

import errno
import os
import threading
from collections.abc import Callable
from typing import Any

from moe_infinity.checkpoint.kernel_reads import KernelReads


def input_output_error(*_: Any) -> int:
    raise OSError(errno.EIO, "Input/output error")


def fail_reads(
    set_attribute: Callable[[Any, str, Any], None],
    number: int,
    fail: Callable[..., int] = input_output_error,
) -> None:
    """Every read after ``number`` ends in ``fail``; the kernel's in an error, after which a thread
    tries again. set_attribute: monkeypatch's, or setattr where the process ends soon."""
    preadv, take_finished = os.preadv, KernelReads.take_finished
    lock, left = threading.Lock(), [number]

    def is_failing() -> bool:
        with lock:
            left[0] -= 1
            return left[0] < 0

    def failing_preadv(fd: int, buffers: Any, offset: int, *flags: int) -> int:
        return (fail if is_failing() else preadv)(fd, buffers, offset, *flags)

    def failing_kernel(reads: KernelReads) -> list[tuple[int, int]]:
        found = take_finished(reads)
        return [(which, -errno.EIO if is_failing() else done) for which, done in found]

    set_attribute(os, "preadv", failing_preadv)
    set_attribute(KernelReads, "take_finished", failing_kernel)
