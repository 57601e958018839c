"""Switch Transformers (Fedus et al. 2021): top-1 routing, tokens beyond capacity are dropped."""

from __future__ import annotations

import torch

from moe_infinity.model.adapters._named_experts import NamedExpertsAdapter


class Adapter(NamedExpertsAdapter):
    """The router hands over [T, 1, E] one-hot rows, all zero for a dropped token, and [T, 1]
    probabilities; a dropped token gets nothing from its layer."""

    up, down = "wi", "wo"
    has_bias = False
    top_k = 1

    def select(self, *routing: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        dispatch, weights = routing
        index = dispatch.argmax(dim=-1)  # [T, 1]
        return index.masked_fill(dispatch.sum(dim=-1) == 0, -1), weights
