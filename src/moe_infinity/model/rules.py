"""Where an option may bend the model: which experts are chosen.

The default changes nothing and costs nothing. A rule that can change logits names itself lossy.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable

import torch


class RoutingRule(ABC):
    """May replace a router's selection before anything is looked up."""

    lossy = True

    @abstractmethod
    def select(
        self, layer: int, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """[T, K] indices and weights in, the same shapes out."""


class KeepRouting(RoutingRule):
    """The router's word stands."""

    lossy = False

    def select(
        self, layer: int, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return top_k_index, top_k_weights


def lossy_rules(rules: Iterable[RoutingRule]) -> tuple[str, ...]:
    """Names of the rules that can change logits, for reports."""
    return tuple(type(rule).__name__ for rule in rules if rule.lossy)
