"""Policies as parts of a kernel: what they learn from an event, and how they score keys.

The arithmetic is that of policies/lru.py, lfru.py and next_use.py, in the same order and in
doubles, so that victims agree to the bit. The kernel has to be launched with
enable_fp_fusion=False: a fused multiply-add rounds once where numpy rounds twice.

L: MoE layers, E: experts. state: float64, the policy's ``state_arrays`` one after the other. A name
with 2: the power of two above. Writes are seen by other threads only after a barrier.
"""

from __future__ import annotations

import triton
import triton.language as tl

from moe_infinity.policies import next_use

FAST = tl.constexpr(next_use.FAST)
SLOW = tl.constexpr(next_use.SLOW)
BASE_WEIGHT = tl.constexpr(next_use.BASE_WEIGHT)
MIN_P = tl.constexpr(next_use.MIN_P)
ALL_BUT_SIGN = tl.constexpr(2**63 - 1)


@triton.jit
def learn(
    POLICY: tl.constexpr,
    state: tl.tensor,
    layer: tl.tensor,
    ids: tl.tensor,
    keys: tl.tensor,
    is_expert: tl.tensor,
    L: tl.constexpr,
    E: tl.constexpr,
    E2: tl.constexpr,
    FLOOR: tl.constexpr,
) -> None:
    """The policy's on_event. Equal members of an event store equal values."""
    if POLICY == "next_use":
        learn_next_use(state, layer, ids, L, E, E2, FLOOR)
    elif POLICY == "lfru":
        uses = tl.load(state + keys, mask=is_expert, other=0.0)
        clock = tl.load(state + 2 * L * E) + 1.0
        tl.debug_barrier()
        tl.store(state + keys, uses + 1.0, mask=is_expert)
        tl.store(state + L * E + keys, clock, mask=is_expert)
        tl.store(state + 2 * L * E, clock)
    else:
        clock = tl.load(state + L * E) + 1.0
        tl.debug_barrier()
        tl.store(state + keys, clock, mask=is_expert)
        tl.store(state + L * E, clock)
    tl.debug_barrier()


@triton.jit
def learn_next_use(
    state: tl.tensor,
    layer: tl.tensor,
    ids: tl.tensor,
    L: tl.constexpr,
    E: tl.constexpr,
    E2: tl.constexpr,
    FLOOR: tl.constexpr,
) -> None:
    """Decay the layer's row, count its members, foresee next uses; at once, not when asked."""
    experts = tl.arange(0, E2)
    exists = experts < E
    among = (ids[None, :] == experts[:, None]).to(tl.int32)
    is_member = (tl.max(among, axis=1)).to(tl.float64)
    row = state + layer * E + experts  # [2, L, E] uses, [2, L] passes, [L, E] cycles
    ends = state + 2 * L * E + layer
    fast = tl.load(row, mask=exists, other=0.0) * FAST + is_member
    slow = tl.load(row + L * E, mask=exists, other=0.0) * SLOW + is_member
    fast_passes = tl.load(ends) * FAST + 1.0
    slow_passes = tl.load(ends + L) * SLOW + 1.0
    least_base = tl.full([], FLOOR, tl.float64)  # a bare number would be rounded to a float
    least_p = tl.full([], MIN_P, tl.float64)
    base = tl.minimum(tl.maximum(slow / slow_passes, least_base), 1.0)
    p = (fast + BASE_WEIGHT * base) / (fast_passes + BASE_WEIGHT)
    cycles = 1.0 / tl.minimum(tl.maximum(p, least_p), 1.0) - 1.0
    tl.debug_barrier()
    tl.store(row, fast, mask=exists)
    tl.store(row + L * E, slow, mask=exists)
    tl.store(row + 2 * L * E + 2 * L, cycles, mask=exists)
    tl.store(ends, fast_passes)
    tl.store(ends + L, slow_passes)


@triton.jit
def score(
    POLICY: tl.constexpr,
    state: tl.tensor,
    keys: tl.tensor,
    is_held: tl.tensor,
    layer: tl.tensor,
    L: tl.constexpr,
    E: tl.constexpr,
) -> tl.tensor:
    """The policy's keep_scores of these keys, as integers in the same order."""
    if POLICY == "next_use":
        cycles = tl.load(state + 2 * L * E + 2 * L + keys, mask=is_held, other=0.0)
        way = (keys // E - layer - 1 + L) % L + 1
        scores = -(cycles * L + way.to(tl.float64))
    elif POLICY == "lfru":
        uses = tl.load(state + keys, mask=is_held, other=0.0)
        last_use = tl.load(state + L * E + keys, mask=is_held, other=0.0)
        scores = uses / (tl.load(state + 2 * L * E) - last_use + 1.0)
    else:
        scores = tl.load(state + keys, mask=is_held, other=0.0)
    # Where doubles are slow (1/64 of the rate of floats on consumer GPUs) comparing them is too.
    bits = scores.to(tl.int64, bitcast=True)
    return tl.where(bits < 0, bits ^ ALL_BUT_SIGN, bits)
