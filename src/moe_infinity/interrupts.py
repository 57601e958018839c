"""Turns Ctrl-C during a request into a cancellation at a safe point. Knows nothing of models."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any


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
