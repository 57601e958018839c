"""What Triton makes of the GPU's kernel for real GPUs: that it compiles, and fits, without one."""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

from support.gpu import FORMATS

# Bytes of shared memory that a program may have, by capability.
SHARED = {"75": 64 * 1024, "80": 163 * 1024, "86": 99 * 1024, "90": 227 * 1024}
ROOT = Path(__file__).parents[3]


def compiled(cache: Path, *lists: list[str]) -> None:
    """In a process of its own: in this one Triton interprets."""
    paths = os.pathsep.join([str(ROOT / "src"), str(ROOT / "tests")])
    own = {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(cache), "PYTHONPATH": paths}
    arguments = [",".join(each) for each in lists]
    done = subprocess.run(
        [sys.executable, "-m", "support.gpu_compilation", *arguments],
        env={**os.environ, **own},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    lines = [line.split() for line in done.stdout.splitlines()]
    assert len(lines) >= 2 * math.prod(map(len, lists))
    for number_format, x, capability, tokens, *shared in lines:
        assert max(map(int, shared)) <= SHARED[capability], (number_format, x, capability, tokens)


def test_some_formats_compile(tmp_path: Path) -> None:
    compiled(tmp_path, ["EXACT12"], ["bf16"], ["80"], ["1"])


@pytest.mark.slow
@pytest.mark.parametrize("capability", SHARED)
@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
def test_everything_compiles(capability: str, dtype: str, tmp_path: Path) -> None:
    formats = [*FORMATS, "transposed"]
    compiled(tmp_path, formats, [dtype], [capability], ["1", "8", "16", "64"])
