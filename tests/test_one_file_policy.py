"""A new policy is one new file: help, contract tests, simulator and live run find it."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import moe_infinity
from moe_infinity.tracing.trace_file import save_trace
from support.traces import random_trace

TESTS = Path(__file__).parent
SOURCE = '''"""Least often used goes first."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from moe_infinity.policies.base import CachePolicy
from moe_infinity.tracing.event import Event
from moe_infinity.types import ExpertShape


class Policy(CachePolicy):
    """Frequency over three: all there is to a policy."""

    def __init__(self, shape: ExpertShape, num_slots: int, seed: int = 0) -> None:
        super().__init__(shape, num_slots, seed)
        self._uses = np.zeros(self.grid)

    def on_event(self, event: Event) -> None:
        self._uses[event.layer, event.experts] += 1

    def keep_scores(self, layer: int) -> NDArray[np.float64]:
        return self._uses / 3
'''


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the package with one more file in it; the weights are linked."""
    folder = tmp_path_factory.mktemp("copy")
    source, copy = Path(moe_infinity.__file__).parent, folder / "moe_infinity"
    ignored = shutil.ignore_patterns("__pycache__", "*.safetensors")
    shutil.copytree(source, copy, ignore=ignored)
    for weights in (source / "bundled").glob("*.safetensors"):
        (copy / "bundled" / weights.name).symlink_to(weights)
    (copy / "policies" / "brand_new.py").write_text(SOURCE)
    return folder


PROGRAM = """
import json, sys
from moe_infinity.cli import _run
commands, tests = json.loads(sys.argv[1])
for arguments in commands:
    assert _run(arguments) == 0, arguments
    print("<end of what it said>")
import pytest
sys.exit(pytest.main(tests))
"""


@pytest.fixture(scope="module")
def said(package: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """What one process says to every command, and in the end to the contract tests."""
    trace = tmp_path_factory.mktemp("trace") / "t.safetensors"
    save_trace(random_trace(3, 8, 2, 40, seed=1), trace)
    simulated = ("--capacity", "25%", "--json", "--processes", 1)
    live = ("--ram-slots", 64, "--max-new-tokens", 4, "--json")
    commands = [
        ["run", "--help"],
        ["simulate", "--help"],
        ["simulate", trace, "--policy", "brand_new", *simulated],
        ["run", "hello there", "--policy", "brand_new", *live],
    ]
    contract = TESTS / "policies" / "test_policy_contract.py"
    tests = ["-q", "-p", "no:cacheprovider", "-k", "brand_new", "--rootdir", TESTS.parent]
    tests += ["-W", "ignore::pytest.PytestAssertRewriteWarning"]  # some is imported already
    tests += ["-c", TESTS.parent / "pyproject.toml", contract]
    asked = [list(map(str, each)) for each in commands], list(map(str, tests))
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps(asked)],
        env=os.environ | {"PYTHONPATH": str(package), "OMP_NUM_THREADS": "1", "COLUMNS": "200"},
        capture_output=True,
        text=True,
        cwd=package,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.split("<end of what it said>\n")


def test_the_contract_tests_hold_it_to_account(said: list[str]) -> None:
    assert int(said[4].split(" passed")[0].split()[-1]) >= 10


def test_help_names_it(said: list[str]) -> None:
    assert "brand_new" in said[0] and "brand_new" in said[1]
    assert "Usage: moe-infinity simulate" in said[1]


def test_the_simulator_replays_it(said: list[str]) -> None:
    (row,) = json.loads(said[2])
    assert 0 < row["hit_rate"] < 1


def test_a_live_run_uses_it(said: list[str]) -> None:
    report = json.loads(said[3])
    assert report["faults"] == []
    assert report["misses"] > 0
