"""The report is arithmetic over counters: worked by hand here."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moe_infinity import state_file
from moe_infinity.machine import Bandwidths
from moe_infinity.reporting import Routing, RunFacts, build_stats
from moe_infinity.state_file import StateFile, device_of
from moe_infinity.stats import Counters, PhaseCounters, Stats
from moe_infinity.tracing.recorder import Access
from moe_infinity.types import ExpertShape, Phase

EXPERT_BYTES = 10**6
NOW = state_file._VERSION
SPEEDS = Bandwidths(disk_gbps=1.0, memory_gbps=10.0, matvec_gbps=5.0)
SHAPE = ExpertShape(num_layers=2, num_experts=4, top_k=1, experts_per_layer=(4, 4))


def facts(**changes: Any) -> RunFacts:
    return dataclasses.replace(
        RunFacts(
            shape=SHAPE,
            num_slots=3,
            dense_bytes=5 * 10**6,
            bytes_written=0,
            lossy=(),
            bandwidths=SPEEDS,
        ),
        **changes,
    )


def decoding(num_misses: int, wall_s: float, **changes: Any) -> Counters:
    """Counters of four decode passes over both layers, one expert each."""
    decode = PhaseCounters(
        hits=8 - num_misses,
        misses=num_misses,
        demand_loads=num_misses,
        demand_bytes=num_misses * EXPERT_BYTES,
        computed_bytes=8 * EXPERT_BYTES,
        wall_s=wall_s,
        num_tokens=4,
        num_passes=4,
        **changes,
    )
    return Counters([EXPERT_BYTES] * 2, decode=decode)


def routing(
    *experts: int, phase: Phase = "decode", initial: frozenset[int] = frozenset()
) -> Routing:
    accesses = [
        Access(phase, number % 2, np.array([expert], dtype=np.int16))
        for number, expert in enumerate(experts)
    ]
    return Routing(accesses, initial)


def test_rates() -> None:
    report = build_stats(decoding(num_misses=2, wall_s=0.5), facts(), 0.125, None)
    assert report.hit_rate == 0.75
    assert report.tokens_per_s == 8.0
    assert report.tpot_s == 0.125
    assert report.ttft_s == 0.125


def test_limit_by_the_disk() -> None:
    """6 MB at 1 GB/s take 6 ms, 28 MB at 10 GB/s 2.8 ms: the longer counts."""
    report = build_stats(decoding(num_misses=6, wall_s=0.012), facts(), None, None)
    assert report.decode.limit_fraction == pytest.approx(0.5)
    assert report.limit_fraction == pytest.approx(0.5)


def test_limit_by_memory() -> None:
    report = build_stats(decoding(num_misses=0, wall_s=0.0056), facts(), None, None)
    assert report.limit_fraction == pytest.approx(0.5)


def test_a_faster_run_than_measured_is_at_the_limit() -> None:
    report = build_stats(decoding(num_misses=6, wall_s=1e-6), facts(), None, None)
    assert report.limit_fraction == 1.0


def test_prefetched_bytes_count_too() -> None:
    counters = decoding(num_misses=2, wall_s=0.012, prefetch_bytes=4 * EXPERT_BYTES)
    assert build_stats(counters, facts(), None, None).limit_fraction == pytest.approx(0.5)


def test_a_bad_cache_does_not_look_good() -> None:
    """Always the same two experts: the optimum misses twice where this cache missed 8 times."""
    counters = decoding(num_misses=8, wall_s=0.008)
    report = build_stats(counters, facts(), None, routing(*[1] * 8))
    assert report.limit_fraction == pytest.approx(1.0)
    assert report.belady_fraction == pytest.approx(0.0028 / 0.008)  # memory is the longer then
    assert report.decode.belady_fraction == report.belady_fraction


def test_what_was_there_is_not_missed() -> None:
    counters = decoding(num_misses=6, wall_s=0.012)
    cold = build_stats(counters, facts(dense_bytes=0), None, routing(0, 0, 1, 1, 2, 2, 3, 3))
    warm = build_stats(
        counters,
        facts(dense_bytes=0),
        None,
        routing(0, 0, 1, 1, 2, 2, 3, 3, initial=frozenset({0, 1, 4})),
    )
    assert cold.belady_fraction is not None and warm.belady_fraction is not None
    assert warm.belady_fraction < cold.belady_fraction


def test_the_optimum_is_never_above_what_was_done() -> None:
    counters = decoding(num_misses=1, wall_s=0.012)
    report = build_stats(counters, facts(dense_bytes=0), None, routing(0, 0, 1, 1, 2, 2, 3, 3))
    assert report.belady_fraction == report.limit_fraction


def test_phases_are_judged_apart() -> None:
    counters = decoding(num_misses=4, wall_s=0.008)
    counters.prefill = PhaseCounters(
        misses=4, demand_bytes=4 * EXPERT_BYTES, wall_s=0.004, num_tokens=9, num_passes=1
    )
    both = [
        *routing(0, 0, 1, 1, phase="prefill").accesses,
        *routing(0, 0, 1, 1).accesses,
    ]
    report = build_stats(counters, facts(dense_bytes=0), 0.004, Routing(both, frozenset()))
    assert report.prefill.limit_fraction == pytest.approx(1.0)
    assert report.decode.limit_fraction == pytest.approx(0.5)
    assert report.limit_fraction == pytest.approx(8 / 12)
    assert report.prefill.tokens_per_s == pytest.approx(9 / 0.004)


@pytest.mark.parametrize("unknown", [{"bandwidths": None}, {}])
def test_what_was_not_measured_is_none(unknown: dict[str, Any]) -> None:
    counters = decoding(3, wall_s=0.0 if not unknown else 1.0)
    report = build_stats(counters, facts(**unknown), None, routing(0, 1))
    assert report.limit_fraction is None and report.belady_fraction is None
    assert build_stats(Counters([1]), facts(), None, None).hit_rate is None


def test_lossy_options_are_named() -> None:
    report = build_stats(Counters([1]), facts(lossy=("skip",)), None, None)
    assert not report.bit_exact and report.lossy == ("skip",)


def test_the_report_is_frozen_and_documented() -> None:
    report = build_stats(Counters([1]), facts(), None, None)
    with pytest.raises(dataclasses.FrozenInstanceError):
        report.hits = 5  # type: ignore[misc]
    promised = """hits misses late hit_rate demand_bytes prefetch_bytes wasted_prefetch_bytes
        stall_s compute_s ttft_s tpot_s tokens_per_s peak_rss_bytes bytes_written slots
        experts_total limit_fraction belady_fraction bit_exact lossy prefill decode"""
    assert set(promised.split()) <= {field.name for field in dataclasses.fields(Stats)}
    assert "Sizes in bytes" in (Stats.__doc__ or "")


def stored(version: int = NOW, **changes: object) -> str:
    """A state file that is as it should be, but for the changes."""
    entry = {**dataclasses.asdict(SPEEDS), **changes}
    return json.dumps({"version": version, "bandwidths": {"1": entry}})


class TestStateFile:
    @pytest.fixture
    def file(self, tmp_path: Path) -> Path:
        return tmp_path / "deep" / "machine.json"

    def test_round_trip(self, file: Path) -> None:
        state = StateFile(file)
        assert state.bandwidths("1") is None
        state.set_bandwidths("1", SPEEDS)
        state.save()
        assert state.bytes_written == file.stat().st_size
        state.save()
        assert state.bytes_written == file.stat().st_size
        assert StateFile(file).bandwidths("1") == SPEEDS
        assert list(file.parent.iterdir()) == [file]

    def test_nothing_measured_nothing_written(self, file: Path) -> None:
        StateFile(file).save()
        assert not file.parent.exists()

    @pytest.mark.parametrize(
        "text",
        [
            *("", "{", "[]", "null", "\0\1\2", f'{{"version": {NOW}}}'),
            f'{{"version": {NOW}, "bandwidths": 5}}',
            f'{{"version": {NOW}, "bandwidths": {{"1": 5}}}}',
            stored(version=NOW - 1),
            stored(disk_gbps=0),
            stored(disk_gbps="1"),
            stored(matvec_gbps=None),
            stored(read_threads=10**9),
            stored(read_threads=1.5),
            stored(read_chunk_bytes=1000),
            stored(read_chunk_bytes=0),
            stored(another=1),
        ],
    )
    def test_what_cannot_be_read_is_measured_anew(self, file: Path, text: str) -> None:
        file.parent.mkdir()
        file.write_text(text)
        state = StateFile(file)
        assert state.bandwidths("1") is None
        state.set_bandwidths("1", SPEEDS)
        state.save()
        assert StateFile(file).bandwidths("1") == SPEEDS

    def test_what_is_as_it_should_be_is_read(self, file: Path) -> None:
        file.parent.mkdir()
        file.write_text(stored())
        assert StateFile(file).bandwidths("1") == SPEEDS

    def test_a_folder_that_cannot_be_written_costs_only_the_memory(self, tmp_path: Path) -> None:
        (tmp_path / "taken").write_text("a file")
        state = StateFile(tmp_path / "taken" / "machine.json")
        state.set_bandwidths("1", SPEEDS)
        state.save()
        assert state.bytes_written == 0
        assert state.bandwidths("1") == SPEEDS

    def test_a_device_has_a_name(self, tmp_path: Path) -> None:
        assert device_of(tmp_path, 4096) == device_of(tmp_path, 4000)
        assert device_of(tmp_path, 4096) != device_of(tmp_path, 4097)
