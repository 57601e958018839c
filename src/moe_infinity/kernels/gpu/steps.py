"""The two steps of all experts of a layer, one launch each: gate, up and activation; then down.

A program takes a block of rows of one job; J: jobs, P: places, one for each token of each job.
What says which expert, which tokens and where to is on the device, so that a launch can be captured
in a graph. A job whose table row is -1 is skipped.
"""

from __future__ import annotations

import triton
import triton.language as tl

from moe_infinity.kernels.gpu.activate import activated, gated, with_bias
from moe_infinity.kernels.gpu.groups import sums_of_many
from moe_infinity.kernels.gpu.layout import FIELDS, NUM_FIELDS
from moe_infinity.kernels.gpu.rows import sums_of_few

_FIELDS = tl.constexpr(FIELDS)
_NUM_FIELDS = tl.constexpr(NUM_FIELDS)
_BIAS = tl.constexpr(FIELDS - 1)


@triton.jit
def inner_step(
    table,
    which,
    starts,
    token_of,
    x,
    inner,
    GATE: tl.constexpr,
    UP: tl.constexpr,
    ACTIVATION: tl.constexpr,
    DOT: tl.constexpr,
    T: tl.constexpr,
    R: tl.constexpr,
    W: tl.constexpr,
):
    TYPE: tl.constexpr = x.dtype.element_ty
    expert = tl.load(which + tl.program_id(1))
    if expert >= 0:
        gate_at = table + expert.to(tl.int64) * _NUM_FIELDS
        up_at = gate_at + _FIELDS
        own = tl.program_id(0) * R + tl.arange(0, R)
        rows = tl.minimum(own, UP.rows - 1)
        end = tl.load(starts + tl.program_id(1) + 1)
        first = tl.load(starts + tl.program_id(1))
        while first < end:
            places = first + tl.arange(0, T)
            is_token = places < end
            tokens = tl.load(token_of + places, mask=is_token, other=0).to(tl.int64)
            if DOT is None:
                up, gate = sums_of_few(UP, GATE, up_at, gate_at, x, tokens, is_token, rows, T, R, W)
            else:
                up, gate = sums_of_many(
                    UP, GATE, up_at, gate_at, x, tokens, is_token, rows, T, R, W, DOT
                )
            up = with_bias(UP, up, tl.load(up_at + _BIAS), rows, TYPE)
            if GATE is not None:
                gate = with_bias(GATE, gate, tl.load(gate_at + _BIAS), rows, TYPE)
                result = gated(gate, up, ACTIVATION, TYPE)
            else:
                result = activated(up, ACTIVATION, TYPE)
            to = inner + places.to(tl.int64)[:, None] * UP.rows + own[None, :]
            tl.store(to, result.to(TYPE), mask=is_token[:, None] & (own < UP.rows)[None, :])
            first += T


@triton.jit
def product_step(
    table,
    which,
    starts,
    row_of,
    place_of,
    x,
    out,
    out_stride,
    out_first,
    MATRIX: tl.constexpr,
    FIELD: tl.constexpr,
    EVERY: tl.constexpr,
    IS_PLACED: tl.constexpr,
    DOT: tl.constexpr,
    T: tl.constexpr,
    R: tl.constexpr,
    W: tl.constexpr,
):
    """IS_PLACED: x's row is the place's own number and out's is in place_of; else out's is."""
    TYPE: tl.constexpr = x.dtype.element_ty
    expert = tl.load(which + tl.program_id(1))
    if expert >= 0:
        at = table + expert.to(tl.int64) * _NUM_FIELDS + FIELD
        own = tl.program_id(0) * R + tl.arange(0, R)
        rows = tl.minimum(own, MATRIX.rows - 1)
        end = tl.load(starts + tl.program_id(1) + 1)
        first = tl.load(starts + tl.program_id(1))
        while first < end:
            places = first + tl.arange(0, T)
            is_token = places < end
            if IS_PLACED:
                tokens = places.to(tl.int64)
                to = tl.load(place_of + places, mask=is_token, other=0).to(tl.int64)
            else:
                tokens = tl.load(row_of + places, mask=is_token, other=0).to(tl.int64)
                to = places.to(tl.int64)
            if DOT is None:
                sums, _ = sums_of_few(MATRIX, None, at, at, x, tokens, is_token, rows, T, R, W)
            else:
                sums, _ = sums_of_many(
                    MATRIX, None, at, at, x, tokens, is_token, rows, T, R, W, DOT
                )
            sums = with_bias(MATRIX, sums, tl.load(at + _BIAS), rows, TYPE)
            to = out + to[:, None] * out_stride + out_first + own[None, :] * EVERY
            tl.store(to, sums.to(TYPE), mask=is_token[:, None] & (own < MATRIX.rows)[None, :])
            first += T
