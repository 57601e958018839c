"""Weights of every number format as tiles in registers, as Triton code. Knows nothing of tokens.

R: rows of a tile, W: its columns, a power of two from 64 on; G: its groups of 32 columns. Rows are
the block's own, c0 is a tile's first column, a multiple of W. Tiles are float32, of plain formats
and EXACT12 (bfloat16) as they are stored; columns beyond the matrix are 0. Layouts byte by byte:
docs/packed_format.md, kernels/gguf_formats.py, kernels/planes.py, which are the reference.
"""

from __future__ import annotations

import triton
import triton.language as tl

from moe_infinity.kernels.gpu.gguf_decode import with_k, with_minimum
from moe_infinity.kernels.gpu.loads import (
    awq_place,
    fp4_doubled,
    half,
    low_then_high,
    pointer,
    power,
    spread,
    u32,
)

_NO_COLUMN = tl.constexpr(1 << 20)  # beyond all


@triton.jit
def tile(M: tl.constexpr, data, side, zeros, rows, c0, state, W: tl.constexpr):
    """[R, W] and the state for the next tile to the right. data, side, zeros: addresses."""
    if M.format == "BF16" or M.format == "F16" or M.format == "F32":
        weights = _plain(M, data, rows, c0, W)
    elif M.format == "EXACT12":
        weights, state = _exact12(M, data, side, rows, c0, state, W)
    elif M.format == "Q8_0":
        weights = _q8(M, data, rows, c0, W)
    elif M.format == "Q4_K" or M.format == "Q5_K" or M.format == "Q6_K":
        weights = with_k(M, data, rows, c0, W)
    elif M.format == "Q4_1" or M.format == "Q5_1" or M.format == "Q5_0":
        weights = with_minimum(M, data, rows, c0, W)
    elif M.format == "Q4_0" or M.format == "MXFP4":
        weights = _nibbles(M, data, rows, c0, W)
    else:
        weights = _planes(M, data, side, zeros, rows, c0, W)
    return weights, state


@triton.jit
def begin(M: tl.constexpr, side, rows):
    """The state before the first tile: of EXACT12 each row's next exception and the last one's end,
    and the first column of all that has one."""
    if M.format == "EXACT12":
        starts = _starts(M, side)
        always = rows >= 0
        at = u32(M, starts + rows * 4, always).to(tl.int32)
        end = u32(M, starts + rows * 4 + 4, always).to(tl.int32)
        state = (at, end, _soonest(M, starts, at, end))
    else:
        state = (rows, rows, tl.program_id(0))
    return state


@triton.jit
def _plain(M: tl.constexpr, data, rows, c0, W: tl.constexpr):
    ALIGN: tl.constexpr = M.align
    if M.format == "BF16":
        start = data.to(tl.pointer_type(tl.bfloat16))
    elif M.format == "F16":
        start = data.to(tl.pointer_type(tl.float16))
    else:
        start = data.to(tl.pointer_type(tl.float32))
    cols = c0 + tl.arange(0, W)
    at = tl.multiple_of(start, ALIGN) + rows[:, None] * M.row_stride + cols[None, :] * M.col_stride
    if M.cols % W == 0:
        return tl.load(at)
    else:
        return tl.load(at, mask=(cols < M.cols)[None, :], other=0.0)


@triton.jit
def _starts(M: tl.constexpr, side):
    return pointer(M, side) + (M.block_rows + 3) // 4 * 4


@triton.jit
def _soonest(M: tl.constexpr, starts, at, end):
    word = u32(M, starts + (M.block_rows + 1 + at) * 4, at < end)
    return tl.min(tl.where(at < end, (word >> 16).to(tl.int32), _NO_COLUMN), axis=0)


@triton.jit
def _exact12(M: tl.constexpr, data, side, rows, c0, state, W: tl.constexpr):
    """Codes first, then the true bits in place of codes 15, one of each row a turn; of a thousand
    weights few have them, so most tiles have none."""
    at, end, soon = state
    cols = c0 + tl.arange(0, W)
    units = c0 // 64 + tl.arange(0, W // 64)  # of 64 columns: half of a format's own
    start = pointer(M, data)
    of_rows = rows * M.row_stride
    small_at = start + of_rows[:, None] + (cols // 128 * 192 + cols % 128)[None, :]
    code_at = (units // 2 * 192 + 128 + units % 2 * 32)[:, None] + tl.arange(0, 32)[None, :]
    code_at = start + of_rows[:, None, None] + code_at[None, :, :]
    if M.cols % W == 0:
        small, codes = tl.load(small_at), tl.load(code_at)
    else:
        small = tl.load(small_at, mask=(cols < M.cols)[None, :], other=0)
        codes = tl.load(code_at, mask=(units * 64 < M.cols)[None, :, None], other=0)
    top = tl.load(pointer(M, side) + rows).to(tl.int32)
    codes = low_then_high(codes, W).to(tl.int32)
    small = small.to(tl.int32)
    bits = (small & 0x80) << 8 | ((top[:, None] - codes) & 255) << 7 | (small & 0x7F)
    if soon < c0 + W:
        starts = _starts(M, side)
        counts = tl.sum((codes == 15).to(tl.int32), axis=1)
        most, turn = tl.max(counts, axis=0), tl.program_id(0) * 0
        while turn < most:
            word = u32(M, starts + (M.block_rows + 1 + at + turn) * 4, turn < counts)
            column = tl.where(turn < counts, (word >> 16).to(tl.int32), _NO_COLUMN)
            is_it = column[:, None] == cols[None, :]
            bits = tl.where(is_it, (word & 0xFFFF).to(tl.int32)[:, None], bits)
            turn += 1
        at += counts
        soon = _soonest(M, starts, at, end)
    if M.cols % W != 0:
        bits = tl.where((cols < M.cols)[None, :], bits, 0)
    weights = bits.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return weights, (at, end, soon)


@triton.jit
def _q8(M: tl.constexpr, data, rows, c0, W: tl.constexpr):
    groups = c0 // 32 + tl.arange(0, W // 32)
    at = pointer(M, data) + (rows * M.row_stride)[:, None] + (groups * 34)[None, :]  # [R, G]
    mask = (groups * 32 < M.cols)[None, :]
    scale = half(M, at, mask)
    code = tl.load(at[:, :, None] + 2 + tl.arange(0, 32)[None, None, :], mask[:, :, None], other=0)
    weights = code.to(tl.int8, bitcast=True).to(tl.float32) * scale[:, :, None]
    return tl.reshape(weights, [rows.shape[0], W])


@triton.jit
def _nibbles(M: tl.constexpr, data, rows, c0, W: tl.constexpr):
    """Q4_0 and MXFP4: a scale, then 16 bytes."""
    SIZE: tl.constexpr = 18 if M.format == "Q4_0" else 17
    groups = c0 // 32 + tl.arange(0, W // 32)
    at = pointer(M, data) + (rows * M.row_stride)[:, None] + (groups * SIZE)[None, :]  # [R, G]
    mask = (groups * 32 < M.cols)[None, :]
    code_at = at[:, :, None] + (SIZE - 16) + tl.arange(0, 16)[None, None, :]
    codes = low_then_high(tl.load(code_at, mask[:, :, None], other=0), W).to(tl.int32)
    if M.format == "Q4_0":
        weights = (codes - 8).to(tl.float32) * spread(half(M, at, mask), W)
    else:
        exponent = tl.load(at, mask, other=0).to(tl.uint32)
        bits = tl.where(exponent < 2, 0x00200000 << exponent, (exponent - 1) << 23)
        scale = bits.to(tl.uint32).to(tl.float32, bitcast=True)
        weights = fp4_doubled(codes) * spread(tl.where(mask, scale, 0.0), W)
    return weights


@triton.jit
def _planes(M: tl.constexpr, data, side, zeros, rows, c0, W: tl.constexpr):
    """Codes whose scales lie apart."""
    cols = c0 + tl.arange(0, W)
    start = pointer(M, data)
    if M.format == "F8_E4M3":
        at = start + (rows * M.row_stride)[:, None] + cols[None, :]
        numbers = _f8(tl.load(at, mask=(cols < M.cols)[None, :], other=0))
    elif M.format == "MXFP4_PLANES":
        numbers = fp4_doubled(_pairs(M, start, rows, c0, W)) * 0.5
    elif M.format == "INT4":
        numbers = (_pairs(M, start, rows, c0, W) - _zero(M, zeros, rows, c0, W)).to(tl.float32)
    else:
        numbers = (_in_words(M, start, rows, c0, W) - _zero(M, zeros, rows, c0, W)).to(tl.float32)
    return numbers * _scale(M, side, rows, c0, W)


@triton.jit
def _f8(byte):
    """4 bits of exponent, 3 of mantissa, no infinities: float16 of another bias."""
    bits = byte.to(tl.uint16)
    number = (((bits & 0x80) << 8) | ((bits & 0x7F) << 7)).to(tl.float16, bitcast=True)
    return tl.where((byte & 0x7F) == 0x7F, float("nan"), number.to(tl.float32) * 256.0)


@triton.jit
def _pairs(M: tl.constexpr, start, rows, c0, W: tl.constexpr):
    """[R, W] int32 of two codes a byte, the first one low."""
    at = c0 // 2 + tl.arange(0, W // 2)
    codes = tl.load(
        start + (rows * M.row_stride)[:, None] + at[None, :],
        mask=(at < M.cols // 2)[None, :],
        other=0,
    )
    both = tl.join(codes & 15, codes >> 4)
    return tl.reshape(both, [rows.shape[0], W]).to(tl.int32)


@triton.jit
def _in_words(M: tl.constexpr, start, rows, c0, W: tl.constexpr):
    """[R, W] int32 of eight codes a word: of GPTQ's eight columns of a row, of AWQ's eight rows."""
    words = start.to(tl.pointer_type(tl.uint32), bitcast=True)
    if M.format == "AWQ":
        cols = c0 + tl.arange(0, W)
        at = cols[None, :] * (M.block_rows // 8) + (rows // 8)[:, None]
        word = tl.load(words + at, mask=(cols < M.cols)[None, :], other=0)
        codes = word >> (awq_place(rows) * 4)[:, None].to(tl.uint32)
    else:
        eights = c0 // 8 + tl.arange(0, W // 8)
        at = eights[None, :] * M.block_rows + rows[:, None]
        word = tl.load(words + at, mask=(eights * 8 < M.cols)[None, :], other=0)
        shifts = (tl.arange(0, 8) * 4).to(tl.uint32)
        codes = tl.reshape(word[:, :, None] >> shifts[None, None, :], [rows.shape[0], W])
    return (codes & 15).to(tl.int32)


@triton.jit
def _scale(M: tl.constexpr, side, rows, c0, W: tl.constexpr):
    """[R, W] float32; one number is read for 32 columns where they have it in common."""
    STEP: tl.constexpr = 32 if M.group_cols % 32 == 0 else 1
    cols = c0 + tl.arange(0, W // STEP) * STEP
    at = (rows // M.group_rows * M.scale_rows)[:, None]
    at = at + (cols // M.group_cols * M.scale_cols)[None, :]
    mask = (cols < M.cols)[None, :]
    if M.scale_format == "E8M0":
        byte = tl.load(side.to(tl.pointer_type(tl.uint8)) + at, mask=mask, other=0)
        scale = tl.where(mask, power(byte), 0.0)
    elif M.scale_format == "BF16":
        scale = tl.load(side.to(tl.pointer_type(tl.bfloat16)) + at, mask=mask, other=0.0)
    elif M.scale_format == "F16":
        scale = tl.load(side.to(tl.pointer_type(tl.float16)) + at, mask=mask, other=0.0)
    else:
        scale = tl.load(side.to(tl.pointer_type(tl.float32)) + at, mask=mask, other=0.0)
    return spread(scale.to(tl.float32), W)


@triton.jit
def _zero(M: tl.constexpr, zeros, rows, c0, W: tl.constexpr):
    """[R, W] int32: what is taken from each code."""
    if not M.has_zeros:
        return tl.full([rows.shape[0], W], 8, tl.int32)
    else:
        STEP: tl.constexpr = 32 if M.group_cols % 32 == 0 else 1
        cols = c0 + tl.arange(0, W // STEP) * STEP
        at = (rows // 8 * M.zero_rows)[:, None] + (cols // M.group_cols * M.zero_cols)[None, :]
        words = zeros.to(tl.pointer_type(tl.uint32))
        word = tl.load(words + at, mask=(cols < M.cols)[None, :], other=0)
        place = awq_place(rows) if M.format == "AWQ" else rows % 8
        zero = ((word >> (place * 4)[:, None].to(tl.uint32)) & 15).to(tl.int32)
        if M.format == "GPTQ":
            zero = (zero + 1) & 15
        return spread(zero, W)
