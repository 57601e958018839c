"""The contract of a device that computes: its memory, and streams that copy into and out of it.

Knows nothing of experts. What is put on a stream is done in its order, at some later time; marks
order streams among each other and let the host know.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Literal

import torch

Direction = Literal["up", "down"]  # from host memory to the device's, and back


class Mark(ABC):
    """A point in a stream: reached when everything put on the stream before it is done."""

    @abstractmethod
    def is_reached(self) -> bool:
        """Does not wait."""

    @abstractmethod
    def wait(self) -> None:
        """Let the calling thread wait for it; any thread may."""


class Stream(ABC):
    """Work in order. One thread puts work on it."""

    @abstractmethod
    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """Copy the bytes of ``source`` [n] uint8 to ``target`` [n] uint8; one of them lies on the
        device. Both have to stay as they are until a later mark is reached."""

    @abstractmethod
    def after(self, mark: Mark) -> None:
        """What is put on this stream from now on waits for ``mark``; the host does not."""

    @abstractmethod
    def mark(self) -> Mark:
        """The point that is reached when all that was put on so far is done."""


class Device(ABC):
    """Where dense weights lie and products are computed.

    name: for reports. torch_device: where tensors have to be. compute: the stream on which torch
    and our kernels launch. runtime_bytes: what driver and libraries take of its memory; host_bytes:
    and, once kernels are there, of RAM. has_bf16: whether it computes in bfloat16. reads_host:
    whether its kernels find pinned memory at the host's own addresses. rounding: devices that say
    the same have the same results to the last bit.
    """

    name: str
    runtime_bytes: int = 0
    host_bytes: int = 0
    has_bf16: bool = True
    reads_host: bool = True
    rounding: str = ""
    torch_device: torch.device
    compute: Stream

    @abstractmethod
    def allocate(self, num_bytes: int) -> torch.Tensor:
        """[num_bytes] uint8 on the device. Raises BudgetError if there is no room."""

    def limit(self, num_bytes: int) -> None:
        """Take no more of the device's memory than that, driver and libraries included; whoever
        asks for more meets an OutOfMemoryError."""

    @abstractmethod
    def new_stream(self, direction: Direction) -> Stream:
        """A stream of copies in one direction, beside the computation."""

    @abstractmethod
    def pin(self, host: torch.Tensor) -> bool:
        """Make host memory [n] uint8 one that can be copied from at full speed and beside other
        work. False where the system refuses: copies from it are slower, not wrong."""

    @abstractmethod
    def unpin(self, host: torch.Tensor) -> None:
        """Undo ``pin`` that returned True, before the memory is freed."""

    @abstractmethod
    def free_bytes(self) -> int:
        """Memory that could be allocated now."""

    @abstractmethod
    def total_bytes(self) -> int:
        """The device's whole memory."""

    @abstractmethod
    def link_gbps(self) -> float:
        """Bytes that pinned memory delivers, 1e9 a second. Known from the start, as is the next."""

    @abstractmethod
    def memory_gbps(self) -> float | None:
        """Bytes that the device reads of its own memory, 1e9 a second. None: its memory is the
        machine's."""

    def computing(self) -> AbstractContextManager[object]:
        """While it is open, what the calling thread launches goes to ``compute``."""
        return nullcontext()

    @abstractmethod
    def bring(self, tensor: torch.Tensor, source: Device) -> torch.Tensor:
        """A copy, here, of a tensor on another device of the same kind: after what either was
        given to compute so far, and before what either is given next. The host goes on."""

    @abstractmethod
    def take_stall_s(self) -> float:
        """Seconds that ``compute`` spent waiting in ``after``, as far as known and not yet told."""

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        """Record what ``work`` launches, without doing it. Returns what does it, again and again,
        with whatever its tensors hold then. Raises RuntimeError for work that cannot be recorded;
        nothing was done then."""
        return work

    def close(self) -> None:
        """Wait for everything that was put on a stream. Idempotent."""
