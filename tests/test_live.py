"""What another thread may see of a running model."""

from pathlib import Path
from typing import Any

import numpy as np

from moe_infinity import MoE
from moe_infinity.config import PREFILL_CHUNK_TOKENS
from support.engine import BUDGET


class _Watch:
    """Looks at ``live`` before each of the model's layers."""

    def __init__(self, moe: MoE) -> None:
        self.left: list[int] = []
        self._moe = moe
        self._hooks = [
            layer.register_forward_pre_hook(self._look) for layer in moe.model.model.layers
        ]

    def _look(self, module: object, args: object) -> None:
        self.left.append(self._moe.live.prompt_left())

    def close(self) -> None:
        for hook in self._hooks:
            hook.remove()


def generate(moe: MoE, length: int, **options: Any) -> None:
    moe.generate([[1 + n % 50 for n in range(length)]], do_sample=False, **options)


def test_what_is_left_of_a_prompt_only_shrinks(tiny: Path) -> None:
    length = PREFILL_CHUNK_TOKENS + 100
    with MoE(tiny, ram=BUDGET, ram_slots=9, max_context=length + 8) as moe:
        watch = _Watch(moe)
        generate(moe, length, max_new_tokens=2)
        watch.close()
        prompt = [left for left in watch.left if left]
        assert prompt[0] == length and prompt == sorted(prompt, reverse=True)
        assert PREFILL_CHUNK_TOKENS > prompt[-1] > 0 and len(set(prompt)) > 2
        assert watch.left[-1] == 0 == moe.live.prompt_left()


def test_totals_include_every_request(moe: MoE) -> None:
    generate(moe, 5, max_new_tokens=3)
    generate(moe, 4, max_new_tokens=3)
    prefill, decode = moe.live.totals()
    total = moe.stats(total=True)
    assert (prefill.num_tokens, decode.num_tokens) == (9, 4)
    assert (
        prefill.hits + decode.hits == total.hits and prefill.misses + decode.misses == total.misses
    )


def test_the_tier_map_is_where_experts_are(moe: MoE) -> None:
    generate(moe, 5, max_new_tokens=3)
    heights = moe.live.tier_map()
    for layer, tiers in enumerate(moe.residency()):
        assert np.flatnonzero(heights[layer]).tolist() == tiers["ram"]
    assert heights.sum() == moe.live.num_slots == 9


def test_what_was_routed_is_told_once(moe: MoE) -> None:
    generate(moe, 5, max_new_tokens=3)
    events, seen = moe.live.routed_since(0)
    assert len(events) == seen == 3 * len(moe.residency())
    assert moe.live.routed_since(seen) == ([], seen)
    generate(moe, 5, max_new_tokens=2)
    assert len(moe.live.routed_since(seen)[0]) == 2 * len(moe.residency())
