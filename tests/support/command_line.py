"""Runs the command line in processes of its own, as a shell would.

``run`` and ``Process`` fork each from one process that has imported the libraries, which takes
seconds; ``start`` begins one from nothing. All use the state folder that the environment names.
"""

import atexit
import functools
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_MAIN = "from moe_infinity.cli import main; main()"
_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
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


class Process:
    """A command under way. Its three standard streams are files that are named, pipes included."""

    def __init__(
        self,
        arguments: tuple[object, ...],
        *,
        stdin: str,
        stdout: str,
        stderr: str,
        seconds: int = _TIMEOUT_S,
    ) -> None:
        """seconds: it may take; then it is killed."""
        job = {
            "arguments": [str(argument) for argument in arguments],
            "streams": [stdin, stdout, stderr],
            "seconds": seconds,
            "state": os.environ["MOE_INFINITY_STATE_DIR"],
        }
        self.number = _ask(job)

    def kill(self) -> None:
        os.kill(self.number, signal.SIGKILL)

    def wait(self) -> tuple[int, bool]:
        """Its exit code, and whether it left processes behind."""
        code, left_running = _ask({"wait": self.number})
        return code, left_running


def run(*arguments: object, stdin: str | bytes = "") -> Result:
    """The command to its end, standard output and error apart."""
    given = stdin if isinstance(stdin, bytes) else stdin.encode()
    with tempfile.TemporaryDirectory() as folder:
        paths = {name: Path(folder, name) for name in ("stdin", "stdout", "stderr")}
        paths["stdin"].write_bytes(given)
        process = Process(arguments, **{name: str(path) for name, path in paths.items()})
        code, left_running = process.wait()
        out, err = (paths[n].read_text(errors="replace") for n in ("stdout", "stderr"))
    return Result(code, out, err, left_running)


def refused(*arguments: object, **options: Any) -> str:
    """The message of a command that is refused as it should be."""
    result = run(*arguments, **options)
    assert_refused(result)
    return result.err


def assert_refused(result: Result) -> None:
    """One message, exit code 2, nothing on standard output, nothing left running."""
    assert result.code == 2, result.both
    assert "Traceback" not in result.both
    assert result.out == ""
    assert result.err.count("error:") == 1
    assert not result.left_running


def start(*arguments: object, **options: Any) -> subprocess.Popen[bytes]:
    """A new interpreter, its pipes open; ``options`` go to Popen."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    command = [sys.executable, "-c", _MAIN, *(str(a) for a in arguments)]
    return subprocess.Popen(command, env=os.environ | _ENVIRONMENT, **(pipes | options))


def _ask(job: dict[str, Any]) -> Any:
    server = _server()
    assert server.stdin is not None and server.stdout is not None
    server.stdin.write(json.dumps(job) + "\n")
    server.stdin.flush()
    return json.loads(server.stdout.readline())


@functools.cache
def _server() -> subprocess.Popen[str]:
    server = subprocess.Popen(
        [sys.executable, __file__],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | _ENVIRONMENT,
    )
    atexit.register(server.communicate)  # closes its input, which ends it
    return server


def _serve() -> None:
    _warm_up()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C in a terminal is pytest's
    for line in sys.stdin:
        job = json.loads(line)
        if "wait" in job:
            _, status = os.waitpid(job["wait"], 0)
            answer: Any = [os.waitstatus_to_exitcode(status), _is_group_alive(job["wait"])]
        else:
            answer = os.fork()
            if answer == 0:
                signal.signal(signal.SIGINT, signal.default_int_handler)
                _become(job)
        print(json.dumps(answer), flush=True)


def _warm_up() -> None:
    """Import and initialise what every command does, and end every thread of it. Commands and
    their options are read off their functions once, not in every child."""
    import contextlib
    import gc
    import io

    import typer

    from moe_infinity.cli import _run, app

    os.fsync = lambda _: None  # as in conftest.py
    _look_at_disks_briefly()
    app.build_app = functools.cache(app.build_app)
    typer.main.get_command = functools.cache(typer.main.get_command)
    with contextlib.redirect_stdout(io.StringIO()):
        assert _run(["run", "hello", "--max-new-tokens", "2", "--json"]) == 0
    deadline = time.monotonic() + _TIMEOUT_S
    while len(os.listdir("/proc/self/task")) > 1:  # a forked process would hold their locks forever
        assert time.monotonic() < deadline, "some thread does not end"
        time.sleep(0.01)
    gc.collect()
    gc.freeze()  # what a child's collections walk through is copied to it


def _look_at_disks_briefly() -> None:
    """How fast they are says nothing to tests, nor that they are faster than a moment ago."""
    from moe_infinity import machine, speeds

    machine._TRY_S = machine._MEASURE_S = speeds._CHECK_S = 0.01
    speeds._FAR_OFF = float("inf")


def _become(job: dict[str, Any]) -> None:
    """In the child: do what a new interpreter would do with the command line."""
    code = 1
    try:
        _open_streams(job["streams"])
        signal.alarm(job["seconds"])
        sys.argv = ["moe-infinity", *job["arguments"]]
        os.environ["MOE_INFINITY_STATE_DIR"] = job["state"]
        import torch

        from moe_infinity.cli import main

        # A fork leaves torch's threads behind; it makes new ones when it is first asked, and not
        # safely so if several threads ask at once, as those that load weights do.
        torch.set_num_threads(torch.get_num_threads())
        try:
            main()
        except SystemExit as end:
            code = int(end.code or 0)
        sys.stdout.flush()
        sys.stderr.flush()
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
    finally:
        os._exit(code)


def _open_streams(paths: list[str]) -> None:
    os.setsid()  # a terminal opened next becomes the child's own
    for number, path in enumerate(paths):
        flags = os.O_WRONLY | os.O_CREAT if number else os.O_RDONLY
        os.dup2(os.open(path, flags, 0o600), number)
    sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1, encoding="utf-8", closefd=False)  # noqa: SIM115


def _is_group_alive(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


if __name__ == "__main__":
    _serve()
