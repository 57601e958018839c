"""Triton kernels of the expert directory in GPU memory: who is where, who goes, what is brought.

One program decides for one layer of one token, so that a whole decode step can be one CUDA graph.
It decides as residency/ does, the order among equals included; the policies are in policy_rules.py.

L: MoE layers, E: experts, N = L * E flat keys, S: slots, K: top-k. A name with 2: the power of two
above. What one thread writes another one reads only after a barrier, and the other way round.
"""

from __future__ import annotations

import triton
import triton.language as tl

from moe_infinity.kernels.gpu.policy_rules import learn, score

# Bounds of worth: a free slot is taken before any resident, a member of the event never.
LOWEST = tl.constexpr(-(2**63))
HIGHEST = tl.constexpr(2**63 - 1)
LOW_32_BITS = tl.constexpr(2**32 - 1)


@triton.jit(do_not_specialize=["layer"])
def decide_kernel(
    top_k_ids: tl.tensor,  # [K] int32 or int64
    layer: tl.tensor,
    slot_of: tl.tensor,  # [N] int32, -1: absent
    key_of: tl.tensor,  # [S] int32, -1: free
    passing: tl.tensor,  # [S] int32, place in the order of going for what only streamed through
    state: tl.tensor,  # float64: the policy's state_arrays, one after the other
    scratch: tl.tensor,  # [2, S] int64
    counters: tl.tensor,  # [3] int64: events, passes, layer of the last event
    decisions: tl.tensor,  # [L, 3, K] int32: slots, keys to load, their slots
    trace: tl.tensor,  # [RING, 2 + 4 * K] int32
    POLICY: tl.constexpr,
    L: tl.constexpr,
    E: tl.constexpr,
    S: tl.constexpr,
    K: tl.constexpr,
    K2: tl.constexpr,
    E2: tl.constexpr,
    CHUNK: tl.constexpr,
    RING: tl.constexpr,
    FLOOR: tl.constexpr,
) -> None:
    """Learn one event, look its members up, choose victims, move in what misses, write it down."""
    lanes = tl.arange(0, K2)
    is_lane = lanes < K
    ids = tl.load(top_k_ids + lanes, mask=is_lane, other=-1).to(tl.int64)
    is_expert = (ids >= 0) & (ids < E)
    keys = tl.where(is_expert, layer * E + ids, -1).to(tl.int32)
    held = tl.load(slot_of + keys, mask=is_expert, other=-1)
    is_hit = held >= 0
    is_miss = is_expert & (held < 0)
    before = (keys[None, :] == keys[:, None]) & (lanes[None, :] < lanes[:, None])
    is_load = is_miss & (tl.sum(before.to(tl.int32), axis=1) == 0)  # the first of equal ones
    lower = is_load[None, :] & (keys[None, :] < keys[:, None])
    rank = tl.sum(lower.to(tl.int32), axis=1)  # misses are admitted by ascending id
    num_loads = tl.sum(is_load.to(tl.int32), axis=0)

    learn(POLICY, state, layer, ids, keys, is_expert, L, E, E2, FLOOR)
    if num_loads > 0:
        rank_slots(POLICY, key_of, passing, state, scratch, layer, held, is_hit, L, E, S, CHUNK)
    chosen = choose(scratch, lanes, num_loads, K2, S, CHUNK)
    is_taken = lanes < num_loads
    victims = tl.load(key_of + chosen, mask=is_taken, other=-1)
    tl.debug_barrier()

    here = is_load[None, :] & (rank[None, :] == lanes[:, None])
    arrivals = tl.sum(tl.where(here, keys[None, :] + 1, 0), axis=1) - 1
    own = tl.where(rank[:, None] == lanes[None, :], chosen[None, :], 0)
    slots = tl.where(is_hit, held, tl.where(is_miss, tl.sum(own, axis=1), -1))
    tl.store(slot_of + victims, -1, mask=victims >= 0)
    tl.store(slot_of + arrivals, chosen, mask=is_taken)
    tl.store(key_of + chosen, arrivals, mask=is_taken)
    tl.store(passing + chosen, -1, mask=is_taken)
    tl.store(passing + held, -1, mask=is_hit)
    decision = decisions + layer * 3 * K + lanes
    tl.store(decision, slots, mask=is_lane)
    tl.store(decision + K, arrivals, mask=is_lane)
    tl.store(decision + 2 * K, chosen, mask=is_lane)
    experts = tl.where(is_expert, ids, -1).to(tl.int32)
    note(trace, counters, layer, lanes, experts, is_hit, chosen, victims, K, RING)


@triton.jit
def note(
    trace: tl.tensor,
    counters: tl.tensor,
    layer: tl.tensor,
    lanes: tl.tensor,
    experts: tl.tensor,
    is_hit: tl.tensor,
    chosen: tl.tensor,
    victims: tl.tensor,
    K: tl.constexpr,
    RING: tl.constexpr,
) -> None:
    """Append the event to the ring; a pass begins where the layers begin anew."""
    number = tl.load(counters)
    passes = tl.load(counters + 1)
    passes += (layer <= tl.load(counters + 2)).to(tl.int64)
    tl.debug_barrier()
    row = trace + (number % RING) * (2 + 4 * K)
    tl.store(row, passes.to(tl.int32))
    tl.store(row + 1, layer)
    place = row + 2 + lanes
    tl.store(place, experts, mask=lanes < K)
    tl.store(place + K, is_hit.to(tl.int32), mask=lanes < K)
    tl.store(place + 2 * K, chosen, mask=lanes < K)
    tl.store(place + 3 * K, victims, mask=lanes < K)
    tl.store(counters, number + 1)
    tl.store(counters + 1, passes)
    tl.store(counters + 2, layer.to(tl.int64))


@triton.jit
def rank_slots(
    POLICY: tl.constexpr,
    key_of: tl.tensor,
    passing: tl.tensor,
    state: tl.tensor,
    scratch: tl.tensor,
    layer: tl.tensor,
    held: tl.tensor,
    is_hit: tl.tensor,
    L: tl.constexpr,
    E: tl.constexpr,
    S: tl.constexpr,
    CHUNK: tl.constexpr,
) -> None:
    """Write each slot's worth and what decides between equals; the slot is in its lower half.
    Free ones go first, then what only streamed through, then by score and key; members stay."""
    for start in tl.static_range(0, S, CHUNK):
        slots = start + tl.arange(0, CHUNK)
        exists = slots < S
        keys = tl.load(key_of + slots, mask=exists, other=-1)
        is_held = keys >= 0
        worth = tl.where(is_held, score(POLICY, state, keys, is_held, layer, L, E), LOWEST)
        place = tl.load(passing + slots, mask=exists, other=-1)
        worth = tl.where(place >= 0, LOWEST + 1, worth)
        order = tl.where(place >= 0, place, tl.where(is_held, keys, slots)).to(tl.int64)
        tl.store(scratch + slots, worth, mask=exists)
        tl.store(scratch + S + slots, (order << 32) | slots, mask=exists)
    tl.debug_barrier()
    tl.store(scratch + held, HIGHEST, mask=is_hit)
    tl.debug_barrier()


@triton.jit
def choose(
    scratch: tl.tensor,
    lanes: tl.tensor,
    count: tl.tensor,
    K2: tl.constexpr,
    S: tl.constexpr,
    CHUNK: tl.constexpr,
) -> tl.tensor:
    """[K2] the ``count`` slots worth least, least first; -1 behind them. Each round looks for the
    least above the one before, so nothing has to be crossed out."""
    chosen = tl.full([K2], -1, tl.int32)
    last_worth = tl.full([], LOWEST, tl.int64)
    last_order = tl.full([], -1, tl.int64)
    number = 0
    while number < count:
        best_worth = tl.full([CHUNK], HIGHEST, tl.int64)
        best_order = tl.full([CHUNK], HIGHEST, tl.int64)
        for start in tl.static_range(0, S, CHUNK):
            slots = start + tl.arange(0, CHUNK)
            worth = tl.load(scratch + slots, mask=slots < S, other=HIGHEST)
            order = tl.load(scratch + S + slots, mask=slots < S, other=HIGHEST)
            is_later = (worth > last_worth) | ((worth == last_worth) & (order > last_order))
            is_less = (worth < best_worth) | ((worth == best_worth) & (order < best_order))
            best_worth = tl.where(is_later & is_less, worth, best_worth)
            best_order = tl.where(is_later & is_less, order, best_order)
        last_worth = tl.min(best_worth, axis=0)
        last_order = tl.min(tl.where(best_worth == last_worth, best_order, HIGHEST), axis=0)
        slot = (last_order & LOW_32_BITS).to(tl.int32)
        chosen = tl.where(lanes == number, slot, chosen)
        number += 1
    return chosen


@triton.jit
def gather_kernel(
    load_keys: tl.tensor,  # [K] int32, -1: nothing
    load_slots: tl.tensor,  # [K] int32
    sources: tl.tensor,  # [N] int64 addresses of 16-byte aligned pinned memory
    targets: tl.tensor,  # [S] int64 addresses of 16-byte aligned device memory
    NUM_WORDS: tl.constexpr,  # of 8 bytes, even
    PROGRAMS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Copy expert after expert from host memory into its slot, 16 bytes a thread and access."""
    number = tl.program_id(0)
    key = tl.load(load_keys + number)
    if key >= 0:
        slot = tl.load(load_slots + number)
        source = tl.multiple_of(tl.load(sources + key).to(tl.pointer_type(tl.int64)), 16)
        target = tl.multiple_of(tl.load(targets + slot).to(tl.pointer_type(tl.int64)), 16)
        own = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        for start in range(0, NUM_WORDS, PROGRAMS * BLOCK):
            words = start + own
            data = tl.load(source + words, mask=words < NUM_WORDS, cache_modifier=".cg")
            tl.store(target + words, data, mask=words < NUM_WORDS)
