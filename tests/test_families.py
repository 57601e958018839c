"""Every family of the experts interface: a few always, all of them with ``-m slow``."""

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


@pytest.mark.parametrize("name", ALWAYS)
def test_agrees_with_stock(name: str, tmp_path: Path) -> None:
    _check(name, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", REST)
def test_agrees_with_stock_everywhere(name: str, tmp_path: Path) -> None:
    _check(name, tmp_path)


def _check(name: str, tmp_path: Path) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        found = compare(family(name), tmp_path, dtype)
        assert found.is_within, found
        assert found.bit_identical, found
