"""Every family of the experts interface: a few always, in the type that models are published in,
and three in float32, which tells best whether numbers agree; all in both with ``-m slow``."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from support.agreement import compare
from support.families import families, family

# One of each kind of layout: per expert, fused and transposed with biases and interleaving, without
# gate, two sizes of experts, post-expert norm, tensors stacked under other names, custom gates.
ALWAYS = (
    "qwen3_moe",
    "gpt_oss",
    "nemotron_h",
    "ernie4_5_vl_moe",
    "muse_spark",
    "granitemoe",
    "inkling2",
    "deepseek_v3",
)
# Named errors, for reasons that docs/families.md gives.
REFUSED = ("diffusion_gemma", "qwen3_omni_moe:Qwen3OmniMoeTalkerTextExperts")
REST = [item.name for item in families() if item.name not in (*ALWAYS, *REFUSED)]
EVERYWHERE = [(name, dtype) for name in REST for dtype in (torch.bfloat16, torch.float32)]
EXACTLY = ("qwen3_moe", "gpt_oss", "deepseek_v3")
EVERYWHERE += [(name, torch.float32) for name in ALWAYS if name not in EXACTLY]


@pytest.mark.parametrize("name", ALWAYS)
def test_agrees_with_stock(name: str, tmp_path: Path) -> None:
    _check(name, torch.bfloat16, tmp_path)


@pytest.mark.parametrize("name", EXACTLY)
def test_agrees_with_stock_in_float32(name: str, tmp_path: Path) -> None:
    _check(name, torch.float32, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name, dtype", EVERYWHERE, ids=str)
def test_agrees_with_stock_everywhere(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    _check(name, dtype, tmp_path)


def _check(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    found = compare(family(name), tmp_path, dtype)
    assert found.is_within, found
    assert found.bit_identical, found
