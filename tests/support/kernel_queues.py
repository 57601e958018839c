"""Whether the kernel takes reads here."""

import errno

import pytest

from moe_infinity.checkpoint.kernel_reads import KernelReads


def require_kernel_queues() -> None:
    """Skip where the system has no such queues, or a container forbids them. That there are none
    left is no reason to skip."""
    try:
        KernelReads(1).close()
    except OSError as error:
        if error.errno == errno.EAGAIN:
            raise
        pytest.skip(f"no kernel queues of reads here: {error}")
