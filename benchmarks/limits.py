"""Runs a child process under a kernel memory limit and reads what it used. Linux, root."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_V1 = Path("/sys/fs/cgroup/memory")
_V2 = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class Usage:
    """What the kernel counted for a limited group. Bytes."""

    peak_bytes: int
    page_cache_bytes: int  # the largest seen while it ran, sampled
    limit_hits: int


class MemoryLimit:
    """A control group (v1 or v2) with a memory limit; swap is not allowed either."""

    def __init__(self, name: str, limit_bytes: int) -> None:
        self._is_v1 = (_V1 / "memory.limit_in_bytes").exists()
        self._folder = (_V1 if self._is_v1 else _V2) / name
        self._folder.mkdir(exist_ok=True)
        limit = "memory.limit_in_bytes" if self._is_v1 else "memory.max"
        (self._folder / limit).write_text(str(limit_bytes))

    def start(self, command: list[str], env: dict[str, str] | None = None) -> subprocess.Popen[str]:
        """A command inside the limit, its standard input and output pipes of text."""

        def enter() -> None:
            (self._folder / "cgroup.procs").write_text(str(os.getpid()))

        pipe = subprocess.PIPE
        return subprocess.Popen(
            command, preexec_fn=enter, stdin=pipe, stdout=pipe, env=env, text=True
        )

    def run(self, command: list[str], env: dict[str, str] | None = None) -> tuple[int, str, Usage]:
        """Exit code, standard output and usage of a command run inside the limit."""
        cached = 0
        child = self.start(command, env)
        try:
            while child.poll() is None:
                cached = max(cached, self._stat("cache" if self._is_v1 else "file"))
                time.sleep(0.2)
            assert child.stdout is not None
            out = child.stdout.read()  # a few lines: they fit in the pipe
        finally:
            child.kill()
            child.wait()
        return child.returncode, out, Usage(self.peak_bytes(), cached, self._failures())

    def close(self) -> None:
        for _ in range(50):
            try:
                self._folder.rmdir()
                return
            except OSError:
                time.sleep(0.1)

    def peak_bytes(self) -> int:
        name = "memory.max_usage_in_bytes" if self._is_v1 else "memory.peak"
        return int((self._folder / name).read_text())

    def _failures(self) -> int:
        if self._is_v1:
            return int((self._folder / "memory.failcnt").read_text())
        events = dict(line.split() for line in (self._folder / "memory.events").open())
        return int(events["max"])

    def _stat(self, field: str) -> int:
        for line in (self._folder / "memory.stat").read_text().splitlines():
            name, value = line.split()
            if name == field:
                return int(value)
        return 0


def direct_read_gbps(file: Path, num_bytes: int = 2 * 1024**3) -> float:
    """What ``dd iflag=direct bs=4M`` reads from ``file``, in 1e9 bytes per second."""
    count = min(num_bytes, file.stat().st_size) // (4 * 1024**2)
    start = time.perf_counter()
    subprocess.run(
        ["dd", f"if={file}", "of=/dev/null", "bs=4M", "iflag=direct", f"count={count}"],
        check=True,
        stderr=subprocess.DEVNULL,
    )
    return count * 4 * 1024**2 / (time.perf_counter() - start) / 1e9


_TEXT = (
    "Question: A farmer has 12 cows and buys 5 more, then sells a third of them for 40 dollars "
    "each. How much money does the farmer get? Answer: The farmer"
)


def prompt_ids(checkpoint: Path) -> list[int]:
    """About 40 tokens of text where there is a tokenizer, else some ids."""
    if not (checkpoint / "tokenizer.json").exists():
        return list(range(100, 132))
    from transformers import AutoTokenizer

    return list(AutoTokenizer.from_pretrained(checkpoint)(_TEXT).input_ids)


def long_prompt_ids(checkpoint: Path, count: int) -> list[int]:
    """So many tokens: of that text, then of what its ids make of themselves."""
    ids = prompt_ids(checkpoint)
    while len(ids) < count:
        ids = ids + [(7 * i + 3) % 1000 + 10 for i in ids]
    return ids[:count]


def decode_figures(stats: Any) -> dict[str, float]:
    """What a run's stats say of its last request, under the names the result files have."""
    decode = stats.decode
    return {
        "tokens_per_s": stats.tokens_per_s,
        "ttft_s": stats.ttft_s,
        "hit_rate": decode.hit_rate,
        "read_bytes_per_token": (decode.demand_bytes + decode.prefetch_bytes) / decode.num_tokens,
        "limit_fraction": decode.limit_fraction,
        "belady_fraction": decode.belady_fraction,
        "stall_s": decode.stall_s,
        "compute_s": decode.compute_s,
        "wall_s": decode.wall_s,
        "peak_rss_bytes": stats.peak_rss_bytes,
    }


def provenance(argv: list[str] | None = None) -> dict[str, str]:
    """Command, commit, machine and date, for every result file."""
    from moe_infinity.kernels.native import native
    from moe_infinity.machine import cpu_name, num_cores

    kernels = native.instruction_sets()[-1] if native else "no compiled kernels"
    root = Path(__file__).resolve().parent.parent
    command = ["git", "rev-parse", "--short", "HEAD"]
    commit = ""
    with contextlib.suppress(OSError):  # a lent machine may have no git
        commit = subprocess.run(command, cwd=root, capture_output=True, text=True).stdout.strip()
    shown = argv or ["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]]
    return {
        "command": " ".join(_anonymous(word) for word in shown),
        "commit": commit,
        "machine": f"{cpu_name()}, {num_cores()} cores, {kernels}",
        "date": time.strftime("%Y-%m-%d"),
    }


def _anonymous(word: str) -> str:
    """Folders of one machine mean nothing on another: only their last name is kept."""
    return Path(word).name if word.startswith("/") else word


def save(name: str, result: dict) -> Path:
    """Write a result as JSON into benchmarks/results."""
    folder = Path(__file__).resolve().parent / "results"
    folder.mkdir(exist_ok=True)
    path = folder / f"{name}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    return path
