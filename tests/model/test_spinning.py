"""Threads that torch needs no more end, and come back when it does."""

import os
import sys
import time

import pytest
import torch

from moe_infinity.model import spinning


@pytest.mark.skipif(sys.platform != "linux", reason="counts threads in /proc")
@pytest.mark.skipif(spinning._pause() is None, reason="torch runs on another OpenMP")
def test_helpers_end_and_come_back() -> None:
    before, x = torch.get_num_threads(), torch.randn(512, 512)
    torch.set_num_threads(2)
    try:
        expected = x @ x
        with_helpers = len(os.listdir("/proc/self/task"))
        spinning.end_idle_threads()
        deadline = time.monotonic() + 30
        while len(os.listdir("/proc/self/task")) >= with_helpers and time.monotonic() < deadline:
            time.sleep(0.01)
        assert len(os.listdir("/proc/self/task")) < with_helpers
        assert torch.equal(x @ x, expected)
    finally:
        torch.set_num_threads(before)
