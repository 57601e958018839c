"""Families whose experts are modules ``expert_0``, ``expert_1``... of a ModuleDict."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers.core_model_loading import MergeModulelist, WeightConverter

from moe_infinity.kernels.base import ExpertMath
from moe_infinity.model.adapters.base import Adapter, ExpertsForward, ExpertsModule, leave_out

_FIRST = "expert_0"


class NamedExpertsAdapter(Adapter):
    """Shows the two Linears of each expert as stacked ``up_proj`` and ``down_proj`` [E, out, in].

    up, down: what the family calls the two. T: tokens, K: top-k, E: experts.
    """

    up: str
    down: str
    has_bias: bool
    routes_padding = True  # it counts towards capacity, unless the family's router leaves it out

    def __init__(self) -> None:
        kinds = ("weight", "bias") if self.has_bias else ("weight",)
        self.converters = tuple(
            WeightConverter(
                source_patterns=f"experts.*.{theirs}.{kind}",
                target_patterns=f"experts.{_param_name(ours, kind)}",
                operations=[MergeModulelist(dim=0)],
            )
            for ours, theirs in self._linears.items()
            for kind in kinds
        )

    @abstractmethod
    def select(self, *routing: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """top_k_index (-1: no expert) and top_k_weights [T, K], of what the model's own router
        hands to its experts beside the hidden states."""

    def post(self, module: Any) -> Callable[[torch.Tensor], torch.Tensor] | None:
        """What is done to an expert's output [T, H] before it is weighted, if anything."""
        return None

    def find(self, model: nn.Module) -> list[ExpertsModule]:
        found = []
        for name, module in list(model.named_modules()):
            if isinstance(module, nn.ModuleDict) and _FIRST in module:
                if not module._parameters:
                    self._stack(module)
                found.append(ExpertsModule.of(name, module))
        return found

    def strip(self, module: Any) -> None:
        """Keeps one bare expert under all the names: for its activation, and for the library's
        initialisation, which goes through the names."""
        bare = module[_FIRST]
        for part in bare.modules():
            leave_out(part, [name for name, _ in part.named_parameters(recurse=False)])
        for name in _experts_of(module):
            module[name] = bare

    def math(self, module: Any) -> ExpertMath:
        return ExpertMath(
            has_gate=False,
            has_bias=self.has_bias,
            is_transposed=False,
            gate=module[_FIRST].act,
            post=self.post(module),
        )

    def attach(self, module: nn.Module, forward: ExpertsForward) -> None:
        def experts_forward(hidden: torch.Tensor, *routing: torch.Tensor) -> torch.Tensor:
            with torch.no_grad():
                return forward(hidden, *self.select(*routing))

        module.forward = experts_forward

    @property
    def _linears(self) -> dict[str, str]:
        return {"up_proj": self.up, "down_proj": self.down}

    def _stack(self, module: Any) -> None:
        """Give a meta module one parameter per kind, [E, ...], in place of each expert's own."""
        for ours, theirs in self._linears.items():
            for kind, single in getattr(module[_FIRST], theirs).named_parameters():
                stacked = single.new_empty((len(_experts_of(module)), *single.shape))
                module.register_parameter(_param_name(ours, kind), nn.Parameter(stacked))
        self.strip(module)


def _experts_of(module: Any) -> list[str]:
    return [name for name in module if name.startswith("expert_")]  # it may hold a dropout, too


def _param_name(linear: str, kind: str) -> str:
    return linear if kind == "weight" else f"{linear}_{kind}"
