"""What a GPU machine is and how fast its parts are, before any model is opened."""

from __future__ import annotations

import importlib
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from moe_infinity.checkpoint.direct_io import allocate
from moe_infinity.devices.base import Device
from moe_infinity.devices.choice import open_device
from moe_infinity.kernels import native

ROOT = Path(__file__).resolve().parent.parent
_PINNED_BYTES = 1024**3
_WRITTEN_BYTES = 512 * 1024**2
_BUILD = "from setuptools import setup; setup()"


def facts(device_name: str, work: Path) -> dict[str, Any]:
    import psutil
    import transformers

    device = open_device(device_name)
    assert device is not None
    found: dict[str, Any] = {
        "gpu": device.name,
        "driver": _driver(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "triton": _version("triton"),
        "accelerate": _version("accelerate"),
        "ram_bytes": psutil.virtual_memory().total,
        "ram_available_bytes": psutil.virtual_memory().available,
        "vram_bytes": device.total_bytes(),
        "link_gbps": device.link_gbps(),
        "memory_gbps": device.memory_gbps(),
        "native_kernels": native.native is not None,
        "work_write_gbps": write_gbps(work),
    }
    size = _PINNED_BYTES if device_name.startswith("cuda") else 1024**2
    found |= pinning(device, size)
    return found


def pinning(device: Device, num_bytes: int) -> dict[str, Any]:
    """GB/s of making memory one that the device copies from, with its pages there and without."""
    found: dict[str, Any] = {}
    for name in ("pin_untouched_gbps", "pin_touched_gbps"):
        host = torch.frombuffer(allocate(num_bytes), dtype=torch.uint8)
        if name == "pin_touched_gbps":
            host.fill_(1)
        began_s = time.perf_counter()
        is_pinned = device.pin(host)
        found[name] = num_bytes / (time.perf_counter() - began_s) / 1e9 if is_pinned else None
        if is_pinned:
            device.unpin(host)
    return found


def write_gbps(work: Path) -> float:
    """Of a file that has safely arrived."""
    data = memoryview(os.urandom(16 * 1024**2))
    path = work / "speed"
    began_s = time.perf_counter()
    with path.open("wb") as file:
        for _ in range(_WRITTEN_BYTES // len(data)):
            file.write(data)
        os.fsync(file.fileno())
    seconds = time.perf_counter() - began_s
    path.unlink()
    return _WRITTEN_BYTES / seconds / 1e9


class NativeBuild:
    """Compiles the processor's kernels beside everything else, where they are not there: misses
    that the processor takes would be computed by torch."""

    def __init__(self) -> None:
        self._child: subprocess.Popen[str] | None = None
        if native.native is None:
            command = [sys.executable, "-c", _BUILD, "-q", "build_ext", "--inplace"]
            self._child = subprocess.Popen(
                command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
            )

    def is_over(self) -> bool:
        return self._child is None or self._child.poll() is not None

    def finish(self) -> dict[str, Any]:
        """Models opened from now on use them."""
        if self._child is None:
            return {"native_kernels": True}
        said = self._child.communicate()[0]
        try:
            native.native = importlib.import_module("moe_infinity.kernels._native")
        except ImportError:
            return {"native_kernels": False, "said": said[-500:]}
        return {"native_kernels": True}

    def give_up(self) -> None:
        if self._child is not None:
            self._child.kill()
            self._child.wait()


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""


def _version(name: str) -> str:
    from importlib import metadata

    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return ""
