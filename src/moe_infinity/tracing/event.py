"""What happened in one MoE layer of one step. Knows nothing of caches or models."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from moe_infinity.types import ExpertKey, Phase

_Value = TypeVar("_Value")


class _once(cached_property[_Value]):
    """Without the lock of Python 3.11, which takes longer than what is found here; to find it twice
    does no harm."""

    def __get__(self, event: Any, owner: Any = None) -> Any:
        if event is None:
            return self
        found = event.__dict__[self.attrname] = self.func(event)
        return found


@dataclass(frozen=True)
class Event:
    """Routing of one MoE layer in one forward pass; padding tokens are not in it.

    T: tokens, K: top-k, E: experts, H: hidden size. Where someone asked for them, router_logits
    and router_input are there too; they are None otherwise.
    """

    step: int  # forward passes since the model was opened
    phase: Phase
    layer: int
    request_rows: NDArray[np.int64]  # [T] which row of the batch a token belongs to
    top_k_index: NDArray[np.int64]  # [T, K]; an index outside 0..E-1 means no expert
    top_k_weights: NDArray[np.float32]  # [T, K]
    num_experts: int
    router_logits: NDArray[np.float32] | None = None  # [T, E]
    router_input: NDArray[np.float32] | None = None  # [T, H]

    @_once
    def counts(self) -> NDArray[np.int64]:
        """[E] tokens routed to each expert."""
        flat = self.top_k_index.ravel()
        flat = flat[(flat >= 0) & (flat < self.num_experts)]
        return np.bincount(flat, minlength=self.num_experts)

    @_once
    def experts(self) -> NDArray[np.int64]:
        """Distinct experts, ascending."""
        if len(self.top_k_index) == 1:  # decode: a few numbers need no counting
            ids = set(self.top_k_index[0].tolist())
            return np.array(sorted(i for i in ids if 0 <= i < self.num_experts), dtype=np.int64)
        return np.flatnonzero(self.counts)

    @_once
    def weights(self) -> NDArray[np.float64]:
        """[E] router weight each expert received, summed over tokens."""
        flat = self.top_k_index.ravel()
        used = (flat >= 0) & (flat < self.num_experts)
        weights = self.top_k_weights.ravel()[used]
        counts = np.bincount(flat[used], weights=weights, minlength=self.num_experts)
        return counts.astype(np.float64)

    @_once
    def keys(self) -> list[ExpertKey]:
        return [ExpertKey(self.layer, expert) for expert in self.experts.tolist()]
