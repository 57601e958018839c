"""Everything measured on one trace, and in plain words whether its model is worth caching."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from moe_infinity.simulator.hit_curve import KNEE_STEP, HitCurve, hit_curve
from moe_infinity.simulator.locality import (
    Coverage,
    Domains,
    busiest_take,
    domain_distances,
    neighbour_reuse,
    normalised_entropy,
    segment_coverage,
    use_shares,
)
from moe_infinity.tracing.trace import Trace
from moe_infinity.types import ExpertShape

BUSIEST = (0.10, 0.25, 0.50)
MAX_EVENTS = 4_000  # some ten seconds on one core; 83 tokens of a 48-layer model
# Reuse over chance. Uniform routing measures 1.0 within a few percent even on short traces; public
# traces of fine-grained models measure 8 (Qwen3-30B-A3B, 6 of 128) and 11 (gpt-oss-120b, 2 of 128).
PAYS_RATIO, HARDLY_RATIO = 1.5, 1.2
# Distance between domains over that between halves of one: sampling alone gives 1.
DOMAINS_DIFFER_RATIO = 1.25
COLD_CEILING = 0.95  # below it first uses, not the policy, bound the hits of a short trace


@dataclass(frozen=True)
class Locality:
    """What was measured. L: MoE layers, E: experts."""

    name: str  # of the model where that is known, or else of the trace
    shape: ExpertShape
    num_tokens: int
    num_requests: int
    use: NDArray[np.float64]  # [L, E] share of tokens that used the expert
    reuse: NDArray[np.float64]  # [L] share of experts that the token before used too; nan: no pairs
    popularity: NDArray[np.float64]  # [L] the same, were tokens drawn independently from ``use``
    chance: NDArray[np.float64]  # [L] the same, were routing uniform
    coverage: tuple[Coverage, ...]
    busiest: dict[float, float]  # share of the uses that this share of the experts takes
    entropy: NDArray[np.float64]  # [L] of the uses, 1 is uniform; nan: never ran
    domains: Domains | None
    curve: HitCurve

    @property
    def mean_reuse(self) -> float | None:
        """Over layers that have pairs, as the next two; None where no request has two tokens."""
        return self._mean(self.reuse)

    @property
    def mean_popularity(self) -> float | None:
        """Reuse that popular experts alone bring; what is above it comes from recency."""
        return self._mean(self.popularity)

    @property
    def mean_chance(self) -> float | None:
        return self._mean(self.chance)

    def _mean(self, of_layers: NDArray[np.float64]) -> float | None:
        compared = np.isfinite(self.reuse)
        return float(of_layers[compared].mean()) if compared.any() else None

    @property
    def reuse_ratio(self) -> float | None:
        if self.mean_reuse is None or self.mean_chance is None:
            return None
        return self.mean_reuse / self.mean_chance

    @property
    def working_set(self) -> float:
        """What one token touches, as a share of all experts."""
        return self.shape.working_set / self.shape.num_total


def examine(trace: Trace, max_events: int = MAX_EVENTS) -> Locality:
    """Measure ``trace``, of one phase; its first ``max_events`` events are replayed."""
    bare = replace(trace, logits=None, hidden=None, embeddings=None, foresight={})
    use = use_shares(bare)
    return Locality(
        name=str(trace.meta.get("model") or trace.name),
        shape=trace.shape,
        num_tokens=trace.num_tokens,
        num_requests=len(np.unique(trace.request)),
        use=use,
        reuse=neighbour_reuse(bare),
        popularity=(use**2).sum(axis=1) / trace.shape.top_k,
        chance=trace.shape.top_k / np.array(trace.shape.experts_per_layer),
        coverage=segment_coverage(bare),
        busiest={share: busiest_take(use, trace.shape, share) for share in BUSIEST},
        entropy=normalised_entropy(use, trace.shape),
        domains=domain_distances(bare),
        curve=hit_curve(bare, max_events),
    )


def verdict(found: Locality) -> list[str]:
    """Plain sentences: is caching worth it, how much of it, and what to mind."""
    sentences = [_worth(found), *_how_much(found)]
    sentences.append(
        f"Below {found.working_set:.1%} (one token's working set, {found.shape.working_set:,} "
        f"experts) recency collapses."
    )
    if found.curve.ceiling < COLD_CEILING:
        sentences.append(
            f"The cache starts cold: in these {found.curve.num_tokens:,} tokens "
            f"{1 - found.curve.ceiling:.0%} of the look-ups are first uses, which no cache hits; "
            f"take a knee found on so few as the least."
        )
    return sentences + _about_domains(found.domains)


def _worth(found: Locality) -> str:
    ratio = found.reuse_ratio
    if ratio is None:
        return "No request has two tokens: nothing can be said about reuse."
    shared = (
        f"Neighbouring tokens share {found.mean_reuse:.0%} of their experts, "
        f"{ratio:.1f} times chance"
    )
    if ratio >= PAYS_RATIO:
        return f"{shared}: caching pays."
    if ratio > HARDLY_RATIO:
        return f"{shared}: caching pays a little."
    return f"{shared}: hardly worth caching, hits follow capacity."


def _how_much(found: Locality) -> list[str]:
    curve, knee = found.curve, found.curve.knee
    if not curve.points:
        return []
    if knee is None:
        return [f"No knee: every {KNEE_STEP:.0%} more capacity gain hits to the end."]
    num_experts = round(knee * found.shape.num_total)
    return [
        f"Knee at {knee:.0%} ({num_experts:,} of {found.shape.num_total:,} experts): "
        f"{curve.hit_rate(knee):.0%} hits."
    ]


def _about_domains(domains: Domains | None) -> list[str]:
    if domains is None:
        return []
    numbers = f"distance {domains.between:.2f} between them, {domains.within:.2f} within one"
    if domains.between >= DOMAINS_DIFFER_RATIO * domains.within:
        return [f"Domains use different experts ({numbers}): a change of topic refills the cache."]
    return [f"Domains use the same experts ({numbers})."]
