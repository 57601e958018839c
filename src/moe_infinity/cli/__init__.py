"""The command line: one file per command. Errors are one message and exit code 2, no traceback."""

from __future__ import annotations

import errno
import gc
import logging
import os
import sys
import warnings
from typing import Any

from moe_infinity.config import keep_kernel_caches_small, let_idle_threads_sleep
from moe_infinity.errors import MoEInfinityError

_MIDDLE_PER_FULL = 100  # collections; Python's own choice is 10


def main() -> None:
    """Entry point of ``moe-infinity``."""
    try:
        code = _run(sys.argv[1:])
    except KeyboardInterrupt:  # before a command could begin: libraries are imported for seconds
        code = 130
    sys.exit(code)


def _run(arguments: list[str]) -> int:
    try:
        import typer
    except ImportError as error:
        print(
            f"error: {error}; install the command line with: pip install typer rich",
            file=sys.stderr,
        )
        return 2
    _quieten()
    if "" not in sys.path:
        sys.path.insert(0, "")  # --policy my_module:Class means a file of the folder one is in
    _collect_seldom()
    let_idle_threads_sleep()
    keep_kernel_caches_small()
    from moe_infinity.cli.app import build_app

    command = typer.main.get_command(build_app())
    try:
        return _run_command(command, arguments)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EPIPE) or error.filename is not None:
            raise
        if error.errno == errno.ENOSPC:
            print(f"error: standard output cannot be written: {error.strerror}", file=sys.stderr)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what is left would be written at the end
        return 1


def _run_command(command: Any, arguments: list[str]) -> int:
    try:
        command.main(arguments, prog_name="moe-infinity")
    except SystemExit as end:  # typer's own: 0, 2 for usage, 130 for Ctrl-C, 1 for a closed pipe
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except MoEInfinityError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    finally:
        sys.stdout.flush()
    return 0


def _quieten() -> None:
    """The libraries' notices are about code; a person at a terminal wants their text."""
    logging.getLogger("transformers").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)


def _collect_seldom() -> None:
    """Of what the libraries are made of nothing is ever garbage, and every full collection walks
    through all of it: importing them makes enough for several, half a second in all."""
    gc.set_threshold(*gc.get_threshold()[:2], _MIDDLE_PER_FULL)
