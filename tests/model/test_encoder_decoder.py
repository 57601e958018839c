"""Encoder-decoder models through the engine: generate, phases, contexts, arithmetic."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers

from moe_infinity import MoE, engine
from moe_infinity.errors import PlanExceededError
from moe_infinity.model.kv_shape import KvShape
from moe_infinity.model.skeleton import build_meta
from moe_infinity.model.taps import Step, StepTap
from support.encoder_decoder import (
    FAMILIES,
    VOCAB,
    Family,
    load_stock,
    logits,
    padded,
    save,
    switch,
    tokens,
)

Saved = Callable[..., Path]


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> Family:
    return FAMILIES[request.param]


@pytest.fixture
def saved(tmp_path: Path, family: Family) -> Saved:
    return lambda dtype=torch.float32, **overrides: save(family.build(**overrides), tmp_path, dtype)


def open_moe(path: Path, **options: object) -> MoE:
    return MoE(path, ram="4GiB", max_batch=8, **options)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"decoder_input_ids": tokens(2, 3)}])
def test_generate_equals_stock(family: Family, saved: Saved, options: dict[str, object]) -> None:
    path = saved()
    stock = load_stock(path)
    inputs = padded(stock)
    expected = stock.generate(**inputs, max_new_tokens=9, do_sample=False, **options)
    with open_moe(path, ram_slots=family.top_k) as moe:
        for _ in range(2):
            got = moe.generate(**inputs, max_new_tokens=9, do_sample=False, **options)
            assert torch.equal(got, expected)


def test_the_encoder_is_prefill_and_the_decoder_decode(family: Family, saved: Saved) -> None:
    with open_moe(saved()) as moe:
        for length in (1, 6):
            ids = tokens(1, length)
            new = moe.generate(ids, max_new_tokens=5, min_new_tokens=5).shape[1] - 1
            stats = moe.stats()
            assert (stats.prefill.num_tokens, stats.decode.num_tokens) == (length, new)
            assert stats.prefill.wall_s < stats.ttft_s


def test_a_long_prompt_is_not_chunked(
    family: Family, saved: Saved, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "PREFILL_CHUNK_TOKENS", 4)
    path = saved()
    expected = load_stock(path).generate(tokens(1, 11), max_new_tokens=5)
    with open_moe(path) as moe:
        assert torch.equal(moe.generate(tokens(1, 11), max_new_tokens=5), expected)


def test_each_half_is_a_step_with_its_own_padding() -> None:
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "vocab_size": VOCAB}
    model = transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes)).eval()
    steps: list[Step] = []
    tap = StepTap(model, steps.append, lambda: None)
    inputs = padded(model)
    logits(model, inputs)
    encoder, decoder = steps
    assert (encoder.is_encoder, encoder.phase, encoder.length) == (True, "prefill", 9)
    assert encoder.real_tokens(18).sum() == inputs["attention_mask"].sum()
    assert (decoder.is_encoder, decoder.phase, decoder.length) == (False, "prefill", 7)
    assert decoder.real_tokens(14) is None
    model(tokens(1, 1), decoder_input_ids=tokens(1, 1))
    assert [step.phase for step in steps[2:]] == ["prefill", "decode"]
    tap.close()


def test_a_cache_goes_from_call_to_call(family: Family, saved: Saved) -> None:
    with open_moe(saved()) as moe:
        ids, decoded = tokens(1, 6), tokens(1, 5, seed=1)
        whole = moe(ids, decoder_input_ids=decoded).logits
        cache = moe.new_cache()
        parts = [
            moe(ids, decoder_input_ids=part, past_key_values=cache).logits
            for part in decoded.split([3, 2], dim=1)
        ]
        torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=1e-4, atol=1e-4)


def test_encoder_and_decoder_have_a_context_each(family: Family, saved: Saved) -> None:
    with open_moe(saved(), max_context=10) as moe:
        assert moe.generate(tokens(1, 10), max_new_tokens=9, min_new_tokens=9).shape[1] == 10
        for ids, new in ((tokens(1, 11), 2), (tokens(1, 3), 10)):
            with pytest.raises(PlanExceededError, match="11 tokens"):
                moe.generate(ids, max_new_tokens=new)
        with pytest.raises(PlanExceededError, match="decoder_input_ids"):
            moe(tokens(1, 3), decoder_input_ids=tokens(1, 11))


def test_a_decoder_may_have_more_layers_than_its_encoder(tmp_path: Path) -> None:
    path = save(switch(num_decoder_layers=6), tmp_path, torch.float32)
    expected = load_stock(path).generate(tokens(1, 6), max_new_tokens=6, use_cache=False)
    with open_moe(path) as moe:
        assert torch.equal(moe.generate(tokens(1, 6), max_new_tokens=6), expected)


def test_kv_arithmetic_counts_both_attentions_of_the_decoder(family: Family) -> None:
    meta = build_meta(family.build().config)
    assert KvShape.of(meta) == KvShape(per_token=4 * (2 + 2) * 32, windows=(), fixed=0)
