"""Products of many tokens, as Triton code: weights decoded to the tokens' type, then tl.dot.

T: tokens, R: rows, W: columns of one step. Sums are over columns in ascending order, in the same
steps for every number format.
"""

from __future__ import annotations

import triton
import triton.language as tl

from moe_infinity.kernels.gpu.decode import begin, tile


@triton.jit
def sums_of_many(
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
    W: tl.constexpr,
    DOT: tl.constexpr,
):
    """[T, R] float32 of matrix A and of B, which may be None. DOT: the type to multiply in."""
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
    a_sums = tl.zeros([R, T], tl.float32)
    b_sums = a_sums
    starts = x + x_rows[None, :] * A.cols
    for c0 in range(0, A.cols, W):
        cols = c0 + tl.arange(0, W)[:, None]
        mask = is_token[None, :] & (cols < A.cols)
        tokens = tl.load(starts + cols, mask=mask, other=0.0).to(DOT)  # [W, T]
        weights, a_state = tile(A, a_data, a_side, a_zeros, a_rows, c0, a_state, W)
        a_sums = tl.dot(weights.to(TYPE).to(DOT), tokens, a_sums, input_precision="ieee")
        if B is not None:
            weights, b_state = tile(B, b_data, b_side, b_zeros, b_rows, c0, b_state, W)
            b_sums = tl.dot(weights.to(TYPE).to(DOT), tokens, b_sums, input_precision="ieee")
    return tl.trans(a_sums), tl.trans(b_sums)
