"""Products of a few tokens with rows as they lie, as Triton code: memory is the limit.

T: tokens, R: rows, L: lanes, the columns of one step. Each lane sums its own columns, and lanes are
added by halves in the end: an order that neither the compiler's layouts nor the number format nor
other tokens change. So EXACT12 gives what BF16 gives, bit for bit.
"""

from __future__ import annotations

import triton
import triton.language as tl

from moe_infinity.kernels.gpu.decode import begin, tile


@triton.jit
def sums_of_few(
    A: tl.constexpr,
    B: tl.constexpr,
    a,
    b,
    x,
    x_rows,
    is_token,
    rows,
    T: tl.constexpr,
    R: tl.constexpr,
    L: tl.constexpr,
):
    """[T, R] float32 of matrix A and of B, which may be None. a, b: where a table has them."""
    TYPE: tl.constexpr = x.dtype.element_ty
    a_data, a_side, a_zeros = tl.load(a), tl.load(a + 1), tl.load(a + 2)
    b_data, b_side, b_zeros = tl.load(b), tl.load(b + 1), tl.load(b + 2)
    a_rows = A.first + A.every * rows
    b_rows = rows
    if B is not None:
        b_rows = B.first + B.every * rows
    a_state = begin(A, a_side, a_rows)
    b_state = a_state
    if B is not None:
        b_state = begin(B, b_side, b_rows)
    a_sums = tl.zeros([T, R, L], tl.float32)
    b_sums = a_sums
    starts = x + x_rows[:, None, None] * A.cols + (rows * 0)[None, :, None]
    for c0 in range(0, A.cols, L):
        cols = c0 + tl.arange(0, L)[None, None, :]
        mask = is_token[:, None, None] & (cols < A.cols)
        tokens = tl.load(starts + cols, mask=mask, other=0.0).to(tl.float32)  # [T, R, L]
        weights, a_state = tile(A, a_data, a_side, a_zeros, a_rows, c0, a_state, L)
        a_sums = _added(weights, tokens, a_sums, TYPE)
        if B is not None:
            weights, b_state = tile(B, b_data, b_side, b_zeros, b_rows, c0, b_state, L)
            b_sums = _added(weights, tokens, b_sums, TYPE)
    return _over_lanes(a_sums), _over_lanes(b_sums)


@triton.jit
def _added(weights, tokens, sums, TYPE: tl.constexpr):
    wide = weights.to(TYPE).to(tl.float32)[None, :, :]
    return tl.fma(tl.broadcast_to(wide, sums.shape), tokens, sums)


@triton.jit
def _over_lanes(sums):
    """[T, R, L] -> [T, R]."""
    TURNS: tl.constexpr = 8 if sums.shape[2] == 256 else 6
    for _ in tl.static_range(TURNS):
        pairs = tl.reshape(sums, [sums.shape[0], sums.shape[1], sums.shape[2] // 2, 2])
        even, odd = tl.split(pairs)
        sums = even + odd
    return tl.reshape(sums, [sums.shape[0], sums.shape[1]])
