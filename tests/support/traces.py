"""Small made-up traces."""

import numpy as np

from moe_infinity.tracing.trace import Trace
from moe_infinity.types import ExpertShape


def random_trace(
    num_layers: int,
    num_experts: int,
    top_k: int,
    tokens: int,
    seed: int,
    tokens_per_request: int = 10,
) -> Trace:
    """Decode tokens whose layers keep about half of their experts from token to token."""
    rng = np.random.default_rng(seed)
    ids = np.zeros((tokens, num_layers, top_k), dtype=np.int16)
    for layer in range(num_layers):
        last: list[int] = []
        for token in range(tokens):
            kept = [e for e in last if rng.random() < 0.5]
            others = rng.permutation([e for e in range(num_experts) if e not in kept])
            last = sorted(kept + [int(e) for e in others[: top_k - len(kept)]])
            ids[token, layer] = last
    return trace_of(ids, num_experts, tokens_per_request)


def trace_of(ids: np.ndarray, num_experts: int, tokens_per_request: int = 10) -> Trace:
    """ids [T, L, K] as a decode trace of requests of equal length."""
    tokens, num_layers, top_k = ids.shape
    order = np.arange(tokens, dtype=np.int32)
    return Trace(
        shape=ExpertShape(num_layers, num_experts, top_k, (num_experts,) * num_layers),
        step=order,
        request=order // tokens_per_request,
        position=order % tokens_per_request,
        phase=np.ones(tokens, dtype=np.int8),
        ids=ids.astype(np.int16),
        weights=np.full(ids.shape, 1 / top_k, dtype=np.float32),
        token_ids=np.full(tokens, -1, dtype=np.int32),
        meta={"model": "made up"},
    )
