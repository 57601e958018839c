"""llama.cpp's number formats that come in GGUF files only, decoded plainly. B: blocks."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]


# Weights and bytes of a block.
BLOCKS = {"Q4_K": (256, 144), "Q5_K": (256, 176), "Q6_K": (256, 210)}
BLOCKS |= {"Q4_1": (32, 20), "Q5_0": (32, 22), "Q5_1": (32, 24), "MXFP4": (32, 17)}
_FP4_DOUBLED = np.array([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12], dtype=np.int8)


def decode_blocks(blocks: Bytes, number_format: str) -> Floats:
    """[B, bytes of a block] of a format of BLOCKS -> [B, weights of a block]."""
    if number_format == "Q6_K":
        return _decode_q6(blocks)
    if number_format == "MXFP4":
        return _decode_mxfp4(blocks)
    if number_format.endswith("_K"):
        return _decode_q4_or_q5(blocks)
    return _decode_group(blocks, number_format)


def _decode_group(blocks: Bytes, number_format: str) -> Floats:
    """d float16, of the second kind m float16; of five bits the fifth, 4 bytes; 16 bytes of four
    bits, low halves first."""
    numbers = np.concatenate([blocks[:, -16:] & 15, blocks[:, -16:] >> 4], axis=1)
    if number_format.startswith("Q5"):
        bits = np.unpackbits(blocks[:, -20:-16], axis=1, bitorder="little")
        numbers = numbers | bits << 4
    scaled = _half(blocks[:, :2])
    if number_format.endswith("_1"):
        return scaled * numbers.astype(np.float32) + _half(blocks[:, 2:4])
    return scaled * (numbers.astype(np.int8) - np.int8(16)).astype(np.float32)


def _decode_q4_or_q5(blocks: Bytes) -> Floats:
    """d and dmin float16, eight scales and minima of 6 bits in 12 bytes; of Q5_K the fifth bits, 32
    bytes; 128 bytes of four bits, each 32 the low and the high half of two groups of 32."""
    scales, minima = _six_bits(blocks[:, 4:16])
    low = blocks[:, -128:].reshape(-1, 4, 1, 32) >> np.array([0, 4], dtype=np.uint8)[:, None] & 15
    numbers = low.reshape(-1, 8, 32)
    if blocks.shape[1] > 144:
        bits = blocks[:, 16:48][:, None] >> np.arange(8, dtype=np.uint8)[:, None] & 1
        numbers = numbers | bits << 4
    scaled = _half(blocks[:, :2]) * scales.astype(np.float32)
    least = _half(blocks[:, 2:4]) * minima.astype(np.float32)
    decoded: Floats = scaled[..., None] * numbers.astype(np.float32) - least[..., None]
    return decoded.reshape(-1, 256)


def _six_bits(packed: Bytes) -> tuple[Bytes, Bytes]:
    """[B, 12] -> scales and minima, [B, 8] each."""
    first, second, last = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    scales = np.concatenate([first & 63, (last & 15) | first >> 6 << 4], axis=1)
    minima = np.concatenate([second & 63, last >> 4 | second >> 6 << 4], axis=1)
    return scales, minima


def _decode_q6(blocks: Bytes) -> Floats:
    """128 bytes of four bits, 64 of two, sixteen int8 scales, d float16; of each half of the block
    64 bytes low, 32 high."""
    low = blocks[:, :128].reshape(-1, 2, 1, 64) >> np.array([0, 4], dtype=np.uint8)[:, None] & 15
    shifts = np.array([0, 2, 4, 6], dtype=np.uint8)[:, None]
    high = blocks[:, 128:192].reshape(-1, 2, 1, 32) >> shifts & 3
    numbers = low.reshape(-1, 16, 16).astype(np.int8) | (high << 4).reshape(-1, 16, 16).astype(
        np.int8
    )
    scales = np.ascontiguousarray(blocks[:, 192:208]).view(np.int8).astype(np.float32)
    scaled = _half(blocks[:, 208:210]) * scales
    decoded: Floats = scaled[..., None] * (numbers - np.int8(32)).astype(np.float32)
    return decoded.reshape(-1, 256)


def _decode_mxfp4(blocks: Bytes) -> Floats:
    """An exponent, 16 bytes of four bits, low halves first: numbers held doubled."""
    codes = np.concatenate([blocks[:, 1:] & 15, blocks[:, 1:] >> 4], axis=1)
    exponents = blocks[:, :1].astype(np.uint32)
    small, usual = np.uint32(0x00200000) << np.minimum(exponents, 1), (exponents - 1) << 23
    halves = np.where(exponents < 2, small, usual).astype(np.uint32).view(np.float32)
    decoded: Floats = halves * _FP4_DOUBLED[codes].astype(np.float32)
    return decoded


def _half(raw: Bytes) -> Floats:
    return np.ascontiguousarray(raw).view(np.float16).astype(np.float32)
