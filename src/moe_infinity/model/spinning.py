"""torch's own threads, which spin for milliseconds behind the last thing they did together."""

from __future__ import annotations

import ctypes
import functools
import os
import threading
from collections.abc import Callable
from pathlib import Path

import torch

from moe_infinity.config import may_idle_threads_spin
from moe_infinity.machine import num_cores

_SOFT = 1  # omp_pause_soft: what was set stays, threads do not
_MOST_TEAMS = 3  # where more were needed, processors are left for those who spin
_SHARED_OUT = 32_768  # bytes, for each thread: torch shares out no fewer


class IdleTeams:
    """Threads of OpenMP's that do nothing, so that none of its threads spins for milliseconds.

    Torch's helpers spin behind every product of a prompt, and take a processor from the compiled
    kernels, which come next: with two processors prompts took half as long again. GNU's OpenMP can
    be told so before torch loads it only (config.let_idle_threads_sleep); but once there are more
    threads than processors, it lets them spin for microseconds only.
    """

    def __init__(self) -> None:
        """Where they are needed, until ``close``."""
        self._is_over = threading.Event()
        self._threads: list[threading.Thread] = []
        num_helpers = torch.get_num_threads() - 1
        if not num_helpers or not may_idle_threads_spin() or _pause() is None:
            return
        num_teams = (num_cores() - 1) // num_helpers
        if num_teams > _MOST_TEAMS:
            return
        have_begun = threading.Semaphore(0)
        for number in range(num_teams):
            name = f"moe-infinity-idle-{number}"
            thread = threading.Thread(target=self._idle, args=(have_begun,), name=name, daemon=True)
            self._threads.append(thread)
            thread.start()
        for _ in self._threads:
            have_begun.acquire()

    def close(self) -> None:
        """Idempotent."""
        self._is_over.set()
        for thread in self._threads:
            thread.join()
        self._threads.clear()

    def _idle(self, have_begun: threading.Semaphore) -> None:
        try:  # together with helpers of its own, which stay as long as it does
            torch.empty(_SHARED_OUT * torch.get_num_threads(), dtype=torch.uint8).fill_(0)
        finally:
            have_begun.release()
        self._is_over.wait()


def end_idle_threads() -> None:
    """End the calling thread's helpers, where GNU's OpenMP runs them: a prompt's would take a
    processor from the compiled kernels for the first tokens of its answer. The next product that
    torch shares out starts them again, in 0.1 ms."""
    # Alone nobody has helpers; but a forked process waits for ever for those of its parent.
    pause = _pause() if torch.get_num_threads() > 1 else None
    if pause is not None:
        pause(_SOFT)  # says no inside of a product that is shared out, and does nothing


@functools.cache
def _pause() -> Callable[[int], int] | None:
    """``omp_pause_resource_all`` of the library that torch runs on, where that is GNU's: it ends
    the helpers of the calling thread alone."""
    if not hasattr(os, "RTLD_NOLOAD"):
        return None
    package = Path(torch.__file__).parent
    folders = (package / "lib", package.parent / "torch.libs")
    names = [str(path) for folder in folders for path in folder.glob("libgomp*.so*")]
    for name in names or ["libgomp.so.1"]:  # its own copy, or else the system's
        try:
            library = ctypes.CDLL(name, mode=os.RTLD_NOLOAD | os.RTLD_NOW)
            pause: Callable[[int], int] = library.omp_pause_resource_all
        except (OSError, AttributeError):  # not what torch runs on, or older than OpenMP 5
            continue
        return pause
    return None
