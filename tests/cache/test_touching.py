"""Memory is touched ahead of its use, and no further."""

import mmap
import sys
import threading

import numpy as np
import pytest
import torch

from moe_infinity.cache import touching
from moe_infinity.cache.slots import SlotArena
from moe_infinity.cache.touching import Toucher
from moe_infinity.checkpoint.direct_io import ALIGNMENT_BYTES as PAGE
from moe_infinity.machine import resident_bytes
from support.stores import wait_until

MIB = 2**20


class Walked:
    """Stands for the system's call: notes what is touched."""

    def __init__(self, regions: list[tuple[int, int]]) -> None:
        self.regions = regions
        self.bytes = [0] * len(regions)
        self.code = 0

    def __call__(self, address: object, size: object, advice: int) -> int:
        at, count = address.value, size.value  # type: ignore[attr-defined]
        number = next(i for i, (start, n) in enumerate(self.regions) if start <= at < start + n)
        start, limit = self.regions[number]
        assert at + count <= start + limit, "beyond the region"
        self.bytes[number] += count
        return self.code


@pytest.fixture
def walked(monkeypatch: pytest.MonkeyPatch) -> Walked:
    found = Walked([(PAGE, 64 * MIB), (PAGE + 64 * MIB, 8 * MIB), (PAGE + 128 * MIB, 0)])

    class Library:
        madvise = found

    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(touching.ctypes, "CDLL", lambda name: Library)
    return found


def started(regions: list[tuple[int, int]], lead_bytes: int, memory: object = None) -> Toucher:
    toucher = Toucher(memory, regions, lead_bytes)
    toucher.start()
    return toucher


def test_it_stays_ahead_and_no_further(walked: Walked) -> None:
    toucher = started(walked.regions, 16 * MIB)
    wait_until(lambda: walked.bytes == [16 * MIB, 8 * MIB, 0])
    toucher.use(0, 4 * MIB)
    wait_until(lambda: walked.bytes[0] == 20 * MIB)
    toucher.use(0, 2 * MIB)  # used before
    toucher.use(0, 40 * MIB)  # a prompt that overtook it: what is used needs no touch
    wait_until(lambda: walked.bytes[0] == 36 * MIB)
    toucher.use(0, 64 * MIB)  # all of it
    toucher.use(1, 8 * MIB)
    toucher.close()
    assert walked.bytes[0] <= 44 * MIB and walked.bytes[1:] == [8 * MIB, 0]


def test_its_lead_can_be_cut_and_grow_again(walked: Walked) -> None:
    toucher = started(walked.regions, 16 * MIB)
    wait_until(lambda: walked.bytes == [16 * MIB, 8 * MIB, 0])
    toucher.keep_lead(4 * MIB)
    toucher.use(0, 8 * MIB)  # it is further already
    toucher.use(0, 20 * MIB)
    wait_until(lambda: walked.bytes[0] == 20 * MIB)  # 20 to 24: what was used is not touched
    toucher.keep_lead(32 * MIB)
    wait_until(lambda: walked.bytes[0] == 48 * MIB)
    toucher.close()
    assert walked.bytes == [48 * MIB, 8 * MIB, 0]
    assert toucher.untouched_bytes() == 12 * MIB


def test_a_system_that_refuses(walked: Walked) -> None:
    walked.code = -1
    toucher = started(walked.regions, 16 * MIB)
    toucher._thread.join()
    toucher.use(0, 4 * MIB)
    toucher.close()
    assert sum(walked.bytes) <= 4 * MIB


def test_another_system(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    toucher = started([(0, 64 * MIB)], MIB)
    toucher.use(0, 4 * MIB)
    toucher.close()
    toucher.close()


def test_nothing_before_it_is_told(walked: Walked) -> None:
    toucher = Toucher(None, walked.regions)
    toucher.use(0, 4 * MIB)
    toucher.close()
    assert walked.bytes == [0, 0, 0]


@pytest.mark.skipif(sys.platform != "linux", reason="the call is Linux's")
def test_real_memory_is_there_and_unchanged() -> None:
    memory = mmap.mmap(-1, 64 * MIB, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    whole = torch.frombuffer(memory, dtype=torch.uint8)
    whole[:PAGE] = 7
    threads, before = threading.active_count(), resident_bytes()
    toucher = started([(whole.data_ptr(), 64 * MIB)], 32 * MIB, memory)
    wait_until(lambda: toucher._done == [32 * MIB] or not toucher._thread.is_alive())
    refused = not toucher._thread.is_alive()
    toucher.close()
    assert threading.active_count() == threads
    if refused:
        pytest.skip("this system is older than the call")
    assert 24 * MIB < resident_bytes() - before < 48 * MIB
    assert np.count_nonzero(whole.numpy()) == PAGE


def test_an_arena_that_is_dropped_leaves_no_thread() -> None:
    threads = threading.active_count()
    arena = SlotArena((4,), (MIB,))
    arena.buffer(1)
    del arena
    assert threading.active_count() == threads
