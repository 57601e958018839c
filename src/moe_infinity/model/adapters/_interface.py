"""The default adapter: any family whose experts go through transformers' experts interface."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from moe_infinity.errors import UnsupportedModelError
from moe_infinity.kernels.base import ExpertMath
from moe_infinity.model.adapters.base import Adapter, ExpertsForward, ExpertsModule, leave_out

IMPLEMENTATION = "moe_infinity"
# What transformers' experts decorator sets on every module it wraps.
_FLAGS = ("has_gate", "has_bias", "is_transposed", "is_concatenated")


class InterfaceAdapter(Adapter):
    """A module counts if the interface dispatches it and its parameters are stacked by expert."""

    def find(self, model: nn.Module) -> list[ExpertsModule]:
        found = []
        for name, module in model.named_modules():
            if not all(hasattr(module, flag) for flag in _FLAGS):
                continue
            experts = ExpertsModule.of(name, module)
            if len({shape[0] for shape in experts.params.values()}) != 1:
                raise UnsupportedModelError(
                    f"{name}: got expert parameters {dict(experts.params)}, expected all stacked "
                    f"by expert"
                )
            found.append(experts)
        return found

    def strip(self, module: nn.Module) -> None:
        leave_out(module, [name for name, _ in module.named_parameters(recurse=False)])

    def math(self, module: Any) -> ExpertMath:
        """Read off the module's flags and its own functions."""
        has_post = getattr(module, "has_post_expert_norm", False)
        return ExpertMath(
            has_gate=module.has_gate,
            has_bias=module.has_bias,
            is_transposed=module.is_transposed,
            gate=module._apply_gate if module.has_gate else module.act_fn,
            post=module.post_expert_norm if has_post else None,
            is_interleaved=module.has_gate and not module.is_concatenated,
        )

    def attach(self, module: nn.Module, forward: ExpertsForward) -> None:
        module._moe_infinity = forward  # type: ignore[assignment]


def register() -> None:
    """Make the function known to transformers; registering again changes nothing."""
    ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, _experts_forward)


def _experts_forward(
    self: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    with torch.no_grad():
        forward: ExpertsForward = self._moe_infinity
        return forward(hidden_states, top_k_index, top_k_weights)
