"""Numbers at byte addresses, as Triton code: whatever their alignment. Knows nothing of experts.

R: rows of a tile. M is a layout.Matrix: its ``align`` divides every address it has.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def pointer(M: tl.constexpr, address):
    """To bytes; the compiler reads as wide as it knows the alignment."""
    ALIGN: tl.constexpr = M.align
    return tl.multiple_of(address.to(tl.pointer_type(tl.uint8)), ALIGN)


@triton.jit
def u16(M: tl.constexpr, at, mask):
    if M.align % 2 == 0:
        value = tl.load(at.to(tl.pointer_type(tl.uint16), bitcast=True), mask=mask, other=0)
    else:
        low = tl.load(at, mask=mask, other=0).to(tl.uint16)
        value = low | (tl.load(at + 1, mask=mask, other=0).to(tl.uint16) << 8)
    return value


@triton.jit
def u32(M: tl.constexpr, at, mask):
    if M.align % 4 == 0:
        value = tl.load(at.to(tl.pointer_type(tl.uint32), bitcast=True), mask=mask, other=0)
    else:
        value = u16(M, at, mask).to(tl.uint32) | (u16(M, at + 2, mask).to(tl.uint32) << 16)
    return value


@triton.jit
def half(M: tl.constexpr, at, mask):
    """float16 -> float32."""
    return u16(M, at, mask).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def fp4_doubled(code):
    """int32 codes of MXFP4 -> twice their number: 0 1 2 3 4 6 8 12, the sign above."""
    size = code & 7
    size = tl.where(size < 4, size, tl.where(size < 6, 2 * size - 4, 4 * size - 16))
    return tl.where(code > 7, -size, size).to(tl.float32)


@triton.jit
def power(exponent):
    """2 to the (exponent - 127) of uint8, as float32."""
    bits = exponent.to(tl.uint32) << 23
    return tl.where(exponent == 0, 0x00400000, bits).to(tl.uint32).to(tl.float32, bitcast=True)


@triton.jit
def awq_place(row):
    """Where AWQ puts a row in its word of eight: 0 4 1 5 2 6 3 7."""
    return (row % 8) // 2 + (row % 2) * 4


@triton.jit
def low_then_high(codes, W: tl.constexpr):
    """[R, N, I] bytes -> [R, W] of four bits: of each I bytes the low halves, then the high."""
    both = tl.join(codes & 15, codes >> 4)  # [R, N, I, 2]
    return tl.reshape(tl.permute(both, (0, 1, 3, 2)), [codes.shape[0], W])


@triton.jit
def spread(of_groups, W: tl.constexpr):
    """[R, G] -> [R, W]: the same number for all columns of a group."""
    R: tl.constexpr = of_groups.shape[0]
    G: tl.constexpr = of_groups.shape[1]
    wide = tl.broadcast_to(of_groups[:, :, None], [R, G, W // G])
    return tl.reshape(wide, [R, W])
