"""What must not come between two tokens: Ctrl-C waits for a safe point, and Python's collector of
cycles for the end of the request. Knows nothing of models."""

from __future__ import annotations

import contextlib
import gc
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

_NEVER = 2**31 - 1


class LateCollections:
    """Puts full collections off until a request is over; a context manager.

    One walks through every object that the libraries are made of, a quarter of a second between
    two tokens, and the first is due soon behind the opening of a model. Young objects are collected
    as ever: a request leaves no cycles behind that outlive them. The setting belongs to the
    process: the first to begin remembers it, and the last to end puts it back.
    """

    _lock = threading.Lock()
    _num_requests = 0
    _before = gc.get_threshold()

    def __enter__(self) -> None:
        with LateCollections._lock:
            if LateCollections._num_requests == 0:
                LateCollections._before = gc.get_threshold()
                gc.set_threshold(*LateCollections._before[:2], _NEVER)
            LateCollections._num_requests += 1

    def __exit__(self, *_: object) -> None:
        with LateCollections._lock:
            LateCollections._num_requests -= 1
            if LateCollections._num_requests == 0:
                gc.set_threshold(*LateCollections._before)


@contextlib.contextmanager
def deferred_interrupt(cancel: Callable[[], None]) -> Iterator[None]:
    """Within it Ctrl-C calls ``cancel``, and KeyboardInterrupt is raised on the way out.

    Raised between any two lines, it would leave loads begun that nobody waits for. A second Ctrl-C
    does not wait. Where Python's own handler is not the one installed, or in another thread than
    the main one, nothing is changed.
    """
    if not _is_ours_to_take():
        yield
        return
    interrupted = False

    def handle(signum: int, frame: Any) -> None:
        nonlocal interrupted
        if interrupted:
            signal.default_int_handler(signum, frame)
        interrupted = True
        cancel()

    signal.signal(signal.SIGINT, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if interrupted:
            raise KeyboardInterrupt from None


def _is_ours_to_take() -> bool:
    is_main = threading.current_thread() is threading.main_thread()
    return is_main and signal.getsignal(signal.SIGINT) is signal.default_int_handler
