"""What tests of the engine share: a request, its gate, and what must be left when all is over."""

import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from moe_infinity import MoE
from moe_infinity.checkpoint.kernel_reads import KernelRead, KernelReads

BUDGET = "8GiB"
PATIENCE_S = 60
IDS = torch.arange(1, 31)[None]  # [1, 30] int64


def generate(moe: MoE, num_new: int = 8, **options: Any) -> torch.Tensor:
    return moe.generate(IDS, max_new_tokens=num_new, eos_token_id=None, **options)


def assert_at_rest(moe: MoE) -> None:
    """Nothing is pinned, in flight, lost or doubled."""
    moe.check_integrity()
    directory = moe._hierarchy.residency.directory
    assert not directory.pins.any()
    assert not moe._hierarchy._in_flight
    tiers = moe.residency()
    assert sum(len(t["ram"]) for t in tiers) <= moe.stats().slots
    for tier in tiers:
        assert sorted(tier["ram"] + tier["disk"]) == list(range(len(tier["ram"] + tier["disk"])))


def readers() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith("moe-infinity-read-")]


def num_open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


@contextmanager
def leaving_nothing() -> Iterator[None]:
    """Fails if more threads or files are open at the end than at the beginning."""
    before = (len(readers()), num_open_files())
    yield
    assert (len(readers()), num_open_files()) == before


class Gate:
    """Holds every read of the checkpoint until it is opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.reached = threading.Event()
        self._open = threading.Event()
        real = os.preadv

        def held(fd: int, buffers: Any, offset: int, *flags: int) -> int:
            self.reached.set()
            assert self._open.wait(PATIENCE_S)
            return real(fd, buffers, offset, *flags)

        begin = KernelReads.begin

        def held_back(reads: KernelReads, wanted: Sequence[KernelRead]) -> int:
            self.reached.set()
            assert self._open.wait(PATIENCE_S)
            return begin(reads, wanted)

        monkeypatch.setattr(os, "preadv", held)
        monkeypatch.setattr(KernelReads, "begin", held_back)

    def open(self) -> None:
        self._open.set()


class Request(threading.Thread):
    """A request in a thread of its own; keeps what came of it."""

    def __init__(self, work: Callable[[], Any]) -> None:
        super().__init__(daemon=True)
        self._work = work
        self.error: BaseException | None = None
        self.start()

    def run(self) -> None:
        try:
            self._work()
        except BaseException as error:
            self.error = error

    def end(self) -> BaseException | None:
        self.join(PATIENCE_S)
        assert not self.is_alive()
        return self.error


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)
