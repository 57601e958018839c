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


def python(package: Path, *arguments: object) -> str:
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": str(package), "OMP_NUM_THREADS": "1", "COLUMNS": "200"},
        capture_output=True,
        text=True,
        cwd=package,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def command(package: Path, *arguments: object) -> str:
    return python(package, "-c", "from moe_infinity.cli import main; main()", *arguments)


def test_help_names_it(package: Path) -> None:
    asked = "_run(['run', '--help']); _run(['simulate', '--help'])"
    shown = python(package, "-c", f"from moe_infinity.cli import _run; {asked}")
    assert shown.count("brand_new") >= 2 and "Usage: moe-infinity simulate" in shown


def test_the_simulator_replays_it(package: Path, tmp_path: Path) -> None:
    save_trace(random_trace(3, 8, 2, 40, seed=1), tmp_path / "t.safetensors")
    options = ("--policy", "brand_new", "--capacity", "25%", "--json", "--processes", 1)
    (row,) = json.loads(command(package, "simulate", tmp_path / "t.safetensors", *options))
    assert 0 < row["hit_rate"] < 1


def test_a_live_run_uses_it(package: Path) -> None:
    options = ("--policy", "brand_new", "--ram-slots", 64, "--max-new-tokens", 4, "--json")
    report = json.loads(command(package, "run", "hello there", *options))
    assert report["faults"] == []
    assert report["misses"] > 0


def test_the_contract_tests_hold_it_to_account(package: Path) -> None:
    contract = TESTS / "policies" / "test_policy_contract.py"
    options = ("-q", "-p", "no:cacheprovider", "-k", "brand_new", "--rootdir", TESTS.parent)
    config = ("-c", TESTS.parent / "pyproject.toml")
    out = python(package, "-m", "pytest", contract, *options, *config)
    assert int(out.split(" passed")[0].split()[-1]) >= 10
