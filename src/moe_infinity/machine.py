"""What this machine is, what it has left, and how fast it moves bytes."""

from __future__ import annotations

import contextlib
import itertools
import os
import platform
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import torch

from moe_infinity.checkpoint.direct_io import ALIGNMENT_BYTES, align_down, allocate, open_all
from moe_infinity.product_speed import BEYOND_CACHES_BYTES, best_s, measure_matvec_gbps

_MEASURE_S, _TRY_S = 0.3, 0.1  # the speed of the disk; each way of reading
_THREADS = (1, 2, 4, 8)
_CHUNKS_BYTES = tuple(n * 1024**2 for n in (1, 2, 4, 8))
_NEARLY = 0.95
_MOST_THREADS = 64
_PROC_STATUS = Path("/proc/self/status")
_CGROUPS = Path("/sys/fs/cgroup")
_OWN_CGROUPS = Path("/proc/self/cgroup")


@dataclass(frozen=True)
class Bandwidths:
    """Measured speeds in 1e9 bytes per second."""

    disk_gbps: float
    memory_gbps: float  # plain reading, all of torch's threads
    matvec_gbps: float  # what a 16-bit matrix-vector product of an expert's size reaches
    # How the disk reaches its speed: reads under way at once, and bytes of one.
    read_threads: int = 4
    read_chunk_bytes: int = 2 * 1024**2

    def __post_init__(self) -> None:
        speeds = (self.disk_gbps, self.memory_gbps, self.matvec_gbps)
        reads = (self.read_threads, self.read_chunk_bytes)
        if not (
            all(isinstance(speed, (int, float)) and speed > 0 for speed in speeds)
            and all(type(number) is int and number > 0 for number in reads)
            and self.read_threads <= _MOST_THREADS
            and self.read_chunk_bytes % ALIGNMENT_BYTES == 0
        ):
            raise ValueError(f"got {self}, expected positive speeds, and whole pages read")


def measure(files: Sequence[Path], read_bytes: int) -> Bandwidths:
    """Measure for about two seconds: direct reads from ``files``, RAM, and products."""
    gbps, num_threads, chunk_bytes = best_reading(files, read_bytes)
    return Bandwidths(
        disk_gbps=gbps,
        memory_gbps=measure_memory_gbps(),
        matvec_gbps=measure_matvec_gbps(read_bytes),
        read_threads=num_threads,
        read_chunk_bytes=chunk_bytes,
    )


def best_reading(files: Sequence[Path], expert_bytes: int) -> tuple[float, int, int]:
    """The disk's speed in 1e9 bytes per second, and the fewest threads and smallest chunks that
    come near it: what is asked for meanwhile then waits least."""
    whole = align_down(expert_bytes) or ALIGNMENT_BYTES
    chunks = [chunk for chunk in _CHUNKS_BYTES if chunk < expert_bytes] or [whole]
    tried = [
        (disk_gbps(files, num_threads, chunk_bytes, _TRY_S), num_threads, chunk_bytes)
        for num_threads, chunk_bytes in itertools.product(_THREADS, chunks)
    ]
    enough = _NEARLY * max(tried)[0]
    good = (each for each in tried if each[0] >= enough)
    _, num_threads, chunk_bytes = min(good, key=lambda each: each[1] * each[2])
    # Anew, for the best of many short tries is a lucky one.
    return disk_gbps(files, num_threads, chunk_bytes, _MEASURE_S), num_threads, chunk_bytes


def disk_gbps(files: Sequence[Path], num_threads: int, chunk_bytes: int, seconds: float) -> float:
    """Direct reads of ``chunk_bytes`` (whole pages) at random places, on several threads."""
    from concurrent.futures import ThreadPoolExecutor

    opened = open_all(files)
    weights = torch.tensor([float(max(1, file.num_bytes)) for file in opened])  # some are tiny
    deadline = time.perf_counter() + seconds

    def read(seed: int) -> int:
        generator = torch.Generator().manual_seed(seed + time.perf_counter_ns() % 2**31)
        buffer = memoryview(allocate(chunk_bytes))
        done = 0
        while True:
            file = opened[int(torch.multinomial(weights, 1, generator=generator))]
            room = max(1, (file.num_bytes - chunk_bytes) // 4096)
            place = int(torch.randint(room, (1,), generator=generator)) * 4096
            needed = min(chunk_bytes, file.num_bytes - place)
            file.read_into(buffer[:chunk_bytes], place, needed)
            done += needed
            if time.perf_counter() >= deadline:
                return done

    with contextlib.ExitStack() as stack:
        for file in opened:
            stack.callback(file.close)
        start = time.perf_counter()
        with ThreadPoolExecutor(num_threads) as pool:
            total = sum(pool.map(read, range(num_threads)))
        return total / (time.perf_counter() - start) / 1e9


def measure_memory_gbps() -> float:
    """Reading speed of RAM with torch's threads."""
    data = torch.ones(BEYOND_CACHES_BYTES // 4)
    return BEYOND_CACHES_BYTES / best_s(lambda: data.sum()) / 1e9


def resident_bytes() -> int:
    """Resident memory of this process now."""
    return _status_bytes("VmRSS")


def peak_resident_bytes() -> int:
    """The largest resident memory this process has had."""
    return _status_bytes("VmHWM")


def _status_bytes(field: str) -> int:
    if _PROC_STATUS.exists():
        for line in _PROC_STATUS.read_text().splitlines():
            if line.startswith(field + ":"):
                return int(line.split()[1]) * 1024
    import psutil

    info = psutil.Process().memory_info()
    return int(getattr(info, "peak_wset", info.rss) if field == "VmHWM" else info.rss)


def available_bytes() -> int:
    """Memory this process could still get: free RAM, or less under a kernel limit."""
    import psutil

    available = int(psutil.virtual_memory().available)
    for file in _limit_files():
        if file.exists() and (text := file.read_text().strip()).isdigit():
            available = min(available, int(text) - resident_bytes())
    return max(available, 0)


def _limit_files() -> list[Path]:
    """Where limits of this process's control groups, and of all above them, would be named."""
    files = []
    lines = _OWN_CGROUPS.read_text().splitlines() if _OWN_CGROUPS.exists() else []
    for controllers, path in (line.split(":", 2)[1:] for line in lines):
        group = PurePosixPath(path.lstrip("/"))
        if not controllers:  # version 2
            files += [_CGROUPS / g / "memory.max" for g in (group, *group.parents)]
        elif "memory" in controllers.split(","):
            base = _CGROUPS / "memory"
            files += [base / g / "memory.limit_in_bytes" for g in (group, *group.parents)]
    return files


def cpu_name() -> str:
    """The processor's model name, as far as the system tells."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def instruction_sets() -> list[str]:
    """The vector instruction sets that matter for expert kernels."""
    wanted = ("avx2", "fma", "f16c", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16", "asimd")
    info = Path("/proc/cpuinfo")
    flags = set(info.read_text().split()) if info.exists() else set()
    return [flag for flag in wanted if flag in flags]


def num_cores() -> int:
    """Cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
