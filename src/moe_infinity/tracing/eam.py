"""Expert activation matrices: how often each expert of each layer was used, per request.

An iEAM is the count matrix of one pass; an rEAM sums those of a request, prefill and decode apart
(Xue et al., arXiv 2401.14361).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from moe_infinity.tracing.event import Event
from moe_infinity.tracing.trace import PHASES
from moe_infinity.types import ExpertShape


class RequestEAM:
    """The rEAM of one row of a batch. L: layers, E: experts."""

    def __init__(self, shape: ExpertShape) -> None:
        # [prefill/decode, L, E]
        self.counts = np.zeros((2, shape.num_layers, shape.num_experts), dtype=np.float32)

    def add(self, event: Event, counts: NDArray[np.int64]) -> None:
        """counts: [E] tokens of this row routed to each expert."""
        self.counts[PHASES.index(event.phase), event.layer] += counts


def counts_by_row(event: Event) -> dict[int, NDArray[np.int64]]:
    """[E] tokens routed to each expert, for every row of the batch that has tokens."""
    if event.request_rows.size == 0:
        return {}
    first = int(event.request_rows[0])
    if (event.request_rows == first).all():
        return {first: event.counts}
    return {
        int(row): _count(event.top_k_index[event.request_rows == row], event.num_experts)
        for row in np.unique(event.request_rows)
    }


def _count(ids: NDArray[np.int64], num_experts: int) -> NDArray[np.int64]:
    flat = ids.ravel()
    return np.bincount(flat[(flat >= 0) & (flat < num_experts)], minlength=num_experts)
