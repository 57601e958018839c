"""Measures of a recorded routing: use, reuse, segment coverage, concentration, domains.

Plain numpy on a Trace; knows nothing of caches. T: tokens, L: MoE layers, E: experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moe_infinity.tracing.trace import Trace
from moe_infinity.types import ExpertShape

SEGMENT_TOKENS = (4, 16, 64)  # a few words, a sentence, a paragraph


@dataclass(frozen=True)
class Coverage:
    """Share of a segment's activations that its best fixed set of experts covers, all layers.

    shuffled: the same with the tokens in random order, what popularity alone gives.
    """

    segment_tokens: int
    set_size: int
    covered: float
    shuffled: float


@dataclass(frozen=True)
class Domains:
    """distance[i, j]: mean over layers of the total variation between two domains' uses, 0 to 1.

    All are between halves of domains; the diagonal, between a domain's own two, is what prompts of
    one domain differ by: the noise floor.
    """

    names: tuple[str, ...]
    distance: NDArray[np.float64]  # [D, D]

    @property
    def within(self) -> float:
        return float(np.diag(self.distance).mean())

    @property
    def between(self) -> float:
        return float(self.distance[~np.eye(len(self.names), dtype=bool)].mean())


def used_experts(trace: Trace, layer: int) -> NDArray[np.bool_]:
    """[T, E] which experts each token used in ``layer``."""
    used = np.zeros((trace.num_tokens, trace.shape.num_experts + 1), dtype=bool)
    np.put_along_axis(used, trace.ids[:, layer].astype(np.int64), True, axis=1)
    return used[:, :-1]  # -1, no expert, went to the last column


def use_shares(trace: Trace) -> NDArray[np.float64]:
    """[L, E] share of the tokens, of those for which the layer ran, that used the expert."""
    shares = np.zeros((trace.shape.num_layers, trace.shape.num_experts))
    for layer in range(trace.shape.num_layers):
        used = used_experts(trace, layer)
        shares[layer] = used.sum(axis=0) / max(1, used.any(axis=1).sum())
    return shares


def neighbour_reuse(trace: Trace) -> NDArray[np.float64]:
    """[L] mean share of a token's experts that its request's token before used; nan: no pairs."""
    order = np.argsort(trace.request, kind="stable")
    same = trace.request[order][1:] == trace.request[order][:-1]
    before, after = order[:-1][same], order[1:][same]
    reuse = np.full(trace.shape.num_layers, np.nan)
    for layer in range(trace.shape.num_layers):
        used = used_experts(trace, layer)
        ran = used[before].any(axis=1) & used[after].any(axis=1)
        if ran.any():
            first, second = used[before[ran]], used[after[ran]]
            reuse[layer] = ((first & second).sum(axis=1) / second.sum(axis=1)).mean()
    return reuse


def segment_coverage(
    trace: Trace, segment_tokens: Sequence[int] = SEGMENT_TOKENS, seed: int = 0
) -> tuple[Coverage, ...]:
    """How well k, and 2k, experts per layer that stay put serve a whole segment of tokens.

    Segment routing best performance, "Not All Models Suit Expert Offloading: On Local Routing
    Consistency of Mixture-of-Expert Models" (arXiv 2505.16056, 2025), measured as recall.
    Lengths that no request reaches are left out.
    """
    shuffle = np.random.default_rng(seed).permutation(trace.num_tokens)
    found = []
    for tokens in segment_tokens:
        segments = _segments(trace.request, tokens)
        if len(segments):
            in_order, shuffled = _covered(trace, segments), _covered(trace, shuffle[segments])
            for size in {trace.shape.top_k: 0, 2 * trace.shape.top_k: 0}:
                found.append(Coverage(tokens, size, in_order[size], shuffled[size]))
    return tuple(found)


def _segments(request: NDArray[np.int32], tokens: int) -> NDArray[np.int64]:
    """[S, tokens] rows of consecutive tokens of one request; what is left of a request is not."""
    parts = [np.empty((0, tokens), dtype=np.int64)]
    for each in np.unique(request):
        rows = np.flatnonzero(request == each)
        parts.append(rows[: len(rows) // tokens * tokens].reshape(-1, tokens))
    return np.concatenate(parts)


def _covered(trace: Trace, segments: NDArray[np.int64]) -> dict[int, float]:
    """By size of the set: share of the activations in ``segments`` [S, tokens] it covers."""
    sizes = (trace.shape.top_k, 2 * trace.shape.top_k)
    covered, total = dict.fromkeys(sizes, 0), 0
    for layer in range(trace.shape.num_layers):
        counts = used_experts(trace, layer)[segments].sum(axis=1)  # [S, E]
        counts = -np.sort(-counts, axis=1)
        total += int(counts.sum())
        for size in sizes:
            covered[size] += int(counts[:, :size].sum())
    return {size: count / max(1, total) for size, count in covered.items()}


def busiest_take(use: NDArray[np.float64], shape: ExpertShape, share: float) -> float:
    """Share of the uses that each layer's busiest ``share`` of the experts takes, mean of layers.

    A broken number of experts counts the last one in part.
    """
    takes = []
    for row, count in zip(use, shape.experts_per_layer, strict=True):
        rising = np.concatenate([[0.0], np.cumsum(-np.sort(-row[:count]))])
        if rising[-1] > 0:
            takes.append(np.interp(share * count, np.arange(count + 1), rising) / rising[-1])
    return float(np.mean(takes)) if takes else 0.0


def normalised_entropy(use: NDArray[np.float64], shape: ExpertShape) -> NDArray[np.float64]:
    """[L] entropy of a layer's uses over that of uniform ones: 1 all alike, 0 one expert only.

    nan: the layer never ran.
    """
    p = use / np.maximum(use.sum(axis=1, keepdims=True), 1e-300)
    bits = -(p * np.log2(np.where(p > 0, p, 1.0))).sum(axis=1)
    share = bits / np.log2(np.maximum(2, shape.experts_per_layer))
    return np.asarray(np.where(use.any(axis=1), share, np.nan))


def domain_distances(trace: Trace) -> Domains | None:
    """How far the domains' uses are apart; None unless two are named, of two tokens at least."""
    by_name: dict[str, list[int]] = {}
    for request in np.unique(trace.request).tolist():
        by_name.setdefault(trace.domain(request), []).append(request)
    by_name.pop("unknown", None)
    halves = {
        name: [_distribution(trace, rows) for rows in _halves(trace, members)]
        for name, members in sorted(by_name.items())
        if np.isin(trace.request, members).sum() > 1
    }
    if len(halves) < 2:
        return None
    flat = np.array(list(halves.values()))  # [D, 2, L, E]
    size = len(halves)
    distance = np.zeros((size, size))
    for i in range(size):
        gaps = np.abs(flat[i][None, :, None] - flat[:, None, :])  # [D, 2, 2, L, E]
        pairs = gaps.sum(axis=-1).mean(axis=-1) / 2  # [D, 2, 2]
        distance[i] = pairs.mean(axis=(1, 2))
        distance[i, i] = pairs[i, 0, 1]
    return Domains(tuple(halves), distance)


def _halves(trace: Trace, requests: list[int]) -> list[NDArray[np.bool_]]:
    """Two sets of rows [T]: every other request; of a lone one, its first and second half."""
    if len(requests) > 1:
        return [np.isin(trace.request, requests[start::2]) for start in (0, 1)]
    rows = np.flatnonzero(trace.request == requests[0])
    late = np.zeros(trace.num_tokens, dtype=bool)
    late[rows[len(rows) // 2 :]] = True
    return [(trace.request == requests[0]) & ~late, late]


def _distribution(trace: Trace, rows: NDArray[np.bool_]) -> NDArray[np.float64]:
    """[L, E] uses of ``rows``, each layer's summing to 1."""
    use = use_shares(trace.select(rows))
    return np.asarray(use / np.maximum(use.sum(axis=1, keepdims=True), 1e-300))
