"""Threads that torch needs no more end, and come back when it does."""

import os
import subprocess
import sys
import time

import pytest
import torch

from moe_infinity.model import spinning


def helpers(before: set[str]) -> set[str]:
    return set(os.listdir("/proc/self/task")) - before


@pytest.mark.skipif(sys.platform != "linux", reason="counts threads in /proc")
@pytest.mark.skipif(spinning._pause() is None, reason="torch runs on another OpenMP")
def test_helpers_end_and_come_back() -> None:
    num_threads, x = torch.get_num_threads(), torch.randn(512, 512)
    torch.set_num_threads(2)
    try:
        spinning.end_idle_threads()
        before = set(os.listdir("/proc/self/task"))
        expected = x @ x
        started = helpers(before)
        assert started, "torch shares such a product out"
        spinning.end_idle_threads()
        deadline = time.monotonic() + 30
        while started & helpers(before) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert not started & helpers(before)
        assert torch.equal(x @ x, expected)
        assert helpers(before), "they are back"
    finally:
        torch.set_num_threads(num_threads)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="has no fork")
def test_a_forked_process_with_one_thread_does_not_wait_for_them() -> None:
    """In a process of its own: a fork of this one would take its threads' locks along."""
    code = """if True:
        import os, signal, torch
        from moe_infinity.model import spinning
        torch.set_num_threads(2)
        torch.randn(512, 512) @ torch.randn(512, 512)
        child = os.fork()
        if not child:
            signal.alarm(60)
            torch.set_num_threads(1)
            spinning.end_idle_threads()
            os._exit(7)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    """
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
