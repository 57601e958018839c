"""KV caches that go on: what is shared is not computed again, and the plan's memory is kept to."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moe_infinity import MoE, bundled_model_path
from moe_infinity.errors import CancelledError
from moe_infinity.machine import resident_bytes
from moe_infinity.model.kept_caches import KeptCaches
from moe_infinity.model.kv_cache import PreallocatedLayer
from support.encoder_decoder import FAMILIES, save

CONTEXT = 400


@pytest.fixture(scope="module")
def moe() -> Iterator[MoE]:
    with MoE(bundled_model_path(), ram="8GiB", dtype="float32", max_context=CONTEXT) as opened:
        yield opened


@pytest.fixture
def caches(moe: MoE) -> KeptCaches:
    return KeptCaches(moe.new_cache, CONTEXT)


def answer(moe: MoE, caches: KeptCaches, prompt: list[int], num_new: int = 8) -> list[int]:
    cache, _ = caches.take(prompt)
    caches.grow(len(prompt) + num_new)
    ids: list[int] = moe.generate(
        [prompt], max_new_tokens=num_new, past_key_values=cache, do_sample=False
    )[0].tolist()
    caches.give_back(ids)
    return ids


def prompt_of(start: int, length: int) -> list[int]:
    return [(start * 31 + n * 7) % 2000 + 1 for n in range(length)]


def test_a_conversation_that_goes_on_computes_what_is_new(moe: MoE, caches: KeptCaches) -> None:
    first = answer(moe, caches, prompt_of(1, 40))
    longer = [*first, *prompt_of(2, 10)]
    got = answer(moe, caches, longer)
    # The answer's last token never went through the model.
    assert moe.stats().prefill.num_tokens == 11
    assert got == answer(moe, KeptCaches(moe.new_cache, CONTEXT), longer)


def test_two_conversations_with_one_beginning_are_both_kept(moe: MoE, caches: KeptCaches) -> None:
    system = prompt_of(3, 60)
    one, two = [*system, *prompt_of(4, 20)], [*system, *prompt_of(5, 20)]
    ends = [answer(moe, caches, one), answer(moe, caches, two)]
    assert moe.stats().prefill.num_tokens == 20  # the beginning was copied
    for end in ends:
        got = answer(moe, caches, [*end, 7, 8])
        assert moe.stats().prefill.num_tokens == 3
        assert got == answer(moe, KeptCaches(moe.new_cache, CONTEXT), [*end, 7, 8])


def test_many_others_do_not_part_two_that_go_on(moe: MoE, caches: KeptCaches) -> None:
    """All begin with the same two tokens, as chat templates make them: the oldest goes, not the one
    that shares no more than that."""
    for number in range(20):
        answer(moe, caches, [1, 2, *prompt_of(20 + number, 10)], num_new=4)
    one, two = [1, 2, *prompt_of(50, 60)], [1, 2, *prompt_of(51, 60)]
    for _ in range(3):
        one = answer(moe, caches, [*one, 5], num_new=4)
        first = moe.stats().prefill.num_tokens
        two = answer(moe, caches, [*two, 5], num_new=4)
        second = moe.stats().prefill.num_tokens
    assert first == second == 2


def test_what_does_not_fit_beside_another_takes_its_place(moe: MoE, caches: KeptCaches) -> None:
    one = answer(moe, caches, prompt_of(6, 200))
    answer(moe, caches, prompt_of(7, 200))
    assert caches.num_tokens < CONTEXT
    answer(moe, caches, [*one, 9])
    assert moe.stats().prefill.num_tokens == len(one) + 1  # it was let go


def test_a_changed_end_is_cropped_where_a_copy_has_no_room(moe: MoE, caches: KeptCaches) -> None:
    one = answer(moe, caches, prompt_of(8, 300))
    changed = [*one[:290], 5, 6, 7]
    got = answer(moe, caches, changed)
    assert moe.stats().prefill.num_tokens == 3
    assert got == answer(moe, KeptCaches(moe.new_cache, CONTEXT), changed)


def test_the_same_prompt_again_computes_its_last_token(moe: MoE, caches: KeptCaches) -> None:
    prompt = prompt_of(9, 50)
    assert answer(moe, caches, prompt) == answer(moe, caches, prompt)
    assert moe.stats().prefill.num_tokens == 1


def test_a_pass_cut_short_leaves_what_every_layer_holds(moe: MoE, caches: KeptCaches) -> None:
    prompt = prompt_of(10, 60)
    cache, _ = caches.take(prompt)
    calls = [0]

    def cancel(module: object, args: object) -> None:
        calls[0] += 1
        if calls[0] == 2:
            moe.cancel()

    layers = moe.model.model.layers
    hook = layers[4].register_forward_pre_hook(cancel)
    try:
        with pytest.raises(CancelledError):
            moe.generate([prompt], max_new_tokens=8, past_key_values=cache, do_sample=False)
    finally:
        hook.remove()
    caches.give_back([*prompt, 0, 0], is_cut=True)
    assert {layer.get_seq_length() for layer in cache.layers} == {caches.num_tokens}
    got = answer(moe, caches, prompt)
    assert got == answer(moe, KeptCaches(moe.new_cache, CONTEXT), prompt)


def test_many_short_conversations_use_no_more_than_their_tokens() -> None:
    context, room = 32_768, 8 * 32_768 * 64 * 4  # of a head's keys: bytes of all tokens
    before = resident_bytes()
    caches = KeptCaches(lambda: _Wide(context), context)
    for first in range(8):
        cache, _ = caches.take([first, 1, 2])
        cache.put(3)
        caches.give_back([first, 1, 2, 3])
    assert caches.num_tokens == 8 * 3
    assert resident_bytes() - before < room // 8


class _Wide:
    """A cache of one layer."""

    def __init__(self, capacity: int) -> None:
        self.layers = [PreallocatedLayer(capacity)]

    def put(self, num_tokens: int) -> None:
        self.layers[0].update(*(torch.ones(1, 8, num_tokens, 64) for _ in range(2)))


@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_is_kept_of_a_decoder_that_answers_another_text(
    family: str, tmp_path: Path
) -> None:
    save(FAMILIES[family].build(), tmp_path, torch.float32)
    with MoE(tmp_path, ram="2GiB", max_context=64, dtype="float32") as moe:
        caches = KeptCaches(moe.new_cache, 64)
        said = []
        for end in ([11, 12], [20, 30, 40], [20, 30, 40]):
            cache, shared = caches.take(prompt := [5, 6, 7, 8, 9, 10, *end])
            options = {"past_key_values": cache, "do_sample": False}
            said.append(moe.generate([prompt], max_new_tokens=6, **options)[0].tolist())
            caches.give_back([*prompt, *said[-1][1:]])
            assert shared == 0
        assert said[1] == said[2]


def test_nothing_is_kept_of_families_that_begin_anew() -> None:
    caches = KeptCaches(lambda: None, 100)
    assert caches.take([1, 2, 3]) == (None, 0)
    caches.give_back([1, 2, 3, 4])
    assert caches.num_tokens == 0 and caches.take([1, 2, 3, 4, 5]) == (None, 0)


class _Fake:
    """A cache of one layer that writes the token itself as its key."""

    is_croppable = True

    def __init__(self, capacity: int) -> None:
        self.layers = [PreallocatedLayer(capacity)]

    def put(self, ids: list[int]) -> None:
        values = torch.tensor(ids, dtype=torch.float32).view(1, 1, -1, 1)
        if ids:
            self.layers[0].update(values, values)

    def crop(self, by: int) -> None:
        self.layers[0].crop(by)


@given(
    st.lists(
        st.tuples(
            st.lists(st.integers(0, 1), min_size=1, max_size=60), st.integers(0, 20), st.booleans()
        ),
        max_size=12,
    )
)
def test_the_cache_lent_always_holds_the_prompt_it_is_said_to(
    requests: list[tuple[list[int], int, bool]],
) -> None:
    capacity = 100
    caches = KeptCaches(lambda: _Fake(capacity), capacity)
    for prompt, num_new, is_cut in requests:
        cache, shared = caches.take(prompt)
        assert 0 <= shared < len(prompt)
        held = cache.layers[0].keys
        assert ([] if held is None else held.flatten().tolist()) == prompt[:shared]
        ids = [*prompt, *([1] * num_new)]
        caches.grow(len(ids))
        assert caches.num_tokens + len(ids) <= capacity
        cache.put(ids[shared : len(ids) - 1])
        caches.give_back(ids, is_cut)
