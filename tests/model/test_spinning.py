"""Threads that torch needs no more end, and come back when it does."""

import os
import subprocess
import sys
import threading
import time

import pytest
import torch

from moe_infinity import MoE, bundled_model_path
from moe_infinity.machine import num_cores
from moe_infinity.model import spinning
from support.engine import BUDGET


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


IDLE = """if True:
    {first}
    import os
    import threading
    from moe_infinity.config import let_idle_threads_sleep
    let_idle_threads_sleep()
    import torch
    from moe_infinity.model.spinning import IdleTeams
    torch.set_num_threads(2)
    def num_threads():
        return len(os.listdir("/proc/self/task"))
    num_before, num_python = num_threads(), threading.active_count()
    teams = IdleTeams()
    num_teams = threading.active_count() - num_python
    assert num_threads() - num_before == 2 * num_teams, "each has a helper"
    print(num_teams)
    teams.close()
    assert threading.active_count() == num_python
"""


NUM_TEAMS = num_cores() - 1 if num_cores() <= 4 else 0  # of two threads each


@pytest.mark.skipif(sys.platform != "linux", reason="counts threads in /proc")
@pytest.mark.skipif(spinning._pause() is None, reason="torch runs on another OpenMP")
@pytest.mark.parametrize(
    ("first", "told", "has_teams"),
    [("import torch", None, True), ("import torch", "active", False), ("", None, False)],
)
def test_teams_idle_where_torch_came_first_and_nobody_told_it_how_to_wait(
    first: str, told: str | None, has_teams: bool
) -> None:
    told_how = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
    env = {name: value for name, value in os.environ.items() if name not in told_how}
    env |= {"OMP_WAIT_POLICY": told} if told else {}
    command = [sys.executable, "-c", IDLE.format(first=first)]
    said = subprocess.run(command, check=True, timeout=120, env=env, capture_output=True).stdout
    assert int(said) == (NUM_TEAMS if has_teams else 0)


def test_they_end_with_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    def idle() -> list[str]:
        return [t.name for t in threading.enumerate() if t.name.startswith("moe-infinity-idle")]

    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
        monkeypatch.delenv(name, raising=False)
    before, num_threads = idle(), torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with MoE(bundled_model_path(), ram=BUDGET, ram_slots=24):
            has_idle = NUM_TEAMS > 0 and spinning._pause() is not None
            assert (len(idle()) > len(before)) == has_idle
    finally:
        torch.set_num_threads(num_threads)
    assert idle() == before
