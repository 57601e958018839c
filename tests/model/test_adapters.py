"""Adapters: Switch and NLLB-MoE compute what stock transformers computes, through the cache."""

import importlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import transformers

from moe_infinity import MoE
from moe_infinity.checkpoint.safetensors import SafetensorsCheckpoint
from moe_infinity.errors import ConfigError, NotAnMoEError, UnsupportedModelError
from moe_infinity.model import adapters
from moe_infinity.model.adapters import find_adapter
from moe_infinity.model.adapters._interface import InterfaceAdapter
from moe_infinity.model.loading import examine
from support.encoder_decoder import (
    FAMILIES,
    VOCAB,
    Family,
    load_stock,
    logits,
    nllb,
    padded,
    save,
    switch,
)

RELATIVE = 1e-5  # of the largest logit, in fp32

Saved = Callable[..., Path]


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> Family:
    return FAMILIES[request.param]


@pytest.fixture
def saved(tmp_path: Path, family: Family) -> Saved:
    return lambda dtype=torch.float32, **overrides: save(family.build(**overrides), tmp_path, dtype)


def open_moe(path: Path, **options: object) -> MoE:
    return MoE(path, ram="4GiB", max_batch=8, **options)


def assert_equals_stock(got: torch.Tensor, stock: torch.Tensor, relative: float = RELATIVE) -> None:
    difference = ((got - stock).abs().max() / stock.abs().max()).item()
    assert difference <= relative, f"differs by {difference:.1e} of the largest logit"


# ---- the same numbers ------------------------------------------------------------------------


def test_logits_equal_stock_whatever_the_cache(family: Family, saved: Saved) -> None:
    path = saved()
    stock = load_stock(path)
    inputs = padded(stock)
    expected, first = logits(stock, inputs), None
    for policy, slots, threads in (
        ("lru", family.top_k, 1),
        ("lru", None, 8),
        ("next_use", family.top_k, 8),
        ("next_use", None, 1),
    ):
        options = {"policy": policy, "ram_slots": slots, "num_read_threads": threads}
        with open_moe(path, **options) as moe:
            assert moe.plan.num_slots == (slots or moe.plan.experts_total)
            cold, warm = logits(moe, inputs), logits(moe, inputs)
            moe.check_integrity()
        first = cold if first is None else first
        assert torch.equal(first, cold) and torch.equal(first, warm), options
    assert_equals_stock(first, expected)


@pytest.mark.parametrize("side", ["right", "left"])
def test_dropped_tokens_are_routed_to_nothing(family: Family, saved: Saved, side: str) -> None:
    path = saved(**family.tight)
    stock = load_stock(path)
    inputs = padded(stock, side)
    roomy = load_stock(path, **family.roomy)
    expected = logits(stock, inputs)
    assert not torch.allclose(expected, logits(roomy, inputs)), "nothing was dropped"
    with open_moe(path, ram_slots=family.top_k) as moe:
        assert_equals_stock(logits(moe, inputs), expected)


def test_padding_takes_room_where_it_does_in_stock(family: Family, saved: Saved) -> None:
    path = saved(**family.tight, **family.crowded)
    stock = load_stock(path)
    with open_moe(path) as moe:
        for num_padding in (5, 6):
            inputs = padded(stock, "left", num_padding)
            assert_equals_stock(logits(moe, inputs), logits(stock, inputs))


def test_a_layer_may_drop_every_token(tmp_path: Path) -> None:
    path = save(switch(expert_capacity=0), tmp_path, torch.float32)
    stock = load_stock(path)
    with open_moe(path) as moe:
        assert_equals_stock(logits(moe, padded(stock)), logits(stock, padded(stock)))
        assert moe.stats().demand_bytes == 0


def test_bf16_checkpoints(family: Family, saved: Saved) -> None:
    path = saved(torch.bfloat16)
    stock = load_stock(path, torch.bfloat16)
    inputs = padded(stock)
    with open_moe(path, ram_slots=family.top_k) as small, open_moe(path) as large:
        got = logits(small, inputs)
        assert torch.equal(got, logits(large, inputs))
    assert_equals_stock(got.float(), logits(stock, inputs).float(), relative=0.03)


def test_stock_nllb_takes_its_routing_mask_for_expert_numbers(tmp_path: Path) -> None:
    """Why `load_stock` repairs its loop. If this fails, transformers did: drop the repair."""
    used = set()
    model = nllb().eval()
    for name, module in model.named_modules():
        if name.rpartition(".")[2].startswith("expert_"):
            module.register_forward_hook(lambda *_, name=name: used.add(name.rpartition(".")[2]))
    logits(model, padded(model))
    assert used == {"expert_0", "expert_1"}


# ---- loading ---------------------------------------------------------------------------------


def test_no_expert_is_read_by_the_loader(
    family: Family, saved: Saved, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, read = saved(), []
    read_tensor = SafetensorsCheckpoint.read_tensor

    def spy(self: SafetensorsCheckpoint, entry: object, into: memoryview) -> None:
        read.append(entry.name)
        read_tensor(self, entry, into)

    monkeypatch.setattr(SafetensorsCheckpoint, "read_tensor", spy)
    with open_moe(path) as moe:
        stored = set(moe.checkpoint.tensors)
        assert not any(p.is_meta for p in moe.model.parameters())
    assert set(read) == {name for name in stored if ".experts." not in name}


def test_an_expert_is_one_read_of_its_own_bytes(family: Family, saved: Saved) -> None:
    checkpoint = SafetensorsCheckpoint(saved(num_experts=12))  # expert_10 comes after expert_9
    anatomy = examine(checkpoint, None)
    assert anatomy.shape.experts_per_layer == (12,) * anatomy.shape.num_layers
    assert anatomy.shape.top_k == family.top_k
    for key, spec in anatomy.specs.items():
        prefix = f"{anatomy.experts[key.layer].name}.expert_{key.expert}."
        own = [e for name, e in checkpoint.tensors.items() if name.startswith(prefix)]
        assert spec.weight_bytes == sum(e.num_bytes for e in own)
        (only,) = spec.ranges
        assert only.file_offset <= min(e.offset for e in own)
        assert only.file_offset + only.needed_bytes == max(e.offset + e.num_bytes for e in own)
    checkpoint.close()


# ---- lookup ----------------------------------------------------------------------------------


def test_adapters_are_found_by_model_type() -> None:
    assert type(find_adapter("nllb-moe")).__module__.endswith(".nllb_moe")
    assert type(find_adapter("switch_transformers")).__module__.endswith(".switch_transformers")
    for name in ("qwen3_moe", "base", "_interface"):
        assert type(find_adapter(name)) is InterfaceAdapter


def test_an_import_error_inside_an_adapter_is_told_with_its_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken_family.py").write_text("import no_such_module_at_all")
    monkeypatch.setattr(adapters, "__path__", [*adapters.__path__, str(tmp_path)])
    importlib.invalidate_caches()
    with pytest.raises(ConfigError, match=r"no_such_module_at_all.*broken_family\.py:1"):
        find_adapter("broken-family")


SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": VOCAB, "intermediate_size": 48}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}


def _unsupported() -> Iterator[object]:
    dbrx = {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 32, "vocab_size": VOCAB}
    ffn = {"hidden_size": 32, "ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2}
    yield transformers.DbrxConfig(
        **dbrx, ffn_config=ffn, attn_config={"kv_n_heads": 2, "rope_theta": 1e4}
    )
    yield transformers.JetMoeConfig(**SMALL, kv_channels=8, num_key_value_heads=2)
    yield transformers.Llama4TextConfig(**SMALL, **HEADS, head_dim=8, num_local_experts=4)


@pytest.mark.parametrize("config", _unsupported(), ids=lambda config: config.model_type)
def test_moe_families_without_adapter_are_named(config: object, tmp_path: Path) -> None:
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match=repr(config.model_type)):
        MoE(tmp_path)


def test_dense_models_are_named(tmp_path: Path) -> None:
    config = transformers.T5Config(d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4)
    transformers.T5ForConditionalGeneration(config).save_pretrained(tmp_path)
    with pytest.raises(NotAnMoEError, match="'t5'"):
        MoE(tmp_path)
