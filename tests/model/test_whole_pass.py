"""Passes without the library's own way through the model: nobody may see a difference."""

import copy
import gc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from moe_infinity import MoE
from moe_infinity.cache.base import Hierarchy
from moe_infinity.cache.ram import RamHierarchy
from moe_infinity.errors import CancelledError, PlanExceededError
from moe_infinity.kernels import native
from moe_infinity.kernels.blocks import TailCall
from moe_infinity.kernels.described import describe
from moe_infinity.kernels.stages import Stages
from moe_infinity.model.kv_cache import PreallocatedLayer
from moe_infinity.model.routers import RouterTaps
from moe_infinity.model.stretch import Stretch
from moe_infinity.model.tail import Tail
from moe_infinity.model.whole_pass import WholePass
from support.checkpoints import edit_config, tiny_checkpoint
from support.families import family, save_tiny, tiny_input_ids

pytestmark = pytest.mark.skipif(native.native is None, reason="installed without a compiler")
NUM_NEW = 12


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    return tiny_checkpoint(folder, torch.bfloat16, max_position_embeddings=512)


@pytest.fixture
def ran_whole(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many blocks each run ahead did whole."""
    counts: list[int] = []
    run = Stages.run

    def counted(self: Stages, *args: Any) -> list[float]:
        spent_s = run(self, *args)
        counts.append(len(spent_s))
        return spent_s

    monkeypatch.setattr(Stages, "run", counted)
    return counts


@pytest.fixture
def never(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Call it, and every pass goes the library's way."""
    return lambda: monkeypatch.setattr(WholePass, "_can", lambda *args: False)


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


@pytest.mark.parametrize("num_threads", [1, 2, 3])
def test_wide_sums_are_cut_into_pieces(
    tmp_path: Path, num_threads: int, ran_whole: list[int], never: Callable[[], None]
) -> None:
    """A token's experts and their sum in one run, and one after the other: the same bits."""
    path = tiny_checkpoint(tmp_path, torch.bfloat16, hidden_size=1100, moe_intermediate_size=300)
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        with opened(path) as moe:
            together = logits(moe, 30)
        assert sum(ran_whole) > 20
        never()
        with opened(path) as moe:
            assert torch.equal(logits(moe, 30), together)
    finally:
        torch.set_num_threads(before)


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
    monkeypatch.setattr(RamHierarchy, "run_hits", Hierarchy.run_hits)
    assert run() == together


@pytest.mark.parametrize("num_threads", [1, 2, 3])
def test_what_was_begun_is_done_at_the_next_call(
    small: Path, num_threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last block's experts and the head are under way while events are told."""
    before, weight = torch.get_num_threads(), torch.randn(96, 64).bfloat16()
    x, run_hits = torch.randn(1, 64).bfloat16(), RamHierarchy.run_hits
    torch.set_num_threads(num_threads)
    try:
        with opened(small) as moe:
            found, kernel = logits(moe, 40), moe._wiring.kernel
            assert isinstance(kernel, native.Kernel) and num_whole(moe) > 0
            product, counts = kernel.linear(describe(weight), 96, x), []

            def run_between(*args: Any) -> bool:
                counts.append(len(kernel._begun))
                assert torch.equal(kernel.linear(describe(weight), 96, x), product)
                return run_hits(*args)

            monkeypatch.setattr(RamHierarchy, "run_hits", run_between)
            assert torch.equal(logits(moe, 40), found)
            assert sum(counts) > 20 and max(counts) == 1 and not kernel._begun
    finally:
        torch.set_num_threads(before)


def test_nothing_is_read_that_may_move(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where events are served one by one, experts may be loaded into others' place."""
    begun: list[int] = []
    run_computed = RamHierarchy.run_computed
    monkeypatch.setattr(RamHierarchy, "run_hits", lambda *args: False)
    with opened(small) as moe:
        kernel = moe._wiring.kernel
        assert isinstance(kernel, native.Kernel)

        def noted(*args: Any) -> None:
            begun.append(len(kernel._begun))
            run_computed(*args)

        monkeypatch.setattr(RamHierarchy, "run_computed", noted)
        logits(moe, 30)
    assert len(begun) > 10 and not any(begun)


@pytest.mark.parametrize("is_closed", [False, True])
@pytest.mark.parametrize("num_threads", [1, 2, 3])
def test_what_was_begun_is_done_before_its_memory_goes(
    small: Path, num_threads: int, is_closed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever is interrupted settles; the end of the threads does where nobody could."""
    before, begun = torch.get_num_threads(), list[torch.Tensor]()
    torch.set_num_threads(num_threads)
    try:
        with opened(small) as moe:
            found, kernel = logits(moe, 40), moe._wiring.kernel
            assert isinstance(kernel, native.Kernel)

            def interrupt(*args: Any) -> bool:
                begun.extend(call.out.fill_(torch.nan) for call in kernel._begun)
                raise KeyboardInterrupt

            monkeypatch.setattr(RamHierarchy, "run_hits", interrupt)
            if is_closed:
                monkeypatch.setattr(Stretch, "settle", lambda *args, **kwargs: None)
            with pytest.raises(KeyboardInterrupt):
                logits(moe, 40)
            assert len(begun) == 1
            if is_closed:
                assert begun[0].isnan().all(), "the head waits for the experts"
                kernel.close()
            else:
                assert not kernel._begun and kernel.settle() == 0, "nothing is left"
            assert any(torch.equal(begun[0][0], each[None]) for each in found)
    finally:
        torch.set_num_threads(before)


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


def test_what_is_changed_in_mid_conversation_is_told_once(
    small: Path, ran_whole: list[int], never: Callable[[], None]
) -> None:
    """That a part was exchanged is seen while compiled code is at work, and before anybody is told
    of it."""

    def run() -> tuple[torch.Tensor, list[Any], int]:
        with opened(small) as moe:
            weight = moe.model.model.layers[1].self_attn.q_proj.weight

            def before(step: int, cache: Any) -> Any:
                runs.append(sum(ran_whole))
                if step == 9:
                    weight.data = weight.data * 1.5
                return cache

            logits(moe)
            found = logits(moe, 20, before)
            told = [(a.layer, a.experts.tolist()) for a in moe._wiring.recorder.accesses]
            return found, told, moe.stats(total=True).decode.hits

    runs: list[int] = []  # blocks that were run before each step
    changed = run()
    assert runs[10] - runs[9] == 3, "it was under way"
    assert runs[-1] == runs[10], "and is the library's since"
    never()
    library = run()
    assert torch.equal(changed[0], library[0])
    assert changed[1:] == library[1:]


def test_whoever_keeps_changing_things_does_not_pay_twice(
    small: Path, ran_whole: list[int]
) -> None:
    """Nothing is told whose results somebody wants to change, and only once is it computed."""

    def steer(module: Any, args: Any, out: torch.Tensor) -> None:
        out += 0.5

    with opened(small) as moe:
        logits(moe)
        ran_whole.clear()
        for block in moe.model.model.layers:
            block.register_forward_hook(steer)
        logits(moe, 20)
    assert len(ran_whole) <= 1


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
        room = weakref.ref(cache.layers[0].lone_place(torch.bfloat16)[0][0])
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


def test_a_request_that_was_cancelled_leaves_nothing(
    small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    ahead, settle = native.Kernel.run_ahead, native.Kernel.settle
    kernel = native.Kernel
    monkeypatch.setattr(kernel, "run_ahead", lambda *args: calls.append("run") or ahead(*args))
    monkeypatch.setattr(kernel, "settle", lambda *args: calls.append("settle") or settle(*args))
    with opened(small) as moe:
        expected = logits(moe)
        calls.clear()
        ids = tiny_input_ids(rows=1, length=12)
        with pytest.raises(CancelledError):
            moe.generate(ids, max_new_tokens=9, streamer=_Canceller(moe))
        assert "run" in calls and calls[-1] == "settle", "nobody may go on writing logits"
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


@pytest.mark.parametrize("prefetch", ["gate_lookahead_next_norm", "transition"])
def test_predictors_are_asked_in_time(small: Path, prefetch: str, ran_whole: list[int]) -> None:
    """Whoever looks ahead by more than later routers, asked before a block's experts, gets to load
    while blocks are computed: nothing is run before."""
    with opened(small, ram_slots=6, prefetch=prefetch) as moe:
        logits(moe)
    assert not ran_whole


def num_whole(moe: MoE) -> int:
    whole = moe._wiring._whole
    return 0 if whole is None else whole.num_passes


@pytest.mark.parametrize("name", ["qwen3_moe", "olmoe", "mixtral"])
def test_families(
    name: str, tmp_path: Path, never: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    save_tiny(family(name), tmp_path, torch.bfloat16)
    ended: list[torch.Tensor] = []
    call = Tail.call

    def noted(*args: Any) -> TailCall:
        called = call(*args)
        ended.append(called.out.fill_(torch.nan))
        return called

    monkeypatch.setattr(Tail, "call", noted)
    with opened(tmp_path) as moe:
        found = logits(moe)
        assert num_whole(moe) == NUM_NEW - 1, "all but the one that is watched"
        ended.clear()
        assert torch.equal(logits(moe), found)
        assert sum(bool(each.isfinite().all()) for each in ended) > NUM_NEW // 2
        assert torch.equal(ended[-1][0], found[-1:])
        assert num_whole(moe) == 2 * NUM_NEW - 1
    never()
    with opened(tmp_path) as moe:
        assert torch.equal(logits(moe), found)
        assert num_whole(moe) == 0


@pytest.mark.parametrize("plain", [[0, 2], [0, 4]])
def test_blocks_without_experts_are_called_in_between(
    tmp_path: Path, plain: list[int], never: Callable[[], None]
) -> None:
    tiny_checkpoint(tmp_path, torch.bfloat16, num_hidden_layers=5, mlp_only_layers=plain)
    with opened(tmp_path) as moe:
        found = logits(moe)
        assert num_whole(moe) == NUM_NEW - 1
    never()
    with opened(tmp_path) as moe:
        assert torch.equal(logits(moe), found)


@pytest.mark.parametrize("change", [{"logits_scaling": 3.0}, {"embedding_multiplier": 3.0}, {}])
def test_whoever_does_more_goes_the_librarys_way(change: dict[str, float], tmp_path: Path) -> None:
    save_tiny(family("granitemoeshared"), tmp_path, torch.bfloat16)
    edit_config(tmp_path, **{"logits_scaling": 1.0, "embedding_multiplier": 1.0} | change)
    with opened(tmp_path) as moe:
        logits(moe)
        assert num_whole(moe) == (0 if change else NUM_NEW - 1)


@pytest.mark.parametrize(
    "part", ["model.embed_tokens", "model.norm", "lm_head", "model.rotary_emb"]
)
def test_parts_around_the_blocks_stay_the_models_own(
    small: Path, part: str, never: Callable[[], None]
) -> None:
    """Hooks of theirs are heard, in mid-conversation too."""

    def louder(module: Any, args: Any, out: Any) -> Any:
        return tuple(2 * each for each in out) if isinstance(out, tuple) else 2 * out

    def run() -> torch.Tensor:
        with opened(small) as moe:

            def before(step: int, cache: Any) -> Any:
                if step == 5:
                    moe.model.get_submodule(part).register_forward_hook(louder)
                return cache

            return logits(moe, before=before)

    found = run()
    with opened(small) as moe:
        assert not torch.equal(logits(moe), found)
    never()
    assert torch.equal(run(), found)


def _watch_decoder(model: Any) -> None:
    model.model.register_forward_hook(_louder_states)


def _louder_states(module: Any, args: Any, out: Any) -> Any:
    out.last_hidden_state = 2 * out.last_hidden_state
    return out


def _replace_decoders_forward(model: Any) -> None:
    stock = model.model.forward
    model.model.forward = lambda *args, **kwargs: _louder_states(None, args, stock(*args, **kwargs))


def _skip_a_block(model: Any) -> None:
    model.model.layers[1].forward = lambda x, *args, **kwargs: x


def _exchange_a_block(model: Any) -> None:
    model.model.layers[1] = nn.Identity()
    model.model.layers[1].forward = lambda x, *args, **kwargs: x


def _leave_out_the_last(model: Any) -> None:
    model.config.num_hidden_layers -= 1


@pytest.mark.parametrize(
    "change",
    [
        _watch_decoder,
        _replace_decoders_forward,
        _skip_a_block,
        _exchange_a_block,
        _leave_out_the_last,
    ],
)
def test_what_is_passed_over_is_looked_at(
    small: Path, change: Callable[[Any], None], never: Callable[[], None]
) -> None:
    def run() -> torch.Tensor:
        with opened(small) as moe:

            def before(step: int, cache: Any) -> Any:
                if step == 5:
                    change(moe.model)
                return cache

            found = logits(moe, before=before)
            assert num_whole(moe) in (0, 4)
            return found

    found = run()
    with opened(small) as moe:
        assert not torch.equal(logits(moe), found)
    never()
    assert torch.equal(run(), found)


def test_whoever_asks_for_more_is_given_it(small: Path) -> None:
    with opened(small) as moe, torch.inference_mode():
        cache = moe.new_cache()
        moe(tiny_input_ids(rows=1, length=5), past_key_values=cache)
        token = torch.tensor([[7]])
        for _ in range(3):
            moe(token, past_key_values=cache)
        assert num_whole(moe) == 2
        said = moe(token, past_key_values=cache, output_hidden_states=True)
        assert len(said.hidden_states) == 1 + len(moe.model.model.layers)
        said = moe(token, past_key_values=cache, output_router_logits=True)
        assert len(said.router_logits) == len(moe.residency())
        assert isinstance(moe(token, past_key_values=cache, return_dict=False), tuple)
        assert num_whole(moe) == 2


def test_padding_is_masked(small: Path) -> None:
    ids = tiny_input_ids(rows=1, length=9)
    mask = torch.ones_like(ids)
    mask[:, :3] = 0
    with opened(small) as moe, torch.inference_mode():
        logits(moe)  # the way is known before
        num_before, said = num_whole(moe), {}
        for name, given in (("masked", mask), ("all", torch.ones_like(mask))):
            cache = moe.new_cache()
            moe(ids, attention_mask=given, past_key_values=cache)
            longer = torch.cat([given, torch.ones(1, 1, dtype=given.dtype)], dim=1)
            said[name] = moe(ids[:, :1], attention_mask=longer, past_key_values=cache).logits
            assert num_whole(moe) - num_before == (name == "all")
        assert not torch.equal(said["masked"], said["all"])


def test_rows_that_come_behind_a_lone_token(small: Path, never: Callable[[], None]) -> None:
    """Its keys and values are every row's."""

    def run() -> torch.Tensor:
        with opened(small, max_batch=2) as moe, torch.inference_mode():
            logits(moe)
            cache = moe.new_cache()
            moe(tiny_input_ids(rows=1, length=5), past_key_values=cache)
            moe(torch.tensor([[7]]), past_key_values=cache)
            cache.batch_repeat_interleave(2)
            said = moe(torch.tensor([[8], [9]]), past_key_values=cache).logits
            cache.batch_select_indices(torch.tensor([1]))
            cache.crop(-1)
            return torch.cat([said, moe(torch.tensor([[3]]), past_key_values=cache).logits])

    found = run()
    never()
    assert torch.equal(run(), found)


def test_more_rows_than_the_cache_has_see_what_it_holds() -> None:
    layer = PreallocatedLayer(16)
    keys, values = torch.randn(2, 1, 2, 3, 4)
    layer.update(keys, values)
    layer.keep(3)  # as a whole pass says it
    seen, _ = layer.update(torch.zeros(2, 2, 1, 4), torch.zeros(2, 2, 1, 4))
    assert torch.equal(seen[:, :, :3], keys.expand(2, -1, -1, -1))


def test_positions_beyond_a_table(small: Path, never: Callable[[], None]) -> None:
    def run() -> torch.Tensor:
        with opened(small) as moe, torch.inference_mode():
            cache = moe.new_cache()
            moe(tiny_input_ids(rows=1, length=250), past_key_values=cache)
            tokens = tiny_input_ids(rows=1, length=12)[0]
            return torch.cat(
                [moe(token.view(1, 1), past_key_values=cache).logits[0] for token in tokens]
            )

    found = run()
    never()
    assert torch.equal(run(), found)


def test_frequencies_changed_in_their_place_count(small: Path) -> None:
    with opened(small) as moe:
        expected = logits(moe)

        def before(step: int, cache: Any) -> Any:
            if step == 6:
                moe.model.model.rotary_emb.inv_freq *= 2
            return cache

        found = logits(moe, before=before)
    assert torch.equal(found[:6], expected[:6]) and not torch.equal(found[6:], expected[6:])


def test_models_around_models_go_the_librarys_way(tmp_path: Path) -> None:
    """They count positions between the two."""
    save_tiny(family("qwen3_vl_moe"), tmp_path, torch.bfloat16)
    with opened(tmp_path) as moe:
        assert num_whole(moe) == 0 and moe._wiring._whole is None


def test_foresight_goes_on_learning_while_nobody_looks_ahead(
    small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    see_input = RouterTaps.see_input
    monkeypatch.setattr(RamHierarchy, "looks_ahead", lambda self: False)
    monkeypatch.setattr(
        RouterTaps,
        "see_input",
        lambda self, layer, x: seen.append(layer) or see_input(self, layer, x),
    )
    with opened(small, ram_slots=6, prefetch="gate_lookahead") as moe:
        logits(moe, 16)
        assert num_whole(moe) > 0
    assert set(seen) == {0, 1, 2} and 6 <= len(seen) <= 18


@pytest.mark.parametrize("named", [True, False])
def test_positions_may_be_given(small: Path, named: bool, never: Callable[[], None]) -> None:
    """Another position than the cache's length, and without a word where the library counts."""

    def run() -> torch.Tensor:
        said = []
        with opened(small) as moe, torch.inference_mode():
            cache = moe.new_cache()
            moe(tiny_input_ids(rows=1, length=5), past_key_values=cache)
            for step in range(8):
                turn = {"position_ids": torch.tensor([[5 + 3 * step]])} if named else {}
                said.append(moe(torch.tensor([[7]]), past_key_values=cache, **turn).logits[0])
            assert num_whole(moe) in (0, 7)
        return torch.cat(said)

    found = run()
    never()
    assert torch.equal(run(), found)
