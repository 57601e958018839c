"""A trace recorded live and replayed makes the same decisions: hits, victims, loads, in order."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from moe_infinity import MoE, bundled_model_path
from moe_infinity.policies import find_policy, policy_names
from moe_infinity.predictors import find_predictor, predictor_names
from moe_infinity.residency.runner import Settled
from moe_infinity.residency.running import Load
from moe_infinity.simulator.cost_model import Cost, SimulatedCarrier
from moe_infinity.simulator.replay import Result, replay
from moe_infinity.stats import PhaseCounters
from moe_infinity.tracing.trace import Trace
from moe_infinity.types import ExpertKey, Priority
from support.engine import BUDGET

PROMPTS = ([5, 9, 300, 17, 44, 301, 8, 2, 77], [1000, 3, 12])
LIVE_PREDICTORS = [n for n in predictor_names() if not find_predictor(n).needs_future]


class Watched:
    """What a live cache began and saw arrive, while requests run."""

    def __init__(self, moe: MoE, patch: pytest.MonkeyPatch) -> None:
        self.loads: list[Load] = []
        self.arrivals: list[list[Settled]] = []
        self.looks: list[bool] = []
        hierarchy = moe._hierarchy
        looks_ahead = hierarchy.looks_ahead
        start, collect = hierarchy.start, hierarchy.collect

        def watched_start(loads: list[Load], priority: Priority) -> None:
            self.loads += loads
            start(loads, priority)

        def watched_collect() -> list[Settled]:
            settled = collect()
            self.arrivals.append(settled)
            return settled

        def watched_looks() -> bool:
            self.looks.append(looks_ahead())
            return self.looks[-1]

        patch.setattr(hierarchy, "start", watched_start)
        patch.setattr(hierarchy, "looks_ahead", watched_looks)
        # Blocks that are run ahead ask too, but not on behalf of a decision.
        asked = SimpleNamespace(looks_ahead=looks_ahead)
        patch.setattr(hierarchy, "is_quiet", lambda: hierarchy.runner.is_quiet(asked))
        patch.setattr(hierarchy, "collect", watched_collect)


class LoggedCarrier(SimulatedCarrier):
    """Keeps every load begun, in order."""

    def __init__(self, cost: Cost, top_k: int) -> None:
        super().__init__(cost, top_k)
        self.log: list[Load] = []

    def start(self, loads: list[Load], priority: Priority) -> None:
        self.log += loads
        super().start(loads, priority)


class RecordedCarrier(LoggedCarrier):
    """Lets arrive what arrived live, when it did, and looks ahead when that run did."""

    def __init__(self, watched: Watched, top_k: int) -> None:
        super().__init__(Cost(), top_k)
        self._coming = iter(watched.arrivals)
        self._looks = iter(watched.looks)

    def start(self, loads: list[Load], priority: Priority) -> None:
        self.log += loads

    def cancel(self, key: ExpertKey) -> None: ...

    def promote(self, key: ExpertKey) -> None: ...

    def wait(self) -> None: ...

    def collect(self) -> list[Settled]:
        return next(self._coming)

    def looks_ahead(self) -> bool:
        return next(self._looks)


def run_live(
    patch: pytest.MonkeyPatch, slots: int, **options: Any
) -> tuple[Watched, Trace, PhaseCounters]:
    total = PhaseCounters()
    with MoE(bundled_model_path(), ram=BUDGET, ram_slots=slots, **options) as moe:
        watched = Watched(moe, patch)
        with moe.recording(logits=True, hidden=True, foresight=3) as recorder:
            for prompt in PROMPTS:
                moe.generate(torch.tensor([prompt]), max_new_tokens=8, eos_token_id=None)
                stats = moe._wiring.request.counters
                total.add(stats.prefill)
                total.add(stats.decode)
        return watched, recorder.trace(), total


def again(
    trace: Trace, slots: int, policy: str, prefetch: str, make: Callable[[int], LoggedCarrier]
) -> tuple[list[Load], Result]:
    carrier = make(trace.shape.top_k)
    chosen = find_policy(policy)(trace.shape, slots)
    predictor = find_predictor(prefetch)(trace.shape)
    result = replay(trace, chosen, predictor, (slots,), carrier=carrier)
    return carrier.log, result


def assert_same_counts(result: Result, live: PhaseCounters) -> None:
    names = ("hits", "late", "misses", "demand_loads", "proactive_loads", "wasted_loads")
    for name in names:
        assert getattr(result.counters, name) == getattr(live, name), name


@pytest.fixture(autouse=True)
def _nothing_learned_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A replay starts with nothing learned, and so must the live run."""
    monkeypatch.setenv("MOE_INFINITY_STATE_DIR", str(tmp_path))


@pytest.mark.parametrize("policy", policy_names())
def test_on_demand(policy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Below one token's working set for some, above it for others."""
    slots = 24 if policy in ("lru", "next_use", "fifo") else 64
    watched, trace, live = run_live(monkeypatch, slots, policy=policy, prefetch="none")
    log, result = again(trace, slots, policy, "none", lambda k: LoggedCarrier(Cost(), k))
    assert log == watched.loads
    assert live.misses > 0
    assert_same_counts(result, live)


@pytest.mark.parametrize("prefetch", LIVE_PREDICTORS)
def test_loading_ahead_with_the_arrivals_of_the_live_run(
    prefetch: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    watched, trace, live = run_live(monkeypatch, 48, prefetch=prefetch)
    carrier: Callable[[int], LoggedCarrier] = lambda k: RecordedCarrier(watched, k)  # noqa: E731
    log, result = again(trace, 48, "next_use", prefetch, carrier)
    assert log == watched.loads
    assert_same_counts(result, live)


def test_some_predictor_really_loads_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    watched, _, live = run_live(monkeypatch, 48, prefetch="gate_lookahead")
    assert live.proactive_loads > 20
    assert any(load.proactive for load in watched.loads)
