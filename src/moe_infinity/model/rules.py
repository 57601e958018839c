"""Points where an option may bend the model: which experts are chosen, what a miss becomes.

The defaults change nothing and cost nothing. A rule that can change logits names itself lossy.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable

import torch

from moe_infinity.tracing.event import Event
from moe_infinity.types import ExpertKey


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


class MissRule(ABC):
    """Says which missing experts of an event are loaded; the others are left out of the sum."""

    lossy = True

    @abstractmethod
    def load(self, event: Event, missing: list[ExpertKey]) -> list[ExpertKey]:
        """The missing experts to load."""


class LoadMisses(MissRule):
    """Every missing expert is loaded."""

    lossy = False

    def load(self, event: Event, missing: list[ExpertKey]) -> list[ExpertKey]:
        return missing


def lossy_rules(rules: Iterable[RoutingRule | MissRule]) -> tuple[str, ...]:
    """Names of the rules that can change logits, for reports."""
    return tuple(type(rule).__name__ for rule in rules if rule.lossy)
