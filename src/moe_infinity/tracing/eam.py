"""Rows of expert activation matrices (EAM), apart for the requests of a batch.

An iEAM is the count matrix of one pass, filled row by row; an rEAM sums those of a request, prefill
and decode apart (Xue et al., arXiv 2401.14361). ``collection.Query`` keeps the running request's.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from moe_infinity.tracing.event import Event


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
