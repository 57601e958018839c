"""Tests of benchmarks/gpu_link.py: its times, its bounds, and what its carrier counts."""

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from support.traces import random_trace

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
NAMES = ("gpu_link", "link_carrier", "link_costs", "limits")


@pytest.fixture(scope="module")
def link() -> Iterator[Any]:
    """The benchmark's modules, by name."""
    sys.path.insert(0, str(BENCHMARKS))
    yield SimpleNamespace(**{name: importlib.import_module(name) for name in NAMES})
    sys.path.remove(str(BENCHMARKS))


@pytest.fixture
def setting(link: Any) -> Any:
    """1 MB an expert, 1 ms over the link, 0.5 ms on the processor, 0.1 ms in the GPU's memory."""
    model = link.link_costs.Model("m", 4, 1_000_000, 8, 2_000_000, 4_000_000, 16)
    machine = link.link_costs.Machine("g", 1.0, 10.0, 2.0, launch_s=1e-4, latency_s=0.0)
    return link.link_costs.Setting(model, machine, num_layers=4, top_k=2)


@pytest.fixture
def source(link: Any) -> Any:
    trace = random_trace(4, 16, 2, tokens=60, seed=3)
    return link.gpu_link.Source(trace, link.link_costs.QWEN3_30B, {}, link.gpu_link.ON_DEMAND)


def test_times_follow_from_bytes(setting: Any) -> None:
    assert setting.load_s == pytest.approx(1e-3)
    assert setting.cpu_s == pytest.approx(5e-4)
    # 2 million weights, a quarter of the head's 4 million, two bytes each, at 10 GB/s
    assert setting.dense_s == pytest.approx(1e-4 + 6e-4)
    assert setting.layer_s == pytest.approx(7e-4 + 2 * 1e-4)
    cost = setting.cost()
    assert cost.dense_s() == pytest.approx(7e-4)
    assert cost.expert_s(2) == pytest.approx(1e-4)
    assert cost.num_chunks == 1


def test_published_sizes(link: Any) -> None:
    costs = link.link_costs
    assert costs.QWEN3_30B.expert_bytes == 2_654_208
    assert costs.GPT_OSS_120B.expert_bytes == costs.GPT_OSS_20B.expert_bytes == 13_219_200
    experts = costs.GPT_OSS_120B.expert_weights * 36 * 128
    assert experts == pytest.approx(114.7e9, rel=0.01)  # of 116.8 billion published


def test_bounds(link: Any) -> None:
    found = link.link_costs.limits(10, 2.0, 15.0)
    assert found == {"limit_s": 5.0, "no_overlap_s": 20.0}
    assert link.link_costs.limits(10, 2.0, 25.0)["limit_s"] == 0.0
    assert link.link_costs.gap_closed(10.0, 7.0, 4.0) == pytest.approx(0.5)
    assert link.link_costs.gap_closed(4.0, 4.0, 4.0) is None


def test_ways_out_of_a_miss(link: Any, setting: Any) -> None:
    way_out_s, fixed_s = link.link_costs.way_out_s, 1e-4
    assert way_out_s(setting, [3, 0, 1], "copy", fixed_s) == pytest.approx(4e-3)
    assert way_out_s(setting, [3, 0, 1], "cpu", fixed_s) == pytest.approx(2 * 1e-4 + 4 * 5e-4)
    # Of three, two beside one that is copied: 1.1 ms; it tries without for 16 passes, then with.
    window = 8 * setting.num_layers
    both = way_out_s(setting, [3] * 3 * window, "auto", fixed_s)
    assert both == pytest.approx(2 * window * 3e-3 + window * 1.1e-3)


def test_carrier_counts_what_the_replay_counts(link: Any, source: Any) -> None:
    row, carrier = link.gpu_link.replayed(source, "next_use", (12,))
    assert sum(carrier.misses) == pytest.approx(row["misses"] * 60)
    assert len(carrier.misses) == 4 * 60
    busy_s = 4 * 60 * source.setting.layer_s
    assert carrier.now_s == pytest.approx(busy_s + carrier.stall_s)
    assert row["demand_bytes"] == pytest.approx(row["misses"] * source.model.expert_bytes)


def test_what_the_processor_computes_is_not_cached(link: Any, source: Any) -> None:
    copied, _ = link.gpu_link.replayed(source, "lru", (12,))
    row, carrier = link.gpu_link.replayed(source, "lru", (12,), "cpu", 1e-4)
    assert row["misses"] > copied["misses"]
    assert row["demand_bytes"] <= (12 + 1) * source.model.expert_bytes / 60 + 1
    assert carrier.cpu.num_computed + 12 <= row["misses"] * 60 <= carrier.cpu.num_computed + 13
    assert sum(carrier.misses) == pytest.approx(row["misses"] * 60)


def test_no_system_waits_less_than_the_limit(link: Any, source: Any) -> None:
    point = link.gpu_link.measure(source, 0.25)
    for row in point["rows"].values():
        assert row["stall_us"] >= point["limit_us"]
        assert row["misses"] >= point["optimal_misses"] >= point["first_uses"]
    assert [way["mode"] for way in point["ways"]] == ["copy", "cpu", "cpu", "auto", "auto"]
