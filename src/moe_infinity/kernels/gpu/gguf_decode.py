"""Weights of the formats that only GGUF files have as tiles in registers, as Triton code.

R: rows of a tile, W: its columns, G: its groups of 32 columns; as decode.py has them.
"""

from __future__ import annotations

import triton
import triton.language as tl

from moe_infinity.kernels.gpu.loads import half, low_then_high, pointer, spread, u32


@triton.jit
def with_minimum(M: tl.constexpr, data, rows, c0, W: tl.constexpr):
    """Q4_1 and Q5_1, and Q5_0, whose numbers are around 0: groups of 32."""
    SIZE: tl.constexpr = 20 if M.format == "Q4_1" else (22 if M.format == "Q5_0" else 24)
    groups = c0 // 32 + tl.arange(0, W // 32)
    at = pointer(M, data) + (rows * M.row_stride)[:, None] + (groups * SIZE)[None, :]  # [R, G]
    mask = (groups * 32 < M.cols)[None, :]
    code_at = at[:, :, None] + (SIZE - 16) + tl.arange(0, 16)[None, None, :]
    codes = low_then_high(tl.load(code_at, mask[:, :, None], other=0), W).to(tl.int32)
    if M.format != "Q4_1":
        fifths = u32(M, at + (SIZE - 20), mask)
        fifth = (fifths[:, :, None] >> tl.arange(0, 32).to(tl.uint32)[None, None, :]) & 1
        codes = codes | (tl.reshape(fifth, [rows.shape[0], W]).to(tl.int32) << 4)
    scale = spread(half(M, at, mask), W)
    if M.format == "Q5_0":
        return (codes - 16).to(tl.float32) * scale
    else:
        return codes.to(tl.float32) * scale + spread(half(M, at + 2, mask), W)


@triton.jit
def with_k(M: tl.constexpr, data, rows, c0, W: tl.constexpr):
    """Two levels of scales, blocks of 256."""
    groups = c0 // 32 + tl.arange(0, W // 32)
    mask = (groups * 32 < M.cols)[None, :]
    start = pointer(M, data) + (rows * M.row_stride)[:, None]
    if M.format == "Q6_K":
        return _q6(M, start + (groups // 8 * 210)[None, :], groups % 8, mask, W)
    else:
        SIZE: tl.constexpr = 144 if M.format == "Q4_K" else 176
        blocks = start + (groups // 8 * SIZE)[None, :]  # [R, G]
        codes = _low_bits(M, start, c0, SIZE, W)
        if M.format == "Q5_K":
            high = blocks[:, :, None] + 16 + tl.arange(0, 32)[None, None, :]
            fifth = tl.load(high, mask[:, :, None], other=0).to(tl.int32)
            fifth = (fifth >> (groups % 8)[None, :, None]) & 1
            codes = codes | (tl.reshape(fifth, [rows.shape[0], W]) << 4)
        scale, least = _six_bits(M, blocks, groups % 8, mask)
        return codes.to(tl.float32) * spread(scale, W) - spread(least, W)


@triton.jit
def _low_bits(M: tl.constexpr, start, c0, SIZE: tl.constexpr, W: tl.constexpr):
    """[R, W] int32: each 32 bytes are the low and the high half of two groups."""
    pairs = c0 // 64 + tl.arange(0, W // 64)
    places = (pairs // 4 * SIZE + (SIZE - 128) + pairs % 4 * 32)[:, None] + tl.arange(0, 32)[None]
    mask = (pairs * 64 < M.cols)[None, :, None]
    codes = tl.load(start[:, :, None] + places[None, :, :], mask=mask, other=0)
    return low_then_high(codes, W).to(tl.int32)


@triton.jit
def _six_bits(M: tl.constexpr, blocks, j, mask):
    """[R, G] float32: scale and minimum number j of a block's eight, six bits each in 12 bytes."""
    low = j[None, :] < 4
    own = tl.load(blocks + 4 + j[None, :], mask, other=0).to(tl.int32)
    later = tl.load(blocks + 8 + j[None, :], mask, other=0).to(tl.int32)
    before = tl.load(blocks + tl.where(low, 4 + j[None, :], j[None, :]), mask, other=0).to(tl.int32)
    scale = tl.where(low, own & 63, (later & 15) | ((before >> 6) << 4))
    least = tl.where(low, later & 63, (later >> 4) | ((own >> 6) << 4))
    whole_scale = half(M, blocks, mask) * scale.to(tl.float32)
    return whole_scale, half(M, blocks + 2, mask) * least.to(tl.float32)


@triton.jit
def _q6(M: tl.constexpr, blocks, j, mask, W: tl.constexpr):
    """Group j of eight: 4 bits in one half of 32 bytes, 2 in a quarter of 32, two int8 scales."""
    R: tl.constexpr = blocks.shape[0]
    G: tl.constexpr = W // 32
    side, turn = j // 4, j % 4  # half of the block, group in it
    within = tl.arange(0, 32)[None, None, :]
    low_at = blocks + (side * 64 + turn % 2 * 32)[None, :]
    low = tl.load(low_at[:, :, None] + within, mask[:, :, None], other=0).to(tl.int32)
    high_at = blocks + (128 + side * 32)[None, :]
    high = tl.load(high_at[:, :, None] + within, mask[:, :, None], other=0).to(tl.int32)
    four = (low >> (turn // 2 * 4)[None, :, None]) & 15
    two = (high >> (turn * 2)[None, :, None]) & 3
    codes = tl.reshape(four | (two << 4), [R, W]) - 32
    scale_at = (blocks + (192 + j * 2)[None, :])[:, :, None] + tl.arange(0, 2)[None, None, :]
    scale = tl.load(scale_at, mask[:, :, None], other=0).to(tl.int8, bitcast=True).to(tl.float32)
    scale = scale * half(M, blocks + 208, mask)[:, :, None]
    return codes.to(tl.float32) * spread(tl.reshape(scale, [R, G * 2]), W)
