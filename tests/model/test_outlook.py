"""Compiled blocks that look ahead by later routers, and stop where one wants what is not there."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from moe_infinity import MoE, bundled_model_path
from moe_infinity.cache.base import NOWHERE
from moe_infinity.cache.ram import RamHierarchy
from moe_infinity.kernels import native
from moe_infinity.kernels.blocks import TailCall
from moe_infinity.kernels.stages import FURTHEST, Stages
from moe_infinity.model.stretch import Stretch
from moe_infinity.residency.running import Load
from moe_infinity.types import ExpertKey, Priority
from support.checkpoints import tiny_checkpoint
from support.engine import BUDGET

pytestmark = pytest.mark.skipif(native.native is None, reason="installed without a compiler")
PROMPT = [5, 9, 300, 17, 44, 301, 8, 2, 77]
Scores, Chosen = NDArray[np.float32], Sequence[ExpertKey]
real_foresee = RamHierarchy.foresee


@contextmanager
def opened(slots: int, prefetch: str = "gate_lookahead") -> Iterator[tuple[MoE, Stretch]]:
    with MoE(bundled_model_path(), ram=BUDGET, ram_slots=slots, prefetch=prefetch) as moe:
        assert moe._wiring._whole is not None
        (stretch,) = moe._wiring._whole._stretches
        yield moe, stretch
        moe._hierarchy.check_integrity()


def said(moe: MoE, num_new: int = 24) -> list[int]:
    return moe.generate([PROMPT], max_new_tokens=num_new, eos_token_id=None)[0].tolist()


@pytest.fixture
def always_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RamHierarchy, "looks_ahead", lambda self: True)


@pytest.mark.parametrize("prefetch", ["gate_lookahead", "gate_lookahead_raw"])
@pytest.mark.parametrize("slots", [48, 96, 160])
@pytest.mark.usefixtures("always_looks")
def test_no_word_is_another_and_fewer_experts_are_waited_for(slots: int, prefetch: str) -> None:
    with opened(slots, "none") as (moe, stretch):
        expected = [said(moe) for _ in range(2)]
        without = moe.stats(total=True).decode
        assert stretch.num_looks == 0
    with opened(slots, prefetch) as (moe, stretch):
        assert [said(moe) for _ in range(2)] == expected
        ahead = moe.stats(total=True).decode
        assert stretch.num_looks > 0
    assert ahead.prefetch_bytes > 0
    assert ahead.hits + ahead.misses + ahead.late == without.hits + without.misses
    assert ahead.misses < without.misses


@pytest.mark.usefixtures("always_looks")
def test_what_is_said_early_is_what_the_routers_say(monkeypatch: pytest.MonkeyPatch) -> None:
    stops = 0

    def compare(self: RamHierarchy, layer: int, scores: Scores, chosen: Chosen) -> None:
        nonlocal stops
        observer = moe._wiring._runtime.observer
        assert observer is not None and observer._taps is not None
        block = stretch.blocks[layer]
        plain = observer._taps.foresee("residual", layer, block.normed, FURTHEST)
        is_there = np.isfinite(plain)
        assert np.array_equal(np.isfinite(scores), is_there)
        np.testing.assert_allclose(scores[is_there], plain[is_there], rtol=0.02, atol=0.05)
        assert chosen == block.chosen_keys
        stops += 1
        real_foresee(self, layer, scores, chosen)

    monkeypatch.setattr(RamHierarchy, "foresee", compare)
    with opened(64) as (moe, stretch):
        said(moe)
    assert stops == stretch.num_looks > 0


@pytest.mark.usefixtures("always_looks")
def test_of_an_expert_that_is_not_loaded_somebody_is_told_once_a_pass(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    told: dict[int, set[tuple[int, int]]] = {}

    def refuse(self: RamHierarchy, layer: int, scores: Scores, chosen: Chosen) -> None:
        assert self.known is not None
        seen = told.setdefault(moe._wiring.step.number, set())
        liked = np.argsort(-scores[0], axis=1, kind="stable")[:, :top_k]
        coming = [layer + 1 + d for d in range(FURTHEST) if np.isfinite(scores[0, d]).any()]
        missing = {
            (later, int(expert))
            for later, experts in zip(coming, liked, strict=False)
            for expert in experts
            if self.known[later, expert] == NOWHERE
        }
        assert missing - seen, "there are news"
        seen |= missing

    monkeypatch.setattr(RamHierarchy, "foresee", refuse)
    with opened(48) as (moe, stretch):
        top_k = moe._hierarchy.residency.directory.shape.top_k
        said(moe)
    assert stretch.num_looks > 0 and len(told) > 8


@pytest.mark.usefixtures("always_looks")
def test_what_the_layer_chose_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its event is told later: to the policy it seems to be the one whose turn comes last."""
    checked = 0

    def check(self: RamHierarchy, layer: int, scores: Scores, chosen: Chosen) -> None:
        nonlocal checked
        directory = self.residency.directory
        real_foresee(self, layer, scores, chosen)
        assert {self.tier_of(key) for key in chosen} == {"ram"}
        assert not any(map(directory.is_pinned, chosen))
        checked += 1

    monkeypatch.setattr(RamHierarchy, "foresee", check)
    with opened(40) as (moe, _):
        said(moe)
    assert checked > 0


@pytest.mark.parametrize("is_ended", [False, True])
@pytest.mark.usefixtures("always_looks")
def test_experts_are_begun_before_somebody_sees_and_computed_once(
    is_ended: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """is_ended: somebody else wants something of the engine meanwhile."""
    with opened(48) as (moe, _):
        expected = said(moe)
    stops: list[int] = []  # layers
    gone_on: list[bool] = []  # from there, and whether experts took any time

    def see(self: RamHierarchy, layer: int, scores: Scores, chosen: Chosen) -> None:
        assert isinstance(kernel, native.Kernel)
        outs = stretch.blocks[layer].outs
        if is_ended:
            assert kernel.settle() > 0 and outs.isfinite().all()
            assert kernel.settle() == 0, "nothing is left"
            outs.fill_(torch.nan)
        real_foresee(self, layer, scores, chosen)
        stops.append(layer)

    def run(self: Stages, at: native.Kernel, first: int, tail: TailCall | None) -> list[float]:
        goes_on = len(stops) > len(gone_on)
        for block in stretch.blocks[first + goes_on :]:
            block.outs.fill_(torch.nan)
        spent_s = real_run(self, at, first, tail)
        if goes_on:
            assert first == stops[-1]
            outs = stretch.blocks[first].outs
            assert outs.isnan().all() if is_ended else outs.isfinite().all()
            gone_on.append(spent_s[0] > 0)
        return spent_s

    real_run = Stages.run
    monkeypatch.setattr(RamHierarchy, "foresee", see)
    monkeypatch.setattr(Stages, "run", run)
    with opened(48) as (moe, stretch):
        kernel = moe._wiring.kernel
        assert said(moe) == expected
    assert len(gone_on) == len(stops) > 8
    assert gone_on == [not is_ended] * len(stops), "their time is told once"


@pytest.mark.usefixtures("always_looks")
def test_what_was_begun_is_done_where_an_interrupt_strikes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With loads begun for what somebody saw, and a block's experts."""
    real_start, seeing = RamHierarchy.start, False

    def see(self: RamHierarchy, layer: int, scores: Scores, chosen: Chosen) -> None:
        nonlocal seeing
        seeing = True
        real_foresee(self, layer, scores, chosen)
        seeing = False

    def interrupt(self: RamHierarchy, loads: list[Load], priority: Priority) -> None:
        real_start(self, loads, priority)
        if seeing:
            monkeypatch.undo()
            monkeypatch.setattr(RamHierarchy, "looks_ahead", lambda self: True)
            raise KeyboardInterrupt

    with opened(48) as (moe, _):
        expected, kernel = said(moe), moe._wiring.kernel
        assert isinstance(kernel, native.Kernel)
        monkeypatch.setattr(RamHierarchy, "foresee", see)
        monkeypatch.setattr(RamHierarchy, "start", interrupt)
        with pytest.raises(KeyboardInterrupt):
            said(moe)
        assert seeing and kernel.settle() == 0, "nothing is left"
        assert not moe._hierarchy.residency.directory.pins.any()
        assert said(moe) == expected


@pytest.mark.usefixtures("always_looks")
def test_a_router_that_says_no_numbers_breaks_nothing() -> None:
    with opened(48) as (moe, stretch):
        said(moe, 4)
        observer = moe._wiring._runtime.observer
        assert observer is not None
        for layer in range(len(stretch.blocks)):
            observer.changes(layer, FURTHEST)[:] = np.nan
        expected = said(moe, 8)
    with opened(48, "none") as (moe, _):
        said(moe, 4)
        assert said(moe, 8) == expected


@pytest.mark.parametrize("plain", [[2], [1, 3, 5]])
@pytest.mark.usefixtures("always_looks")
def test_layers_that_do_not_follow_one_another_are_looked_ahead_from_one_by_one(
    plain: list[int], tmp_path: Path
) -> None:
    """Compiled code sees no further than the blocks that it runs in one call."""
    num_layers = 4 + len(plain)
    path = tiny_checkpoint(
        tmp_path, torch.bfloat16, num_hidden_layers=num_layers, mlp_only_layers=plain
    )
    answers = []
    for prefetch in ("none", "gate_lookahead"):
        with MoE(path, ram="8GiB", ram_slots=20, prefetch=prefetch) as moe:
            answers.append(moe.generate([[5, 9, 30, 17]], max_new_tokens=24).tolist())
            assert moe._wiring._whole is not None
            stretches = moe._wiring._whole._stretches
            assert len(stretches) > 1 and not any(each.num_looks for each in stretches)
            loaded_bytes = moe.stats().decode.prefetch_bytes
            assert (loaded_bytes > 0) == (prefetch != "none")
            assert moe.stats().faults == ()
            moe._hierarchy.check_integrity()
    assert answers[0] == answers[1]
