"""What the machine has left, kernel limits at any level included."""

from pathlib import Path

import pytest

from moe_infinity import machine, planning, product_speed
from moe_infinity.kernels.formats import DTYPES
from moe_infinity.kernels.packed import PACKED

GIB = 2**30
RESIDENT = 200 * 2**20  # a test run may have grown beyond the limits below


@pytest.fixture
def groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stand-in for /sys/fs/cgroup, without limits."""
    monkeypatch.setattr(machine, "_CGROUPS", tmp_path / "fs")
    monkeypatch.setattr(machine, "_OWN_CGROUPS", tmp_path / "own")
    for module in (machine, planning):
        monkeypatch.setattr(module, "resident_bytes", lambda: RESIDENT)
    (tmp_path / "own").write_text("0::/user.slice/run.scope\n")
    return tmp_path / "fs"


def limit(folder: Path, value: int | str, name: str = "memory.max") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(f"{value}\n")


@pytest.mark.parametrize("place", ["", "user.slice", "user.slice/run.scope"])
def test_a_limit_at_any_level_binds(groups: Path, place: str) -> None:
    free = machine.available_bytes()
    limit(groups / "user.slice", "max")
    assert machine.available_bytes() > 2 * GIB or free < 2 * GIB
    limit(groups / place, GIB)
    assert machine.available_bytes() == GIB - RESIDENT


def test_the_tightest_binds(groups: Path) -> None:
    limit(groups, 2 * GIB)
    limit(groups / "user.slice", GIB)
    limit(groups / "user.slice/run.scope", 3 * GIB)
    assert machine.available_bytes() == GIB - RESIDENT


def test_version_one(groups: Path, tmp_path: Path) -> None:
    (tmp_path / "own").write_text("5:cpu,cpuacct:/a\n4:memory:/job/7\n0::/\n")
    limit(groups / "memory/job/7", GIB, "memory.limit_in_bytes")
    limit(groups / "memory", 2**63 - 4096, "memory.limit_in_bytes")
    assert machine.available_bytes() == GIB - RESIDENT


def test_a_limit_below_what_is_resident_leaves_nothing(groups: Path) -> None:
    limit(groups, RESIDENT - 1)
    assert machine.available_bytes() == 0


def test_no_control_groups(groups: Path, tmp_path: Path) -> None:
    (tmp_path / "own").unlink()
    assert machine.available_bytes() > 0


def test_an_automatic_budget_stays_below_the_limit(groups: Path) -> None:
    limit(groups / "user.slice", 4 * GIB)
    assert planning._auto_budget() < 4 * GIB


def test_peak_is_no_less_than_now() -> None:
    now = machine.resident_bytes()  # first: reading takes memory
    assert machine.peak_resident_bytes() >= now > 2**20


@pytest.mark.parametrize("number_format", [*DTYPES, *PACKED])
def test_products_of_every_format_are_measured(
    number_format: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(product_speed, "BEYOND_CACHES_BYTES", 1 << 20)
    assert product_speed.measure_matvec_gbps(1 << 20, number_format) > 0
