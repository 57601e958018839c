"""How fast decode will be: bytes over measured bandwidths at an assumed hit rate."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import NamedTuple

from moe_infinity.machine import Bandwidths
from moe_infinity.plan import Plan

# Decode hit rate of the default policy against the share of resident experts, on real routing:
# replays of Qwen3-30B-A3B, gpt-oss-120b and the bundled model. Random routing has the share itself.
_HIT_CURVE = ((0.0, 0.0), (0.05, 0.33), (0.12, 0.58), (0.25, 0.79), (0.5, 0.94), (1.0, 1.0))
# The stock model without its large products, and our own directing of experts, at batch one on a
# CPU: once per token, and per layer by compiled code (model/blocks.py) or by torch.
_TOKEN_OVERHEAD_S = 1e-3
_LAYER_OVERHEAD_S = {True: 0.5e-3, False: 1.4e-3}
# A layer's residents are multiplied while its misses are read: this much of the shorter is hidden.
_OVERLAP = 0.5
# A layer's few misses are under way at once, and reach this much of what the disk does with many:
# 1.0 to 1.7 of 2.6 GB/s. Chosen on other models and budgets than README's table holds.
_FEW_READS = 0.6
_FITS_WELL = 0.8  # hit rate from which the disk is not what decides
_BITS = {"exact12": 12.0, "int8": 8.5, "int4": 4.5}  # per weight


@dataclass(frozen=True)
class Forecast:
    """Decode speed in tokens/s at three hit rates: random routing, typical, everything hit."""

    hit_rate_low: float
    hit_rate: float
    tokens_per_s_low: float
    tokens_per_s: float
    tokens_per_s_high: float
    bandwidths: Bandwidths


def expected_hit_rate(share_resident: float) -> float:
    """Typical hit rate of real routing when this share of the experts is resident."""
    for (x0, y0), (x1, y1) in pairwise(_HIT_CURVE):
        if share_resident <= x1:
            return y0 + (y1 - y0) * (share_resident - x0) / (x1 - x0)
    return 1.0


def overhead_s(num_layers: int, is_compiled: bool) -> float:
    """Seconds per token that are not bytes. is_compiled: the model's blocks are run by the compiled
    kernels."""
    return _TOKEN_OVERHEAD_S + num_layers * _LAYER_OVERHEAD_S[is_compiled]


def decode_s(plan: Plan, other_s: float, hit_rate: float, bandwidths: Bandwidths) -> float:
    """Seconds per token: misses are read, experts and dense weights multiplied; other_s: the rest.

    Reads overlap the computation of their own layer's experts only, and that in part.
    """
    read_s = (1 - hit_rate) * plan.read_bytes_per_token / (_FEW_READS * bandwidths.disk_gbps * 1e9)
    experts_s = plan.bytes_per_token / (bandwidths.matvec_gbps * 1e9)
    dense_s = plan.dense_read_bytes / (bandwidths.matvec_gbps * 1e9)
    hidden_s = _OVERLAP * min(read_s, experts_s)
    return read_s + experts_s - hidden_s + dense_s + other_s


def forecast(
    plan: Plan, other_s: float, bandwidths: Bandwidths, hit_rate: float | None = None
) -> Forecast:
    """The band of decode speeds; ``hit_rate`` replaces the typical one where it is known.

    other_s: what a token takes beside bytes, see ``overhead_s``.
    """
    low = min(1.0, plan.share_resident)
    typical = expected_hit_rate(low) if hit_rate is None else hit_rate

    def rate(hits: float) -> float:
        return 1 / decode_s(plan, other_s, hits, bandwidths)

    return Forecast(low, typical, rate(min(low, typical)), rate(typical), rate(1.0), bandwidths)


class Form(NamedTuple):
    """What a packed form of the same model would do within the same budget."""

    experts: str  # as pack's options name it; for int8 and int4 of the dense layers too
    share_resident: float
    hit_rate: float
    tokens_per_s: float
    is_lossless: bool


def forms(plan: Plan, bits: int, other_s: float, bandwidths: Bandwidths) -> list[Form]:
    """Packed forms of a model whose weights have so many bits now, the most exact first."""
    found = []
    for name, fewer in _BITS.items():
        is_lossless = name == "exact12"
        if fewer < bits and (not is_lossless or bits == 16):
            smaller = shrunk(plan, fewer / bits, 1.0 if is_lossless else fewer / bits)
            at = forecast(smaller, other_s, bandwidths)
            found.append(
                Form(name, smaller.share_resident, at.hit_rate, at.tokens_per_s, is_lossless)
            )
    return found


def recommended(expected: Forecast, choices: Sequence[Form]) -> Form | None:
    """The most exact form that fits well, else the smallest; None: the model as it is."""
    if expected.hit_rate >= _FITS_WELL or not choices:
        return None
    return next((form for form in choices if form.hit_rate >= _FITS_WELL), choices[-1])


def shrunk(plan: Plan, experts: float, dense: float) -> Plan:
    """The plan with experts and dense products of a share of their size."""
    saved = round(plan.dense_read_bytes * (1 - dense))
    slot_bytes = round(max(plan.slot_bytes) * experts)
    room = max(0, plan.budget_bytes - plan.fixed_bytes + saved)
    fits = room // slot_bytes >= plan.experts_total
    num_early = 0 if fits else plan.num_early
    return replace(
        plan,
        dense_bytes=plan.dense_bytes - saved,
        dense_read_bytes=plan.dense_read_bytes - saved,
        slots_per_class=(min(plan.experts_total, max(0, room // slot_bytes - num_early)),),
        num_early=num_early,
        slot_bytes=(slot_bytes,),
        bytes_per_token=round(plan.bytes_per_token * experts),
        read_bytes_per_token=round(plan.read_bytes_per_token * experts),
    )


def verdict(plan: Plan, expected: Forecast) -> str:
    """One or two plain sentences: does it fit, will it be slow, what would help."""
    if plan.num_slots >= plan.experts_total:
        return "fits: every expert stays in memory"
    if not plan.holds_working_set:
        needed = plan.fixed_bytes + plan.working_set * max(plan.slot_bytes)
        return (
            f"will be slow, because one token uses {plan.working_set} experts and only "
            f"{plan.num_slots} fit: nearly every layer waits for the disk; a budget of "
            f"{needed / 1024**3:.2f} GiB would hold one token's working set"
        )
    if expected.hit_rate < _FITS_WELL:
        return (
            f"will be limited by the disk: about {1 - expected.hit_rate:.0%} of the experts have "
            f"to be read for each token; more memory helps most"
        )
    return "fits well: most experts a token needs will be in memory"
