"""Test of benchmarks/gpu.py: every step runs without a GPU, and its result can be rendered."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.slow
def test_every_step_runs_without_a_gpu(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    out = tmp_path / "gpu.json"
    command = [sys.executable, "benchmarks/gpu.py", "--dry", "--out", str(out)]
    env = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    child = subprocess.run(
        [*command, "--work", str(tmp_path / "work")],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
        check=True,
    )
    result = json.loads(out.read_text())
    assert result["is_dry"] and not result["failures"] and not result["skipped"]
    assert len(result["points"]) == 9 and len(result["peers"]) == 3
    last = child.stdout.rstrip().splitlines()[-1]
    assert last.startswith("- tiny: from stock's logits") and "DIFFER" not in last
    tiny = result["correctness"]["tiny"]
    assert tiny["capacities"]["same_bits"] and tiny["capacities"]["same_tokens"]
    for found in tiny["directions"].values():
        assert all(found["same"].values()), found
        assert found["directed_passes"] == {"host": 0, "device": 2}
    rows = [row for point in result["points"] for row in point["runs"]]
    assert all(row["steady_tokens_per_s"] > 0 for row in rows)


@pytest.mark.slow
def test_what_no_longer_fits_is_left_out_and_named(tmp_path: Path) -> None:
    out = tmp_path / "gpu.json"
    command = [sys.executable, "benchmarks/gpu.py", "--dry", "--limit-s", "0", "--out", str(out)]
    env = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    subprocess.run([*command, "--work", str(tmp_path / "work")], cwd=ROOT, env=env, check=True)
    result = json.loads(out.read_text())
    assert result["points"] == [] and "facts" in {each["step"] for each in result["skipped"]}
