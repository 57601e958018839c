"""Blocks run ahead of the model's calls: nothing that anybody sees may depend on it."""

import copy
import gc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moe_infinity import MoE
from moe_infinity.cache.ram import RamHierarchy
from moe_infinity.errors import CancelledError, PlanExceededError
from moe_infinity.kernels import native
from moe_infinity.kernels.stages import Stages
from moe_infinity.model.chain import Chain, Reached
from moe_infinity.model.experts import ExpertsLayer
from support.checkpoints import tiny_checkpoint
from support.families import tiny_input_ids

pytestmark = pytest.mark.skipif(native.native is None, reason="installed without a compiler")
NUM_NEW = 12


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("chain")
    return tiny_checkpoint(folder, torch.bfloat16, max_position_embeddings=512)


@pytest.fixture
def ran_whole(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many blocks each run ahead did whole."""
    counts: list[int] = []
    run = Stages.run

    def counted(self: Stages, *args: Any) -> int:
        counts.append(run(self, *args))
        return counts[-1]

    monkeypatch.setattr(Stages, "run", counted)
    return counts


@pytest.fixture
def never(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Call it, and nothing is run ahead any more."""
    return lambda: monkeypatch.setattr(Chain, "reach", lambda *args: Reached.NOTHING)


def opened(path: Path, **options: Any) -> MoE:
    return MoE(path, ram="8GiB", **options)


def logits(moe: MoE, num_new: int = NUM_NEW, before: Callable[[int, Any], Any] | None = None):
    """[num_new, vocabulary] of decode behind a prompt, the same tokens whatever the model says.
    before(step, cache) -> the cache to go on with."""
    ids = tiny_input_ids(rows=1, length=12 + num_new)
    cache = moe.new_cache()
    said = []
    with torch.inference_mode():
        moe(ids[:, :12], past_key_values=cache)
        for step in range(num_new):
            cache = before(step, cache) if before else cache
            at = 12 + step
            said.append(moe(ids[:, at : at + 1], past_key_values=cache).logits[:, -1].clone())
    return torch.cat(said)


@pytest.mark.parametrize("slots", [None, 2, 3, 6, 12])
def test_what_is_said_and_counted_is_the_same(
    small: Path, slots: int | None, ran_whole: list[int], never: Callable[[], None]
) -> None:
    options = {} if slots is None else {"ram_slots": slots}

    def run() -> tuple[torch.Tensor, dict, np.ndarray]:
        with opened(small, **options) as moe, moe.recording() as recorder:
            found = logits(moe, 30)
            again = logits(moe, 30)
            assert torch.equal(found, again)
            decode = moe.stats(total=True).decode
            counts = {
                name: getattr(decode, name)
                for name in ("hits", "misses", "late", "demand_bytes", "num_tokens")
            }
        return found, counts, recorder.trace().ids

    ahead = run()
    assert sum(ran_whole) > (100 if slots is None else 0) or slots in (2, 3)
    never()
    after = run()
    assert torch.equal(ahead[0], after[0])
    assert ahead[1] == after[1]
    assert np.array_equal(ahead[2], after[2])


@pytest.mark.parametrize("policy", ["lru", "lfu", "next_use"])
@pytest.mark.parametrize("slots", [None, 6, 12])
def test_told_together_or_one_by_one_is_the_same(
    small: Path, slots: int | None, policy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[int] = []
    run_hits = RamHierarchy.run_hits
    monkeypatch.setattr(
        RamHierarchy, "run_hits", lambda *args: told.append(len(args[1])) or run_hits(*args)
    )

    def run() -> tuple[object, ...]:
        options = {} if slots is None else {"ram_slots": slots}
        with opened(small, policy=policy, prefetch="none", **options) as moe:
            found = logits(moe, 40)
            stats, hierarchy = moe.stats(total=True).decode, moe._hierarchy
            counts = (stats.hits, stats.misses, stats.demand_bytes, stats.num_tokens)
            computed = hierarchy.counters.decode.computed_bytes
            accesses = [(a.layer, a.experts.tolist()) for a in moe._wiring.recorder.accesses]
            hierarchy.check_integrity()
            return found.tolist(), counts, computed, accesses, hierarchy.resident_flat()

    together = run()
    assert sum(told) > 0
    assert slots is not None or max(told) == 3, "all layers of a pass at once"
    told.clear()
    monkeypatch.setattr(ExpertsLayer, "told_later", lambda *args: None)
    assert run() == together
    assert not told


@pytest.mark.parametrize("in_place", [True, False])
def test_who_changes_what_a_block_returns_is_heard(
    small: Path, in_place: bool, ran_whole: list[int], never: Callable[[], None]
) -> None:
    """In mid-conversation, and only for a while."""

    def in_its_place(module: Any, args: Any, out: torch.Tensor) -> None:
        out += 0.5

    def with_another(module: Any, args: Any, out: torch.Tensor) -> torch.Tensor:
        return out + 0.5

    def run() -> torch.Tensor:
        with opened(small) as moe:
            hooks = []

            def before(step: int, cache: Any) -> Any:
                if step == 4:
                    block = moe.model.model.layers[0]
                    hooks.append(
                        block.register_forward_hook(in_its_place if in_place else with_another)
                    )
                if step == 8:
                    hooks.pop().remove()
                return cache

            return logits(moe, before=before)

    ahead = run()
    assert sum(ran_whole) > 0
    with opened(small) as moe:
        assert not torch.equal(logits(moe), ahead)
    never()
    assert torch.equal(ahead, run())


def test_whoever_keeps_changing_things_does_not_pay_twice(
    small: Path, ran_whole: list[int]
) -> None:
    """What is run ahead in vain is noticed: in the first token, and never again."""

    def steer(module: Any, args: Any, out: torch.Tensor) -> None:
        out += 0.5

    with opened(small) as moe:
        logits(moe)
        ran_whole.clear()
        for block in moe.model.model.layers:
            block.register_forward_hook(steer)
        logits(moe, 20)
    assert sum(ran_whole) <= 6


def test_a_hook_that_fails_in_mid_pass(small: Path) -> None:
    """The next try, from where the cache was, says what it would have said."""

    class Stop(Exception):
        pass

    def stop(*args: Any) -> None:
        raise Stop

    with opened(small) as moe:
        expected = logits(moe)

        def before(step: int, cache: Any) -> Any:
            if step == 6:
                hook = moe.model.model.layers[1].register_forward_pre_hook(stop)
                length = cache.get_seq_length()
                with pytest.raises(Stop):
                    moe(torch.tensor([[7]]), past_key_values=cache)
                hook.remove()
                for layer in cache.layers:
                    layer.crop(length - layer.get_seq_length())
            return cache

        assert torch.equal(logits(moe, before=before), expected)


def test_caches_are_let_go(small: Path, ran_whole: list[int]) -> None:
    """A finished request's keys and values are in no budget."""
    with opened(small) as moe:
        cache = moe.new_cache()
        with torch.inference_mode():
            for token in range(8):
                moe(torch.tensor([[token]]), past_key_values=cache)
        assert sum(ran_whole) > 0
        room = weakref.ref(cache.layers[0].next_place()[0])
        del cache
        gc.collect()
        assert room() is None


def test_another_cache_in_between(
    small: Path, ran_whole: list[int], never: Callable[[], None]
) -> None:
    """Its copy, a shorter one, and one of another conversation."""

    def run() -> torch.Tensor:
        with opened(small) as moe:
            other = moe.new_cache()
            with torch.inference_mode():
                moe(tiny_input_ids(rows=1, length=5), past_key_values=other)

            def before(step: int, cache: Any) -> Any:
                if step == 3:
                    return copy.deepcopy(cache)
                if step == 5:
                    cache.crop(-2)
                return other if step == 7 else cache

            return logits(moe, before=before)

    ahead = run()
    assert sum(ran_whole) > 0
    never()
    assert torch.equal(ahead, run())


def test_a_request_that_was_cancelled_leaves_nothing(small: Path) -> None:
    with opened(small) as moe:
        expected = logits(moe)
        ids = tiny_input_ids(rows=1, length=12)
        with pytest.raises(CancelledError):
            moe.generate(ids, max_new_tokens=9, streamer=_Canceller(moe))
        assert torch.equal(logits(moe), expected)


class _Canceller:
    """A streamer that cancels after three tokens."""

    def __init__(self, moe: MoE) -> None:
        self._moe, self._seen = moe, 0

    def put(self, value: torch.Tensor) -> None:
        self._seen += 1
        if self._seen == 4:
            self._moe.cancel()

    def end(self) -> None:
        pass


def test_nothing_is_written_behind_the_context(small: Path, ran_whole: list[int]) -> None:
    with opened(small, max_context=20) as moe, torch.inference_mode():
        cache = moe.new_cache()
        ids = tiny_input_ids(rows=1, length=21)
        moe(ids[:, :12], past_key_values=cache)
        for at in range(12, 20):
            moe(ids[:, at : at + 1], past_key_values=cache)
        num_runs = len(ran_whole)
        assert num_runs > 0
        with pytest.raises(PlanExceededError):
            moe(ids[:, 20:], past_key_values=cache)
        assert len(ran_whole) == num_runs


def test_a_router_that_is_exchanged_counts_at_once(small: Path) -> None:
    with opened(small) as moe:
        expected = logits(moe)
        gate = moe.model.model.layers[1].mlp.gate

        def before(step: int, cache: Any) -> Any:
            if step == 6:
                with torch.no_grad():
                    gate.weight.copy_(gate.weight.flip(0))
            return cache

        found = logits(moe, before=before)
    assert torch.equal(found[:6], expected[:6]) and not torch.equal(found[6:], expected[6:])


def test_predictors_are_asked_in_time(small: Path, ran_whole: list[int]) -> None:
    """Whoever looks ahead gets to load while blocks are computed: nothing is run before."""
    with opened(small, ram_slots=6, prefetch="gate_lookahead") as moe:
        logits(moe)
    assert not ran_whole
