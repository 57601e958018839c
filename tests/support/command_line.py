"""Runs the command line in processes of its own, as a shell would.

``run`` forks each from one process that has imported the libraries, which takes them seconds;
``start`` begins one from nothing. Both use whatever state folder the environment names.
"""

import atexit
import functools
import json
import os
import signal
import subprocess
import sys
import tempfile
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_MAIN = "from moe_infinity.cli import main; main()"
_TIMEOUT_S = 120


@dataclass(frozen=True)
class Result:
    """How a command ended. left_running: whether it left processes behind."""

    code: int
    out: str
    err: str
    left_running: bool

    @property
    def both(self) -> str:
        return self.out + self.err


def run(*arguments: object, stdin: str | bytes = "") -> Result:
    """The command to its end, standard output and error apart."""
    server = _server()
    given = stdin if isinstance(stdin, bytes) else stdin.encode()
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "in").write_bytes(given)
        state = os.environ.get("MOE_INFINITY_STATE_DIR", folder)
        job = {"folder": folder, "arguments": [str(a) for a in arguments], "state": state}
        assert server.stdin is not None and server.stdout is not None
        server.stdin.write(json.dumps(job) + "\n")
        server.stdin.flush()
        done = json.loads(server.stdout.readline())
        out, err = (Path(folder, n).read_text(errors="replace") for n in ("out", "err"))
    return Result(done["code"], out, err, done["left_running"])


def start(*arguments: object, **options: Any) -> subprocess.Popen[bytes]:
    """A new interpreter, its pipes open; ``options`` go to Popen."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    command = [sys.executable, "-c", _MAIN, *(str(a) for a in arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=environment, **(pipes | options))


@functools.cache
def _server() -> subprocess.Popen[str]:
    server = subprocess.Popen(
        [sys.executable, __file__],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    atexit.register(server.communicate)  # closes its input, which ends it
    return server


def _serve() -> None:
    import transformers.models.qwen3_moe.modeling_qwen3_moe
    import typer.rich_utils

    import moe_infinity.cli.app
    import moe_infinity.engine  # noqa: F401

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C in a terminal is pytest's
    for line in sys.stdin:
        job = json.loads(line)
        child = os.fork()
        if child == 0:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            _become(job)
        _, status = os.waitpid(child, 0)
        left_running = _is_group_alive(child)
        code = os.waitstatus_to_exitcode(status)
        print(json.dumps({"code": code, "left_running": left_running}), flush=True)


def _become(job: dict[str, Any]) -> None:
    """In the child: do what a new interpreter would do with the command line."""
    from moe_infinity.cli import main

    os.setsid()
    signal.alarm(_TIMEOUT_S)
    folder = Path(job["folder"])
    for number, (name, flags) in enumerate(
        [("in", os.O_RDONLY), ("out", os.O_WRONLY | os.O_CREAT), ("err", os.O_WRONLY | os.O_CREAT)]
    ):
        os.dup2(os.open(folder / name, flags, 0o600), number)
    sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.argv = ["moe-infinity", *job["arguments"]]
    os.environ["MOE_INFINITY_STATE_DIR"] = job["state"]
    code = 1
    try:
        main()
    except SystemExit as end:
        code = int(end.code or 0)
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _is_group_alive(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


if __name__ == "__main__":
    _serve()
