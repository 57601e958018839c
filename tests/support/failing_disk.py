"""A policy that breaks the disk: named on a command line, it makes a request's reads fail."""

import errno
import os
import threading
from typing import Any

from moe_infinity.policies.lru import Policy as LruPolicy

_NUM_READS = 20  # that still succeed


class Policy(LruPolicy):
    """LRU, in a process whose disk fails in its first request. For processes that end soon."""

    def begin_request(self) -> None:
        super().begin_request()
        real, lock, left = os.preadv, threading.Lock(), [_NUM_READS]

        def preadv(fd: int, buffers: Any, offset: int) -> int:
            with lock:
                left[0] -= 1
            if left[0] < 0:
                raise OSError(errno.EIO, "Input/output error")
            return real(fd, buffers, offset)

        os.preadv = preadv  # type: ignore[assignment]
