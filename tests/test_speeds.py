"""How a disk is read best is measured, remembered, and measured again when it is no longer so."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from moe_infinity import MoE, bundled_model_path, machine, speeds
from moe_infinity.machine import Bandwidths, best_reading, disk_gbps
from moe_infinity.speeds import Speeds
from moe_infinity.state_file import StateFile
from support.engine import readers

MIB = 2**20
KNOWN = Bandwidths(2.0, 30.0, 20.0, read_threads=3, read_chunk_bytes=4 * MIB)
WEIGHTS = bundled_model_path() / "model.safetensors"


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A state folder of each test's own."""
    monkeypatch.setenv("MOE_INFINITY_STATE_DIR", str(tmp_path / "state"))


def remember(known: Bandwidths, expert_bytes: int) -> None:
    state = StateFile()
    state.set_bandwidths(speeds.device_of(WEIGHTS, expert_bytes), known)
    state.save()


class TestBestReading:
    def of(self, monkeypatch: pytest.MonkeyPatch, expert_bytes: int, gbps: Any) -> Any:
        """On a disk that is as fast as ``gbps(threads, chunk_bytes)`` says."""
        monkeypatch.setattr(machine, "disk_gbps", lambda files, n, size, s: gbps(n, size))
        return best_reading([WEIGHTS], expert_bytes)

    def test_a_disk_that_wants_many_large_reads(self, monkeypatch: pytest.MonkeyPatch) -> None:
        found = self.of(monkeypatch, 64 * MIB, lambda n, size: float(n * size))
        assert found == (8.0 * 8 * MIB, 8, 8 * MIB)

    def test_a_disk_that_does_not_mind(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Then whoever comes meanwhile should wait for as little as possible."""
        found = self.of(monkeypatch, 64 * MIB, lambda n, size: 2.0 + 1e-3 * n)
        assert found[1:] == (1, MIB)

    def test_no_read_is_longer_than_an_expert(self, monkeypatch: pytest.MonkeyPatch) -> None:
        assert self.of(monkeypatch, 100_000, lambda n, size: float(size))[1:] == (1, 98_304)
        assert self.of(monkeypatch, 3 * MIB, lambda n, size: float(size))[1:] == (1, 2 * MIB)
        assert self.of(monkeypatch, 100, lambda n, size: float(size))[1:] == (1, 4096)


def test_real_reads_take_time() -> None:
    assert 0 < disk_gbps([WEIGHTS], 2, 65_536, seconds=0.01) < 1000
    assert 0 < disk_gbps([WEIGHTS], 1, 64 * MIB, seconds=0.0) < 1000  # a read beyond the file


class TestSpeeds:
    @pytest.fixture
    def measured(self, monkeypatch: pytest.MonkeyPatch) -> list[Bandwidths]:
        """What is found today, and how often it was."""
        found: list[Bandwidths] = []

        def measure(*_: object) -> Bandwidths:
            found.append(dataclasses.replace(KNOWN, disk_gbps=7.0))
            return found[-1]

        monkeypatch.setattr(speeds, "measure", measure)
        return found

    def disk_is(self, monkeypatch: pytest.MonkeyPatch, gbps: float) -> None:
        monkeypatch.setattr(speeds, "disk_gbps", lambda *_, **__: gbps)

    def test_measured_once_and_remembered(
        self, measured: list[Bandwidths], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        first = Speeds([WEIGHTS], MIB)
        assert first.remembered is None
        assert first.ask(may_measure=False) is None
        assert first.ask(may_measure=True) == first.ask(may_measure=True) == measured[0]
        assert first.bytes_written > 0
        self.disk_is(monkeypatch, 7.0)
        second = Speeds([WEIGHTS], MIB)
        assert second.ask(may_measure=False) == second.ask(may_measure=True) == measured[0]
        assert len(measured) == 1
        assert second.bytes_written == 0
        assert Speeds([WEIGHTS], 64 * MIB).remembered is None  # of other reads it says little

    @pytest.mark.parametrize(("now", "is_wrong"), [(0.9, True), (1.2, False), (4.2, True)])
    def test_measured_again_when_it_is_wrong(
        self,
        measured: list[Bandwidths],
        monkeypatch: pytest.MonkeyPatch,
        now: float,
        is_wrong: bool,
    ) -> None:
        remember(KNOWN, MIB)
        self.disk_is(monkeypatch, now)
        asked = Speeds([WEIGHTS], MIB)
        assert asked.ask(may_measure=False) == KNOWN
        assert asked.ask(may_measure=True) == (measured[0] if is_wrong else KNOWN)
        assert len(measured) == is_wrong
        assert Speeds([WEIGHTS], MIB).remembered == (measured[0] if is_wrong else KNOWN)


@pytest.mark.parametrize(("asked", "expected"), [(None, 3), (2, 2)])
def test_a_model_is_read_as_was_measured_or_asked_for(asked: int | None, expected: int) -> None:
    others = len(readers())
    with MoE(bundled_model_path(), ram="8GiB", num_read_threads=asked) as moe:
        assert len(readers()) == others + (asked or 4)  # nothing is remembered yet
        remember(KNOWN, next(iter(moe._hierarchy.store.specs.values())).read_bytes)
    with MoE(bundled_model_path(), ram="8GiB", num_read_threads=asked) as moe:
        assert len(readers()) == others + expected
        assert moe._hierarchy._engine._chunk_bytes == 4 * MIB
