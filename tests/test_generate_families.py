"""Generating, with prompts in chunks, says what stock says; for caches of every kind."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from moe_infinity import MoE, engine
from support.families import build_tiny, family, save_tiny, tiny_input_ids

# Plain, sliding, latent, recurrent and indexed caches; one that only takes its own (minimax), one
# that forgets between chunks (jamba).
NAMES = ("qwen3_moe", "gpt_oss", "deepseek_v3", "qwen3_next", "jamba", "minimax", "lfm2_moe")
NEW_TOKENS = 6


@pytest.mark.parametrize("name", NAMES)
def test_chunked_prompts_generate_what_stock_does(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "PREFILL_CHUNK_TOKENS", 5)
    item = family(name)
    save_tiny(item, tmp_path)
    ids = tiny_input_ids(rows=1, length=13)
    stock = build_tiny(item)
    greedy = {"do_sample": False, "max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS}
    expected = stock.generate(ids, attention_mask=torch.ones_like(ids), **greedy)
    with MoE(tmp_path, ram="8GiB", ram_slots=12) as moe:
        assert torch.equal(moe.generate(ids, **greedy), expected)
        assert torch.equal(moe.generate(ids, **greedy), expected)
        moe.check_integrity()


def test_a_batch_padded_with_the_pad_token_needs_no_mask(tmp_path: Path) -> None:
    item = family("olmoe")
    save_tiny(item, tmp_path)
    with MoE(tmp_path, ram="8GiB", max_batch=2) as moe:
        pad = moe.model.generation_config.pad_token_id
        ids = tiny_input_ids(rows=2, length=9)
        ids[1, :4] = pad
        mask = (ids != pad).long()
        moe.model.generation_config.eos_token_id = None
        greedy = {"do_sample": False, "max_new_tokens": NEW_TOKENS}
        masked = moe.generate(ids, attention_mask=mask, **greedy)
        assert torch.equal(moe.generate(ids, **greedy), masked)
