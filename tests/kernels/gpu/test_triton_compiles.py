"""What Triton makes of the GPU's kernel for real GPUs: that it compiles, and fits, without one."""

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


def compiled(formats: list[str], types: list[str], capabilities: list[str], cache: Path) -> None:
    """In a process of its own: in this one Triton interprets."""
    paths = os.pathsep.join([str(ROOT / "src"), str(ROOT / "tests")])
    own = {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(cache), "PYTHONPATH": paths}
    arguments = [",".join(each) for each in (formats, types, capabilities)]
    done = subprocess.run(
        [sys.executable, "-m", "support.gpu_compilation", *arguments],
        env={**os.environ, **own},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    lines = [line.split() for line in done.stdout.splitlines()]
    assert len(lines) == len(formats) * len(types) * len(capabilities) * 4
    for number_format, x, capability, tokens, *shared in lines:
        assert max(map(int, shared)) <= SHARED[capability], (number_format, x, capability, tokens)


def test_the_usual_formats_compile(tmp_path: Path) -> None:
    compiled(["EXACT12"], ["bf16"], ["80"], tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("capability", SHARED)
def test_everything_compiles(capability: str, tmp_path: Path) -> None:
    compiled([*FORMATS, "transposed"], ["bf16", "fp16", "fp32"], [capability], tmp_path)
