"""torch's own threads, which spin for milliseconds behind the last thing they did together."""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Callable
from pathlib import Path

import torch

_SOFT = 1  # omp_pause_soft: what was set stays, threads do not


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
