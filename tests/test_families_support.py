"""The tiny models of every family are what other tests take them for; only stock is involved."""

from pathlib import Path

import pytest
import torch

from support import families as tiny

# Per-expert tensors; transposed, biased, interleaved; no gate; two experts modules a layer.
NAMES = ("qwen3_moe", "gpt_oss", "nemotron_h", "ernie4_5_vl_moe")
# Measured over all families in float32: 1e-7 to 6e-5.
FLOAT32_SPREAD = 1e-3


@pytest.fixture(params=NAMES)
def item(request: pytest.FixtureRequest) -> tiny.Family:
    return tiny.family(request.param)


def test_every_modelling_file_has_a_family() -> None:
    items = tiny.families()
    assert {item.module for item in items} == tiny.modelling_files()
    assert len({item.name for item in items}) == len(items)


def test_coverage() -> None:
    buildable = {f.module for f in tiny.families() if f.name not in tiny.NOT_INSTANTIABLE}
    assert len(buildable) >= 55


def test_reasons_name_known_families() -> None:
    known = {item.name for item in tiny.families() + tiny.wrapped_families()}
    assert tiny.NOT_INSTANTIABLE.keys() | tiny.ROUND_TRIP_FAILS.keys() <= known


def test_unknown_family_lists_the_known() -> None:
    with pytest.raises(KeyError, match="mixtral"):
        tiny.family("nonesuch")


def test_tiny_model_runs(item: tiny.Family) -> None:
    model = tiny.build_tiny(item)
    assert sum(p.numel() for p in model.parameters()) < 2_000_000
    assert len(tiny.experts_modules(model)) >= 2
    output = tiny.logits(model, tiny.tiny_input_ids())
    assert output.isfinite().all()
    assert output.std() > 0.1


def test_special_tokens_lie_outside_the_test_ids(item: tiny.Family) -> None:
    for config in _configs(tiny.tiny_config(item)):
        for name, value in vars(config).items():
            if tiny.SPECIAL_TOKEN.fullmatch(name) and value is not None:
                assert not tiny.FIRST_TEXT_ID <= value < tiny.LAST_TEXT_ID, (name, value)
                assert value < tiny.VOCAB_SIZE, (name, value)


def test_seed_decides_the_weights(item: tiny.Family) -> None:
    input_ids = tiny.tiny_input_ids()
    first, again, other = (
        tiny.logits(tiny.build_tiny(item, seed), input_ids) for seed in (0, 0, 1)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_every_called_layer_of_experts_matters(item: tiny.Family) -> None:
    model, input_ids = tiny.build_tiny(item), tiny.tiny_input_ids()
    with tiny.record_routing(model) as routing:
        before = tiny.logits(model, input_ids)
    called = [module for name, module in tiny.experts_modules(model).items() if routing[name]]
    assert len(called) >= 2
    for module in called:
        kept = module.down_proj.detach().clone()
        module.down_proj.data.zero_()
        assert (tiny.logits(model, input_ids) - before).abs().max() > 0.01
        module.down_proj.data.copy_(kept)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_recorded_routing_replays(item: tiny.Family, dtype: torch.dtype) -> None:
    model, input_ids = tiny.build_tiny(item, dtype=dtype), tiny.tiny_input_ids()
    with tiny.record_routing(model) as routing:
        before = tiny.logits(model, input_ids)
    with tiny.force_routing(model, routing):
        assert torch.equal(tiny.logits(model, input_ids), before)
    with tiny.force_routing(model, _next_expert(model, routing)):
        assert not torch.equal(tiny.logits(model, input_ids), before)
    assert torch.equal(tiny.logits(model, input_ids), before)  # nothing stays patched


def test_replay_notices_other_calls(item: tiny.Family) -> None:
    model, input_ids = tiny.build_tiny(item), tiny.tiny_input_ids()
    with tiny.record_routing(model) as routing:
        tiny.logits(model, input_ids)
    with pytest.raises(AssertionError, match="did not happen"), tiny.force_routing(model, routing):
        pass
    with pytest.raises(AssertionError, match="more than"), tiny.force_routing(model, routing):
        tiny.logits(model, input_ids)
        tiny.logits(model, input_ids)


def test_recording_and_replay_nest(item: tiny.Family) -> None:
    model, input_ids = tiny.build_tiny(item), tiny.tiny_input_ids()
    with tiny.record_routing(model) as routing:
        tiny.logits(model, input_ids)
    other = _next_expert(model, routing)
    # The later context is the nearer to the caller: the recorder sees what the replay passes on.
    with tiny.record_routing(model) as seen, tiny.force_routing(model, other):
        tiny.logits(model, input_ids)
    for name, calls in other.items():
        pairs = zip(calls, seen[name], strict=True)
        assert all(torch.equal(given, got) for (given, _), (got, _) in pairs)
    assert not any("forward" in vars(module) for module in tiny.experts_modules(model).values())


def test_stock_spread_is_rounding_only(item: tiny.Family) -> None:
    model = tiny.build_tiny(item)
    before = model.get_experts_implementation()
    assert 0 < tiny.stock_spread(model, tiny.tiny_input_ids()) < FLOAT32_SPREAD
    assert model.get_experts_implementation() == before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_round_trip_through_stock(item: tiny.Family, dtype: torch.dtype, tmp_path: Path) -> None:
    reload = tiny.reload_check(item, tmp_path, dtype)
    assert reload.exact, reload


def _configs(config: tiny.PreTrainedConfig) -> list[tiny.PreTrainedConfig]:
    subs = [getattr(config, name) for name in config.sub_configs]
    return [config, *(found for sub in subs if sub is not None for found in _configs(sub))]


def _next_expert(model: tiny.PreTrainedModel, routing: tiny.Routing) -> tiny.Routing:
    modules = tiny.experts_modules(model)
    return {
        name: [((index + 1) % modules[name].num_experts, weights) for index, weights in calls]
        for name, calls in routing.items()
    }
