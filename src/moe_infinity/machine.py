"""What this machine is, what it has left, and how fast it moves bytes."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import torch

from moe_infinity.checkpoint.direct_io import DirectFile, align_down, allocate
from moe_infinity.kernels import native
from moe_infinity.kernels.choice import choose

_MEASURE_S = 0.3
# Beyond most processors' caches, yet small enough to measure inside a tight budget.
_MEMORY_BYTES = 64 * 1024**2
_PROC_STATUS = Path("/proc/self/status")
_CGROUPS = Path("/sys/fs/cgroup")
_OWN_CGROUPS = Path("/proc/self/cgroup")


@dataclass(frozen=True)
class Bandwidths:
    """Measured speeds in 1e9 bytes per second."""

    disk_gbps: float
    memory_gbps: float  # plain reading, all of torch's threads
    matvec_gbps: float  # what a 16-bit matrix-vector product of an expert's size reaches


def measure(files: Sequence[Path], read_bytes: int) -> Bandwidths:
    """Measure for about a second: direct reads from ``files``, RAM, and products."""
    return Bandwidths(
        disk_gbps=measure_disk_gbps(files, read_bytes),
        memory_gbps=measure_memory_gbps(),
        matvec_gbps=measure_matvec_gbps(read_bytes),
    )


def measure_disk_gbps(files: Sequence[Path], read_bytes: int, num_threads: int = 4) -> float:
    """Direct reads of ``read_bytes`` at random places, on several threads."""
    from concurrent.futures import ThreadPoolExecutor

    opened = [DirectFile(path) for path in files]
    size = max(4096, align_down(min(read_bytes, 8 * 1024**2)))
    deadline = time.perf_counter() + _MEASURE_S

    def read(seed: int) -> int:
        generator = torch.Generator().manual_seed(seed + time.perf_counter_ns() % 2**31)
        buffer = memoryview(allocate(size))
        done = 0
        while time.perf_counter() < deadline:
            file = opened[int(torch.randint(len(opened), (1,), generator=generator))]
            room = max(1, (file.num_bytes - size) // 4096)
            place = int(torch.randint(room, (1,), generator=generator)) * 4096
            needed = min(size, file.num_bytes - place)
            file.read_into(buffer[:size], place, needed)
            done += needed
        return done

    start = time.perf_counter()
    with ThreadPoolExecutor(num_threads) as pool:
        total = sum(pool.map(read, range(num_threads)))
    elapsed = time.perf_counter() - start
    for file in opened:
        file.close()
    return total / elapsed / 1e9


def measure_memory_gbps() -> float:
    """Reading speed of RAM with torch's threads."""
    data = torch.ones(_MEMORY_BYTES // 4)
    return _MEMORY_BYTES / _best_s(lambda: data.sum()) / 1e9


def measure_matvec_gbps(expert_bytes: int) -> float:
    """Bytes per second through bf16 matrix-vector products, the matrices beyond any cache, with
    the kernel that runs would choose."""
    rows = max(64, min(2048, int((expert_bytes / 4) ** 0.5)))
    count = max(2, _MEMORY_BYTES // (rows * rows * 2))
    weights = torch.zeros(count, rows, rows, dtype=torch.bfloat16)
    x = torch.zeros(1, rows, dtype=torch.bfloat16)

    kernel = choose("auto")
    compiled = kernel if isinstance(kernel, native.Kernel) else None
    described = [native.describe(weight) for weight in weights]

    def products() -> None:
        for weight, matrix in zip(weights, described, strict=True):
            if compiled is not None:
                compiled.linear(matrix, rows, x)
            else:
                torch.nn.functional.linear(x, weight)

    speed = weights.numel() * 2 / _best_s(products) / 1e9
    kernel.close()
    return speed


def _best_s(function: object) -> float:
    assert callable(function)
    function()
    best = float("inf")
    for _ in range(3):
        start = time.perf_counter()
        function()
        best = min(best, time.perf_counter() - start)
    return best


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
