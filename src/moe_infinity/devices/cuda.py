"""An NVIDIA GPU by way of torch: streams, events, pinned host memory."""

from __future__ import annotations

import contextlib
import platform
import sys
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from typing import Any

import torch

from moe_infinity.devices.base import Device, Direction, Mark, Stream
from moe_infinity.errors import BudgetError, ConfigError, DeviceError

_cuda: Any = torch.cuda  # which is typed in parts only
_OLDEST_DRIVER = "525"  # of CUDA 12, which torch's builds need
# What a context, cuBLAS's workspace and loaded kernels take, and in RAM beside what is resident
# after the start: an estimate on the safe side, not measured.
RUNTIME_BYTES = 700 * 1024**2
HOST_BYTES = 512 * 1024**2
_MEASURED_BYTES = 128 * 1024**2  # beyond the caches of every card
_MEASURED_RUNS = 5
_MOST_OPEN_STALLS = 512  # events that are kept until it is known when they were reached


class CudaDevice(Device):
    """One GPU. Raises ConfigError where there is none, or none that can be used."""

    runtime_bytes = RUNTIME_BYTES
    host_bytes = HOST_BYTES

    def __init__(self, index: int = 0) -> None:
        _require_cuda(index)
        self.torch_device = torch.device("cuda", index)
        properties = _cuda.get_device_properties(index)
        is_alone = _cuda.device_count() == 1
        self.name = properties.name if is_alone else f"{properties.name} (cuda:{index})"
        self.rounding = properties.name
        self.has_bf16 = properties.major >= 8
        self.reads_host = sys.platform == "linux" and "microsoft" not in platform.release().lower()
        self._stalls: deque[tuple[Any, Any]] = deque()
        self._stall_s = 0.0
        self._pool: Any = None  # of all recordings: one runs at a time
        self._stream = _cuda.default_stream(index)
        self.compute = _CudaStream(self._stream, self._stalls)
        with self.computing():
            self._link_gbps, self._memory_gbps = self._measure()

    def allocate(self, num_bytes: int) -> torch.Tensor:
        try:
            return torch.empty(num_bytes, dtype=torch.uint8, device=self.torch_device)
        except _cuda.OutOfMemoryError as error:
            raise BudgetError(
                f"{self.name}: got a request for {num_bytes} bytes of device memory, expected at "
                f"most the {self.free_bytes()} that are free; close what else uses the GPU, or "
                f"ask for less vram"
            ) from error

    def limit(self, num_bytes: int) -> None:
        share = max(0, num_bytes - self.runtime_bytes) / self.total_bytes()
        _cuda.set_per_process_memory_fraction(min(1.0, share), self.torch_device)

    def new_stream(self, direction: Direction) -> Stream:
        return _CudaStream(_cuda.Stream(self.torch_device))

    def pin(self, host: torch.Tensor) -> bool:
        # For all GPUs: one address space makes every registration a portable one.
        with _cuda.device(self.torch_device):
            refused = _cuda.cudart().cudaHostRegister(host.data_ptr(), host.numel(), 0)
        if int(refused) == 0:
            return True
        with contextlib.suppress(RuntimeError):  # the refusal waits to be raised by the next launch
            torch.empty(1, device=self.torch_device).zero_()
        return False

    def unpin(self, host: torch.Tensor) -> None:
        with _cuda.device(self.torch_device):
            _cuda.cudart().cudaHostUnregister(host.data_ptr())

    def free_bytes(self) -> int:
        """Of the driver's, and what torch has taken from it and does not use."""
        free, _ = _cuda.mem_get_info(self.torch_device)
        kept = _cuda.memory_reserved(self.torch_device)
        return int(free + kept - _cuda.memory_allocated(self.torch_device))

    def total_bytes(self) -> int:
        return int(_cuda.mem_get_info(self.torch_device)[1])

    def link_gbps(self) -> float:
        return self._link_gbps

    def memory_gbps(self) -> float | None:
        return self._memory_gbps

    def computing(self) -> AbstractContextManager[object]:
        inside = ExitStack()
        inside.enter_context(_cuda.device(self.torch_device))
        inside.enter_context(_cuda.stream(self._stream))
        return inside

    def _measure(self) -> tuple[float, float]:
        """Of the link and of its own memory; before there is a plan, and nothing is kept."""
        host = torch.ones(_MEASURED_BYTES, dtype=torch.uint8).pin_memory()
        there = torch.empty_like(host, device=self.torch_device)
        copy_s = self._best_s(partial(there.copy_, host, non_blocking=True))
        read_s = self._best_s(there.view(torch.float32).sum)
        del host, there
        _cuda.empty_cache()
        torch._C._host_emptyCache()
        return _MEASURED_BYTES / copy_s / 1e9, _MEASURED_BYTES / read_s / 1e9

    def _best_s(self, work: Callable[[], object]) -> float:
        """Seconds of the quickest of several runs, by the device's own clock."""
        found = []
        for _ in range(_MEASURED_RUNS):
            began, ended = (_cuda.Event(enable_timing=True) for _ in range(2))
            began.record()
            work()
            ended.record()
            ended.synchronize()
            found.append(began.elapsed_time(ended) / 1e3)
        return float(min(found))

    def bring(self, tensor: torch.Tensor, source: Device) -> torch.Tensor:
        # torch lets both devices' current streams wait for each other: they have to be these.
        with source.computing(), self.computing():
            return tensor.to(self.torch_device, non_blocking=True)

    def take_stall_s(self) -> float:
        while self._stalls and self._stalls[0][1].query():
            began, ended = self._stalls.popleft()
            self._stall_s += began.elapsed_time(ended) / 1e3
        while len(self._stalls) > _MOST_OPEN_STALLS:  # not worth waiting for
            self._stalls.popleft()
        taken, self._stall_s = self._stall_s, 0.0
        return taken

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        graph = _cuda.CUDAGraph()
        self._pool = self._pool or _cuda.graph_pool_handle()
        try:
            # Other threads may meanwhile wait for events of their own.
            with _cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                work()
        except BaseException:
            with contextlib.suppress(RuntimeError):
                _cuda.synchronize(self.torch_device)
            raise
        finally:  # a recording that breaks off leaves its own stream behind
            _cuda.set_stream(self._stream)
        replay: Callable[[], None] = graph.replay
        return replay

    def close(self) -> None:
        try:
            _cuda.synchronize(self.torch_device)
        except RuntimeError as error:  # lost in mid-run: there is nothing left to wait for
            raise DeviceError(f"{self.name}: lost ({error}), expected it to finish") from error


class _CudaMark(Mark):
    def __init__(self, event: Any, device: Any) -> None:
        self.event = event
        self._device = device

    def is_reached(self) -> bool:
        return bool(self.event.query())

    def wait(self) -> None:
        # In a new thread GPU 0 is the current one: it would get a context of half a gigabyte.
        with _cuda.device(self._device):
            self.event.synchronize()


class _CudaStream(Stream):
    def __init__(self, stream: Any, stalls: deque[tuple[Any, Any]] | None = None) -> None:
        """stalls: where to put the events around what this stream waits for."""
        self._stream = stream
        self._stalls = stalls

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        with _cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)

    def after(self, mark: Mark) -> None:
        assert isinstance(mark, _CudaMark)
        if self._stalls is None:
            self._stream.wait_event(mark.event)
            return
        began = _cuda.Event(enable_timing=True)
        ended = _cuda.Event(enable_timing=True)
        began.record(self._stream)
        self._stream.wait_event(mark.event)
        ended.record(self._stream)
        self._stalls.append((began, ended))

    def mark(self) -> Mark:
        event = _cuda.Event()
        event.record(self._stream)
        return _CudaMark(event, self._stream.device)


def _require_cuda(index: int) -> None:
    if torch.version.cuda is None:
        raise ConfigError(
            f"device: got cuda, expected a torch that was built for it; this one "
            f"({torch.__version__}) computes on the CPU: install a CUDA build of torch, or leave "
            f"device out"
        )
    try:
        _cuda.init()
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(
            f"device: got cuda, but the driver does not answer ({error}), expected a GPU with a "
            f"driver of {_OLDEST_DRIVER} or newer; see nvidia-smi, or leave device out"
        ) from error
    count = _cuda.device_count()
    if index >= count:
        raise ConfigError(f"device: got cuda:{index}, expected an index below {count}")
