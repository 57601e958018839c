"""A device in ordinary memory behind a link of a given speed: what a GPU would wait, without one.

Copies take effect when they end, not when they are begun: who forgets to wait computes with bytes
that are not there yet, as on a GPU. The processor computes.
"""

from __future__ import annotations

import heapq
import itertools
import threading
import time
from abc import ABC, abstractmethod

import torch

from moe_infinity.checkpoint.direct_io import allocate
from moe_infinity.devices.base import Device, Direction, Mark, Stream
from moe_infinity.errors import BudgetError
from moe_infinity.machine import available_bytes

PCIE4_GBPS = 24.0  # what x16 of the fourth generation delivers
_Copy = tuple[torch.Tensor, torch.Tensor]


class Clock(ABC):
    """Seconds that pass; tests bring one that they turn themselves."""

    @abstractmethod
    def now_s(self) -> float: ...

    @abstractmethod
    def wait_until(self, at_s: float) -> None: ...


class WallClock(Clock):
    """The machine's."""

    def now_s(self) -> float:
        return time.perf_counter()

    def wait_until(self, at_s: float) -> None:
        time.sleep(max(0.0, at_s - time.perf_counter()))


class _Begun:
    """Copies of devices that share a host's memory: they take effect in the order in which they
    end, whichever device's they are."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.lock = threading.Lock()
        self._heap: list[tuple[float, int, _Copy]] = []  # by the time at which they end
        self._order = itertools.count()

    def add(self, ends_s: float, copy: _Copy) -> None:
        """With the lock held."""
        heapq.heappush(self._heap, (ends_s, next(self._order), copy))

    def end(self, at_least_s: float = 0.0) -> None:
        with self.lock:
            now_s = max(self.clock.now_s(), at_least_s)
            while self._heap and self._heap[0][0] <= now_s:
                target, source = heapq.heappop(self._heap)[2]
                target.copy_(source)

    def last_s(self) -> float:
        with self.lock:
            return max((at_s for at_s, *_ in self._heap), default=0.0)


class SimulatedDevice(Device):
    """One link with two directions that do not disturb each other, as PCIe has."""

    def __init__(
        self,
        link_gbps: float = PCIE4_GBPS,
        clock: Clock | None = None,
        memory_bytes: int | None = None,
        pins: bool = True,
        beside: SimulatedDevice | None = None,
    ) -> None:
        """memory_bytes: of the device; None: what the machine has left now. pins: whether ``pin``
        works. beside: another one of the same machine, whose clock this one has too."""
        self.name = f"simulated, {link_gbps:g} GB/s"
        self.torch_device = torch.device("cpu")
        self._link_gbps = link_gbps
        self._begun: _Begun = beside._begun if beside else _Begun(clock or WallClock())
        self._clock = self._begun.clock
        self.compute: _Computation = _Computation(self)
        self._is_own = memory_bytes is not None
        self._memory_bytes = available_bytes() if memory_bytes is None else memory_bytes
        self._taken_bytes = 0
        self._pins = pins
        self._busy_until_s: dict[Direction, float] = {"up": 0.0, "down": 0.0}
        self._stall_s = 0.0

    def allocate(self, num_bytes: int) -> torch.Tensor:
        if num_bytes > self.free_bytes():
            raise BudgetError(
                f"{self.name}: got a request for {num_bytes} bytes, expected at most the "
                f"{self.free_bytes()} that are free; ask for less vram"
            )
        self._taken_bytes += num_bytes
        return torch.frombuffer(allocate(num_bytes), dtype=torch.uint8)[:num_bytes]

    def new_stream(self, direction: Direction) -> Stream:
        return _Copies(self, direction)

    def pin(self, host: torch.Tensor) -> bool:
        return self._pins

    def unpin(self, host: torch.Tensor) -> None:
        pass

    def free_bytes(self) -> int:
        if not self._is_own:  # others take of it, and give back
            return min(available_bytes(), self._memory_bytes)
        return self._memory_bytes - self._taken_bytes

    def total_bytes(self) -> int:
        return self._memory_bytes

    def link_gbps(self) -> float:
        return self._link_gbps

    def memory_gbps(self) -> float | None:
        return None

    def bring(self, tensor: torch.Tensor, source: Device) -> torch.Tensor:
        """Over the slower of both links, beside the copies on them: tokens are small."""
        assert isinstance(source, SimulatedDevice)
        gbps = min(self._link_gbps, source._link_gbps)
        marks = (self.compute.mark(), source.compute.mark())
        starts_s = max(self.now_s(), *(mark.at_s for mark in marks))
        self.wait_until(starts_s + tensor.nbytes / (gbps * 1e9))
        return tensor.clone()

    def take_stall_s(self) -> float:
        taken, self._stall_s = self._stall_s, 0.0
        return taken

    def close(self) -> None:
        self.wait_until(self._begun.last_s())

    def begin(self, copy: _Copy, direction: Direction, not_before_s: float) -> float:
        """Put a copy on the link, behind those of its direction. Returns when it ends."""
        with self._begun.lock:
            starts_s = max(self._clock.now_s(), not_before_s, self._busy_until_s[direction])
            ends_s = starts_s + copy[1].numel() / (self._link_gbps * 1e9)
            self._busy_until_s[direction] = ends_s
            self._begun.add(ends_s, copy)
        return ends_s

    def now_s(self) -> float:
        return self._clock.now_s()

    def has_reached(self, at_s: float) -> bool:
        if self._clock.now_s() < at_s:
            return False
        self._begun.end()
        return True

    def wait_until(self, at_s: float) -> float:
        """Let time pass; returns how much."""
        before_s = self._clock.now_s()
        if before_s < at_s:
            self._clock.wait_until(at_s)
        self._begun.end(at_s)
        return max(0.0, at_s - before_s)

    def count_stall(self, seconds: float) -> None:
        self._stall_s += seconds


class _At(Mark):
    def __init__(self, device: SimulatedDevice, at_s: float) -> None:
        self.at_s = at_s
        self._device = device

    def is_reached(self) -> bool:
        return self._device.has_reached(self.at_s)

    def wait(self) -> None:
        self._device.wait_until(self.at_s)


class _Copies(Stream):
    def __init__(self, device: SimulatedDevice, direction: Direction) -> None:
        self._device = device
        self._direction: Direction = direction
        self._ends_s = 0.0  # of what was put on last

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        self._ends_s = self._device.begin((target, source), self._direction, self._ends_s)

    def after(self, mark: Mark) -> None:
        assert isinstance(mark, _At)
        self._ends_s = max(self._ends_s, mark.at_s)

    def mark(self) -> Mark:
        return _At(self._device, self._ends_s)


class _Computation(Stream):
    """The calling thread computes. lag_s: how long after that it counts as done, for others to wait
    for, as on a device that works on its own."""

    def __init__(self, device: SimulatedDevice) -> None:
        self._device = device
        self.lag_s = 0.0

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        target.copy_(source)

    def after(self, mark: Mark) -> None:
        assert isinstance(mark, _At)
        self._device.count_stall(self._device.wait_until(mark.at_s))

    def mark(self) -> _At:
        return _At(self._device, self._device.now_s() + self.lag_s if self.lag_s else 0.0)
