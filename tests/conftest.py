"""What every test shares: a private state folder, a known disk, one torch thread, stable
property tests."""

import gc
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# Triton kernels run on CPU tensors then, unless whoever has a GPU says "0". Before triton is
# imported, and transformers imports it.
os.environ.setdefault("TRITON_INTERPRET", "1")

from moe_infinity import MoE, machine, needs, speeds, wiring
from moe_infinity.cache.transfer import CHUNK_BYTES, READ_THREADS
from moe_infinity.tracing.trace_file import save_trace
from support.checkpoints import tiny_checkpoint
from support.engine import BUDGET
from support.kernel_queues import queues_used_again
from support.traces import random_trace

settings.register_profile(
    "stable",
    deadline=None,
    derandomize=True,
    database=None,
    report_multiple_bugs=False,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.load_profile("stable")


def pytest_collection_finish() -> None:
    """What the libraries and the tests are made of stays: hundreds of thousands of objects that
    every full collection would walk through."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)


@pytest.fixture(autouse=True, scope="session")
def _private_state(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Nothing a test does may reach the state folder of whoever runs it. Of the session, for
    models that a whole module shares are opened before any single test begins."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOE_INFINITY_STATE_DIR", str(tmp_path_factory.getbasetemp() / "state"))
        yield


@pytest.fixture(autouse=True, scope="session")
def _the_disk_is_known() -> Iterator[None]:
    """How it is read best changes with what else the machine does; tests are to be alike."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(machine, "best_reading", lambda *_: (1.0, READ_THREADS, CHUNK_BYTES))
        patch.setattr(speeds, "disk_gbps", lambda *_, **__: 1.0)
        yield


@pytest.fixture(autouse=True, scope="session")
def _the_power_stays_on() -> Iterator[None]:
    """Nothing that tests write has to outlive the machine: it need not reach the disk."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: None)
        yield


@pytest.fixture(autouse=True, scope="session")
def _opening_is_quick() -> Iterator[None]:
    """A thousand models are opened: what is slow about it and belongs to the process is tested by
    itself, and where commands run in processes of their own."""
    with pytest.MonkeyPatch.context() as patch, queues_used_again():
        patch.setattr(wiring, "let_go", lambda: None)  # code comes back fault by fault
        patch.setattr(needs, "code_bytes", lambda: 0)  # accordingly
        yield


@pytest.fixture(autouse=True, scope="session")
def _ctrl_c_is_heard() -> Iterator[None]:
    """A shell starts what runs in the background with Ctrl-C ignored, and children inherit it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(autouse=True, scope="session")
def _one_torch_thread() -> Iterator[None]:
    """Two test runs on one machine must not fight for its cores."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("engine") / "tiny")


@pytest.fixture
def made_up(tmp_path: Path) -> Path:
    """A small random trace in a file."""
    path = tmp_path / "made_up.safetensors"
    save_trace(random_trace(3, 16, 2, 40, seed=1), path)
    return path


@pytest.fixture
def moe(tiny: Path) -> Iterator[MoE]:
    """The tiny model with 9 of its 24 experts in memory."""
    with MoE(tiny, ram=BUDGET, ram_slots=9) as opened:
        yield opened
