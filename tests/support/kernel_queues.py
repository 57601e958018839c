"""Whether the kernel takes reads here, and queues of reads that are used again."""

import errno
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from moe_infinity.checkpoint.kernel_reads import KernelReads

_BEGIN, _END = KernelReads._begin_context, KernelReads.end


def require_kernel_queues() -> None:
    """Skip where the system has no such queues, or a container forbids them. That there are none
    left is no reason to skip."""
    try:
        KernelReads(1).close()
    except OSError as error:
        if error.errno == errno.EAGAIN:
            raise
        pytest.skip(f"no kernel queues of reads here: {error}")


@contextmanager
def queues_used_again() -> Iterator[None]:
    """The kernel destroys a queue in 30 ms, even one in which nothing is under way: such a one
    serves whoever wants a queue next."""
    idle: dict[int, list[int]] = defaultdict(list)  # by depth

    def begin(reads: KernelReads) -> None:
        if idle[reads.depth]:
            reads._context.value = idle[reads.depth].pop()
        else:
            _BEGIN(reads)

    def end(reads: KernelReads) -> None:
        if reads._context.value and not reads.num_begun:
            idle[reads.depth].append(reads._context.value)
            reads._context.value = 0
        _END(reads)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(KernelReads, "_begin_context", begin)
        patch.setattr(KernelReads, "end", end)
        yield


@contextmanager
def queues_of_their_own() -> Iterator[None]:
    """Queues as they are, for tests of them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(KernelReads, "_begin_context", _BEGIN)
        patch.setattr(KernelReads, "end", _END)
        yield
