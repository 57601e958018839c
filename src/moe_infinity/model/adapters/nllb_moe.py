"""NLLB-MoE (NLLB Team 2022): top-2 routing, tokens beyond capacity are dropped."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from moe_infinity.model.adapters._named_experts import NamedExpertsAdapter


class Adapter(NamedExpertsAdapter):
    """The router hands over the top-1 mask and [T, E] combining weights, zero where an expert was
    not chosen or is full; all that is not zero is computed.

    That is the model as published and as transformers 4 runs it. The experts loop of transformers
    5 (seen up to 5.23) takes the mask's zeros and ones for expert numbers, so that only experts 0
    and 1 are ever run; this adapter does not follow it there.
    """

    up, down = "fc1", "fc2"
    has_bias = True
    top_k = 2

    def select(self, *routing: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        _, combining = routing
        weights, index = combining.topk(min(self.top_k, combining.shape[-1]), dim=-1)  # [T, 2]
        return index.masked_fill(weights == 0, -1), weights

    def post(self, module: Any) -> Callable[[torch.Tensor], torch.Tensor] | None:
        """Outside training, outputs are scaled by what token dropout would have kept."""
        kept = 1 - module.moe_token_dropout
        return (lambda out: out * kept) if module.moe_token_dropout > 0 else None
