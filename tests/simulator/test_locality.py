"""Measures of routings whose answers are known beforehand, the knee, and the pictures."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moe_infinity.errors import ConfigError
from moe_infinity.simulator.hit_curve import CAPACITIES, find_knee, hit_curve
from moe_infinity.simulator.locality import (
    busiest_take,
    domain_distances,
    neighbour_reuse,
    normalised_entropy,
    segment_coverage,
    use_shares,
)
from moe_infinity.simulator.plots import plot_sweep, plot_trace
from moe_infinity.simulator.verdict import Locality, examine, verdict
from moe_infinity.tracing.trace import MISSING, Trace
from support.routing import grid

PNG = b"\x89PNG\r\n\x1a\n"
NUM_LAYERS, NUM_EXPERTS, TOP_K = 3, 16, 2
Ids = np.ndarray  # [T, L, K]


def decoded(
    ids: Ids,
    request: Any = 0,
    domains: dict[str, str] | None = None,
    step: Any = None,
    per_layer: tuple[int, ...] = (),
) -> Trace:
    """Decode rows that chose ``ids``, one pass each unless ``step`` says otherwise."""
    tokens, layers, top_k = ids.shape
    request = np.broadcast_to(np.asarray(request, dtype=np.int32), tokens)
    return Trace(
        shape=grid(layers, NUM_EXPERTS, top_k, per_layer),
        step=np.arange(tokens, dtype=np.int32) if step is None else np.asarray(step, np.int32),
        request=request,
        position=np.arange(tokens, dtype=np.int32),
        phase=np.ones(tokens, dtype=np.int8),
        ids=ids.astype(np.int16),
        weights=np.ones(ids.shape, dtype=np.float32),
        token_ids=np.full(tokens, -1, dtype=np.int32),
        meta={"name": "made up", "domains": domains or {}},
    )


def constant(tokens: int, first: int = 0) -> Ids:
    return np.broadcast_to(np.arange(first, first + TOP_K), (tokens, NUM_LAYERS, TOP_K))


def uniform(tokens: int, seed: int = 0, first: int = 0, end: int = NUM_EXPERTS) -> Ids:
    """Independent draws of TOP_K distinct experts from first to end."""
    noise = np.random.default_rng(seed).random((tokens, NUM_LAYERS, end - first))
    return first + np.argsort(noise, axis=2)[:, :, :TOP_K]


class TestUse:
    def test_shares_of_tokens(self) -> None:
        ids = np.array([[[0, 1]], [[0, 2]], [[0, 1]], [[0, 3]]])
        assert use_shares(decoded(ids))[0, :5].tolist() == [1.0, 0.5, 0.25, 0.25, 0.0]

    def test_missing_experts_and_layers_do_not_count(self) -> None:
        ids = np.array([[[0, MISSING], [MISSING] * 2], [[0, 1], [4, 5]]])
        use = use_shares(decoded(ids))
        assert use[0, :2].tolist() == [1.0, 0.5]
        assert use[1, 4:6].tolist() == [1.0, 1.0], "of the one token for which the layer ran"


class TestReuse:
    def test_identical_tokens(self) -> None:
        assert neighbour_reuse(decoded(constant(5))).tolist() == [1.0] * NUM_LAYERS

    def test_half(self) -> None:
        ids = np.array([[[0, 1]], [[1, 2]], [[2, 3]]])
        assert neighbour_reuse(decoded(ids)).tolist() == [0.5]

    def test_neighbours_are_of_the_same_request(self) -> None:
        """Two requests whose rows alternate, in passes of two."""
        ids = np.concatenate([constant(1, 0), constant(1, 8)] * 3)
        trace = decoded(ids, request=[0, 1] * 3, step=[0, 0, 1, 1, 2, 2])
        assert neighbour_reuse(trace).tolist() == [1.0] * NUM_LAYERS

    def test_no_neighbours(self) -> None:
        trace = decoded(constant(3), request=[0, 1, 2])
        assert np.isnan(neighbour_reuse(trace)).all()
        assert "nothing can be said about reuse" in verdict(examine(trace))[0]

    def test_a_layer_that_never_ran(self) -> None:
        """The other half of an encoder-decoder model takes no part in the means."""
        ids = constant(6).copy()
        ids[:, 1] = MISSING
        found = examine(decoded(ids))
        assert np.isnan(found.reuse).tolist() == np.isnan(found.entropy).tolist()
        assert np.isnan(found.reuse).tolist() == [False, True, False]
        assert (found.mean_reuse, found.mean_popularity) == (1.0, 1.0)


class TestSegments:
    def test_a_set_that_never_changes_covers_all(self) -> None:
        found = segment_coverage(decoded(constant(16)), [4, 16])
        assert [(each.segment_tokens, each.set_size) for each in found] == [
            *((4, TOP_K), (4, 2 * TOP_K), (16, TOP_K), (16, 2 * TOP_K)),
        ]
        assert all(each.covered == each.shuffled == 1.0 for each in found)

    def test_a_set_that_changes_every_four_tokens(self) -> None:
        ids = np.concatenate([constant(4, first) for first in (0, 2, 4, 6)])
        four, _, sixteen, sixteen_double = segment_coverage(decoded(ids), [4, 16])
        assert (four.covered, sixteen.covered, sixteen_double.covered) == (1.0, 0.25, 0.5)
        assert four.shuffled < 0.9, "popularity alone does not know the order"

    def test_lengths_that_no_request_reaches_are_left_out(self) -> None:
        trace = decoded(constant(9), request=[0] * 5 + [1] * 4)
        assert {each.segment_tokens for each in segment_coverage(trace)} == {4}


class TestConcentration:
    def test_one_set_only(self) -> None:
        trace = decoded(constant(4))
        assert busiest_take(use_shares(trace), trace.shape, 0.25) == 1.0
        assert busiest_take(use_shares(trace), trace.shape, 1 / NUM_EXPERTS) == 0.5
        entropy = normalised_entropy(use_shares(trace), trace.shape)
        assert entropy == pytest.approx([0.25] * NUM_LAYERS)  # 1 bit of 4

    def test_all_alike(self) -> None:
        ids = np.arange(NUM_EXPERTS).reshape(-1, 1, TOP_K)
        trace = decoded(ids)
        assert busiest_take(use_shares(trace), trace.shape, 0.3) == pytest.approx(0.3)
        assert normalised_entropy(use_shares(trace), trace.shape) == pytest.approx([1.0])

    def test_layers_of_unequal_size(self) -> None:
        ids = np.array([[[0, 1], [0, 1]], [[2, 3], [2, 3]]])
        trace = decoded(ids, per_layer=(4, NUM_EXPERTS))
        assert normalised_entropy(use_shares(trace), trace.shape) == pytest.approx([1.0, 0.5])


class TestDomains:
    def two_domains(self, first: int) -> Trace:
        """Eight requests of 50 tokens: maths uses experts 0 to 7, prose eight from ``first``."""
        ids = [uniform(50, seed, 0, 8) for seed in range(4)]
        ids += [uniform(50, seed, first, first + 8) for seed in range(4, 8)]
        domains = {str(each): "maths" if each < 4 else "prose" for each in range(8)}
        return decoded(np.concatenate(ids), np.repeat(np.arange(8), 50), domains)

    def test_disjoint(self) -> None:
        found = domain_distances(self.two_domains(first=8))
        assert found is not None and found.names == ("maths", "prose")
        assert found.between == pytest.approx(1.0)
        assert found.within < 0.2
        assert found.distance == pytest.approx(found.distance.T)
        assert "Domains use different experts" in verdict(examine(self.two_domains(8), 150))[-1]

    def test_the_same_experts(self) -> None:
        found = domain_distances(self.two_domains(first=0))
        assert found is not None
        assert found.between == pytest.approx(found.within, abs=0.05)
        assert "Domains use the same experts" in verdict(examine(self.two_domains(0), 150))[-1]

    def test_one_domain_or_none_is_not_compared(self) -> None:
        assert domain_distances(decoded(constant(8), [0] * 4 + [1] * 4)) is None
        assert domain_distances(decoded(constant(4), domains={"0": "maths"})) is None

    def test_one_request_each(self) -> None:
        ids = np.concatenate([constant(4, 0), constant(4, 8)])
        found = domain_distances(decoded(ids, [0] * 4 + [1] * 4, {"0": "a", "1": "b"}))
        assert found is not None and found.distance.tolist() == [[0.0, 1.0], [1.0, 0.0]]


class TestCurve:
    def test_bounds(self) -> None:
        curve = hit_curve(decoded(uniform(60)), 1_000)
        for point in curve.points:
            assert max(point.next_use, point.lru) <= point.belady <= curve.ceiling
        belady = [point.belady for point in curve.points]
        assert belady == sorted(belady)

    def test_room_for_all_that_is_used_hits_all_but_first_uses(self) -> None:
        curve = hit_curve(decoded(constant(10)), 1_000)
        assert curve.ceiling == 0.9
        assert curve.points[-1].next_use == curve.points[-1].lru == 0.9

    def test_only_the_first_events_are_replayed(self) -> None:
        assert hit_curve(decoded(constant(10)), 4 * NUM_LAYERS).num_tokens == 4
        assert hit_curve(decoded(constant(10)), 1).num_tokens == 1, "one pass at least"

    def test_capacities_below_one_tokens_experts_are_left_out(self) -> None:
        total = NUM_LAYERS * NUM_EXPERTS
        curve = hit_curve(decoded(constant(10)), 1_000)
        expected = [each for each in CAPACITIES if int(each * total) >= TOP_K]
        assert [point.capacity for point in curve.points] == expected != list(CAPACITIES)


class TestKnee:
    def test_where_a_steep_line_turns_flat(self) -> None:
        knee = find_knee([(0.03, 0.1), (0.25, 0.9), (1.0, 0.92)])
        assert knee == pytest.approx(0.25, abs=0.011)

    def test_hits_follow_capacity(self) -> None:
        assert find_knee([(0.05, 0.05), (0.5, 0.5), (1.0, 1.0)]) is None

    def test_a_flat_start_is_no_knee(self) -> None:
        """Recency below one token's working set: nothing is gained until it fits."""
        knee = find_knee([(0.03, 0.0), (0.2, 0.01), (0.4, 0.9), (1.0, 0.9)])
        assert knee == pytest.approx(0.4, abs=0.011)

    def test_flat_from_the_start(self) -> None:
        assert find_knee([(0.06, 0.8), (1.0, 0.8)]) == pytest.approx(0.06)


class TestVerdict:
    def test_identical_tokens(self) -> None:
        sentences = verdict(examine(decoded(constant(40))))
        assert sentences[0] == (
            "Neighbouring tokens share 100% of their experts, 8.0 times chance: caching pays."
        )
        assert sentences[1].startswith("Knee at ") and "of 48 experts" in sentences[1]
        assert sentences[2].startswith("Below 12.5% (one token's working set, 6 experts)")

    def test_uniform_routing(self) -> None:
        found = examine(decoded(uniform(400)))
        assert found.reuse_ratio == pytest.approx(1.0, abs=0.1)
        sentences = verdict(found)
        assert "hardly worth caching, hits follow capacity" in sentences[0]
        assert sentences[1].startswith("No knee")

    def test_first_uses_are_named_where_they_weigh(self) -> None:
        assert any("first uses" in each for each in verdict(examine(decoded(uniform(20)))))
        assert not any("first uses" in each for each in verdict(examine(decoded(constant(40)))))


class TestPlots:
    @pytest.fixture(scope="class")
    def found(self) -> Locality:
        return examine(TestDomains().two_domains(first=4), 150)

    def test_trace(self, found: Locality, tmp_path: Path) -> None:
        path = tmp_path / "new folder" / "trace.png"
        plot_trace(found, path)
        assert_is_png(path)

    @pytest.mark.parametrize("traces", [1, 3])
    def test_sweep(self, traces: int, tmp_path: Path) -> None:
        plot_sweep(sweep_rows(traces), tmp_path / "sweep.png")
        assert_is_png(tmp_path / "sweep.png")

    def test_nothing_swept(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="no rows"):
            plot_sweep([], tmp_path / "sweep.png")

    def test_without_matplotlib(
        self, found: Locality, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(sys.modules, "matplotlib", None)
        with pytest.raises(ConfigError, match="pip install matplotlib"):
            plot_trace(found, tmp_path / "trace.png")

    def test_a_place_that_cannot_be_written(self, found: Locality, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="cannot be written"):
            plot_trace(found, tmp_path)


def sweep_rows(num_traces: int) -> list[dict[str, Any]]:
    """What a sweep of four policies and two predictors could have found; an optimum has no time."""
    rows: list[dict[str, Any]] = []
    for trace in range(num_traces):
        for capacity in (0.06, 0.12, 0.25, 0.5):
            for rank, policy in enumerate(["next_use", "lru", "lfu", "fifo"]):
                for prefetch in ("none", "transition"):
                    hits = capacity ** (0.4 + 0.1 * rank) + 0.05 * (prefetch != "none")
                    rows.append(_row(trace, policy, prefetch, capacity, hits, 10 * (1 - hits)))
            rows.append(_row(trace, "belady", "none", capacity, capacity**0.25, None))
    return rows


def _row(
    trace: int, policy: str, prefetch: str, capacity: float, hits: float, stall_s: float | None
) -> dict[str, Any]:
    loads = {"wasted_loads": 0, "demand_loads": 10, "proactive_loads": 0}
    where = {"trace": f"trace {trace}", "policy": policy, "prefetch": prefetch}
    return where | loads | {"capacity": capacity, "hit_rate": hits, "stall_s": stall_s}


def assert_is_png(path: Path) -> None:
    """A picture of more than a blank page, and nothing left beside it."""
    data = path.read_bytes()
    assert data.startswith(PNG) and len(data) > 20_000
    assert list(path.parent.iterdir()) == [path]
