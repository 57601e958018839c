"""Decoder blocks by compiled code: which ones, that they say the same, and when it lets go."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from moe_infinity import MoE
from moe_infinity.kernels import native
from moe_infinity.model.blocks import CompiledBlock
from support.checkpoints import edit_config, tiny_checkpoint
from support.families import family, save_tiny, tiny_input_ids

pytestmark = pytest.mark.skipif(native.native is None, reason="installed without a compiler")
NUM_NEW = 6
# Routers of the usual kind; those with shared experts, biases or groups are called as they are.
WHOLE = ("qwen3_moe", "olmoe", "mixtral", "granitemoeshared")
WITHOUT_ROUTER = ("qwen2_moe", "minimax_m2", "hy_v3")
# Latent attention; sinks; norms elsewhere; state spaces; windows.
OTHERS = ("deepseek_v3", "gpt_oss", "phimoe", "jamba", "mimo_v2_flash")


def blocks_of(moe: MoE) -> list[CompiledBlock]:
    owners = (module.__dict__.get("forward") for module in moe.model.modules())
    found = (getattr(forward, "__self__", None) for forward in owners)
    return [block for block in found if isinstance(block, CompiledBlock)]


def opened(path: Path, **options: Any) -> MoE:
    return MoE(path, ram="8GiB", **options)


def words(moe: MoE, ids: torch.Tensor | None = None) -> torch.Tensor:
    """Logits [NUM_NEW, vocabulary] of a prompt's last token and of decode behind it, the same
    tokens whatever the model says."""
    ids = tiny_input_ids(rows=1, length=12 + NUM_NEW) if ids is None else ids
    start = ids.shape[1] - NUM_NEW + 1
    cache = moe.new_cache()
    with torch.inference_mode():
        said = [moe(ids[:, :start], past_key_values=cache).logits[:, -1]]
        for at in range(start, ids.shape[1]):
            said.append(moe(ids[:, at : at + 1], past_key_values=cache).logits[:, -1])
    return torch.cat(said).float()


def assert_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Up to bf16's rounding. Of two next to equally likely experts now and then the other one is
    chosen: two tokens of decode may be off."""
    errors = (found - expected)[1:].abs().amax(dim=1).sort().values
    assert errors[-3] <= 0.02 * expected.abs().max(), errors


@pytest.mark.parametrize("name", [*WHOLE, *WITHOUT_ROUTER, *OTHERS])
def test_families(name: str, tmp_path: Path) -> None:
    save_tiny(family(name), tmp_path, torch.bfloat16)
    with opened(tmp_path, kernel="torch") as moe:
        expected = words(moe)
        assert not blocks_of(moe)
    with opened(tmp_path) as moe:
        found = blocks_of(moe)
        assert len(found) == (0 if name in OTHERS else len(moe.residency()))
        assert all(block.has_router == (name in WHOLE) for block in found)
        assert_close(words(moe), expected)
        assert all(block.num_calls == NUM_NEW - 1 for block in found)


@pytest.mark.parametrize("change", [{"clip_qkv": 0.5}, {"torch_dtype": "float32"}])
def test_bounded_attention_and_float32_stay_with_torch(change: dict, tmp_path: Path) -> None:
    dtype = torch.float32 if "torch_dtype" in change else torch.bfloat16
    save_tiny(family("olmoe"), tmp_path, dtype)
    edit_config(tmp_path, **change)
    with opened(tmp_path) as moe:
        assert not blocks_of(moe)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("blocks")
    return tiny_checkpoint(folder, torch.bfloat16, max_position_embeddings=512)


@pytest.fixture
def moe(small: Path) -> Iterator[MoE]:
    with opened(small) as moe:
        yield moe


def test_long_contexts(small: Path) -> None:
    """Attention beyond one task."""
    ids = tiny_input_ids(rows=1, length=300)
    with opened(small, kernel="torch") as plain, opened(small) as fast:
        assert_close(words(fast, ids), words(plain, ids))


def test_experts_computed_as_they_arrive_change_nothing(small: Path, moe: MoE) -> None:
    with opened(small, ram_slots=2) as least:
        assert torch.equal(words(least), words(moe))
        assert least.stats().decode.misses > 0


def test_who_watches_changes_nothing(small: Path, moe: MoE) -> None:
    with opened(small, prefetch="gate_lookahead", ram_slots=6) as other:
        with other.recording(logits=True, hidden=True) as recorder:
            found = words(other)
        assert all(block.num_calls == NUM_NEW - 1 for block in blocks_of(other))
        trace = recorder.trace()
    assert torch.equal(found, words(moe))
    assert trace.logits is not None and (abs(trace.logits).sum(axis=-1) > 0).all()
    assert trace.hidden is not None and (abs(trace.hidden).sum(axis=-1) > 0).all()


def test_a_replaced_part_counts(moe: MoE) -> None:
    attention = moe.model.model.layers[1].self_attn
    before = words(moe)
    attention.o_proj = nn.Linear(32, 32, bias=False).bfloat16()
    with torch.no_grad():
        attention.o_proj.weight.zero_()
    assert not torch.equal(words(moe), before)
    assert [block.num_calls for block in blocks_of(moe)] == [10, 5, 10]


def test_a_changed_weight_counts(moe: MoE) -> None:
    words(moe)
    norm = moe.model.model.layers[0].post_attention_layernorm
    norm.weight.data = torch.zeros_like(norm.weight)
    words(moe)
    assert [block.num_calls for block in blocks_of(moe)] == [5, 10, 10]
    norm.weight.data = torch.ones_like(norm.weight)  # in other memory


def flip_sums(layer: Any) -> None:
    layer.mlp.gate.norm_topk_prob = not layer.mlp.gate.norm_topk_prob


CHANGES: dict[str, Callable[[Any], None]] = {
    "scaling": lambda layer: setattr(layer.self_attn, "scaling", 3.0),
    "eps": lambda layer: setattr(layer.input_layernorm, "variance_epsilon", 0.5),
    "top_k": lambda layer: setattr(layer.mlp.gate, "top_k", 1),
    "sums": lambda layer: setattr(
        layer.mlp.gate, "norm_topk_prob", not layer.mlp.gate.norm_topk_prob
    ),
    "training": lambda layer: layer.self_attn.train(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_setting_counts(small: Path, change: str) -> None:
    with opened(small) as fast, opened(small, kernel="torch") as plain:
        for moe in (fast, plain):
            CHANGES[change](moe.model.model.layers[1])
        assert_close(words(fast), words(plain))
        assert [block.num_calls for block in blocks_of(fast)] == [5, 0, 5]


def test_another_attention_function_is_called(moe: MoE) -> None:
    called: list[int] = []

    def attend(module: Any, *args: Any, **kwargs: Any) -> Any:
        called.append(module.layer_idx)
        return sdpa_attention_forward(module, *args, **kwargs)

    AttentionInterface.register("counted", attend)
    moe.model.set_attn_implementation("counted")
    words(moe)
    assert called == [0, 1, 2] * NUM_NEW


def test_hooks_on_all_modules_are_called(moe: MoE) -> None:
    seen: list[str] = []
    handle = register_module_forward_hook(lambda module, *_: seen.append(type(module).__name__))
    words(moe)
    handle.remove()
    assert seen.count("Qwen3MoeAttention") == 3 * NUM_NEW


def test_what_a_module_was_shown_can_be_kept(tmp_path: Path) -> None:
    save_tiny(family("qwen2_moe"), tmp_path, torch.bfloat16)
    with opened(tmp_path) as moe:
        shown: list[torch.Tensor] = []
        moe.model.model.layers[0].mlp.register_forward_hook(
            lambda module, args, output: shown.append(args[0])
        )
        words(moe)
        decode = torch.cat([x.reshape(1, -1) for x in shown[1:]])
        assert len(decode.unique(dim=0)) == NUM_NEW - 1


def test_hooks_are_called(moe: MoE) -> None:
    expected = words(moe)
    router = moe.model.model.layers[2].mlp.gate
    seen: list[torch.Tensor] = []
    handle = router.register_forward_hook(lambda module, args, output: seen.append(args[0]))
    assert_close(words(moe), expected)
    assert len(seen) == NUM_NEW
    handle.remove()
    words(moe)
    assert len(seen) == NUM_NEW


def test_a_patched_function_is_called(moe: MoE) -> None:
    norm = moe.model.model.layers[0].input_layernorm
    norm.forward = lambda x: torch.zeros_like(x)
    words(moe)
    assert blocks_of(moe)[0].num_calls == 0


def test_several_rows_and_padding_stay_with_torch(small: Path) -> None:
    ids = tiny_input_ids(rows=2, length=9)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    with opened(small, max_batch=2) as moe:
        moe.generate(ids, attention_mask=mask, max_new_tokens=4, min_new_tokens=4)
        moe.generate(ids[:1], attention_mask=mask[:1], max_new_tokens=4, min_new_tokens=4)
        assert all(block.num_calls == 0 for block in blocks_of(moe))
        moe.generate(ids[:1], max_new_tokens=4, min_new_tokens=4)
        assert all(block.num_calls == 3 for block in blocks_of(moe))


def test_router_logits_can_be_asked_for(moe: MoE) -> None:
    ids = tiny_input_ids(rows=1, length=5)
    cache = moe.new_cache()
    with torch.inference_mode():
        moe(ids[:, :4], past_key_values=cache)
        said = moe(ids[:, 4:], past_key_values=cache, output_router_logits=True)
    assert len(said.router_logits) == 3
    words(moe)  # the library's hooks stay, but nobody collects any more
    assert all(block.num_calls == NUM_NEW - 1 for block in blocks_of(moe))


def test_a_config_left_from_training_does_not_slow_generation(tmp_path: Path) -> None:
    path = tiny_checkpoint(tmp_path, torch.bfloat16, output_router_logits=True)
    with opened(path) as moe:
        words(moe)
        assert all(block.num_calls == NUM_NEW - 1 for block in blocks_of(moe))
