"""Packed number formats: plain encoding and decoding, the reference of what kernels read.

Layouts byte by byte: docs/packed_format.md. R: rows, C: columns of a matrix [out, in].
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

from moe_infinity.errors import UnsupportedModelError
from moe_infinity.kernels.gguf_formats import BLOCKS, decode_blocks
from moe_infinity.kernels.planes import PLANES, Scales, decode_planes

GROUP = 32  # weights per scale of Q8_0 and Q4_0
UNIT = 128  # weights per unit of EXACT12
_UNIT_BYTES = 192
_BLOCKS = {"Q8_0": (GROUP, 34), "Q4_0": (GROUP, 18), **BLOCKS}  # weights and bytes of one
PACKED = (*_BLOCKS, "EXACT12", *PLANES)
_WINDOW = 15  # exponents that a code of 4 bits can name; the sixteenth marks an exception
_MAX_COLUMNS = 2**16
MAX_EXCEPTIONS = 0.01  # of a matrix; with more it does not pay

_CPU = torch.device("cpu")
Bytes = NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class PackedMatrix:
    """A coded [rows, cols] matrix. data: uint8, the rows one after the other and, from the next
    multiple of 64 on, what the format keeps beside them. Formats of PLANES have scales apart, and
    some of them zero points (kernels/planes.py)."""

    format: str
    rows: int
    cols: int
    data: torch.Tensor
    scales: Scales | None = None
    zeros: torch.Tensor | None = None

    def decode_rows(self, first: int, count: int) -> torch.Tensor:
        """[count, cols] of ``decode``, of any format but EXACT12."""
        if not self.data.is_cpu:
            return self.to(_CPU).decode_rows(first, count).to(self.data.device)
        if self.scales is not None:
            rows = range(first, first + count)
            shape = (self.rows, self.cols)
            decoded = decode_planes(
                self.format, shape, self.data[: self.num_bytes], self.scales, self.zeros, rows
            )
            return torch.from_numpy(decoded)
        size = row_bytes(self.format, self.cols)
        data = self.data[first * size : (first + count) * size]
        return PackedMatrix(self.format, count, self.cols, data).decode()

    def to(self, device: torch.device) -> PackedMatrix:
        """The same matrix in memory of ``device``."""
        scales = self.scales
        if scales is not None:
            scales = scales._replace(values=scales.values.to(device))
        zeros = None if self.zeros is None else self.zeros.to(device)
        return replace(self, data=self.data.to(device), scales=scales, zeros=zeros)

    @property
    def num_bytes(self) -> int:
        """Of the codes."""
        return self.rows * row_bytes(self.format, self.cols)

    def decode(self) -> torch.Tensor:
        """[rows, cols]: bfloat16 of EXACT12, else float32. What lies elsewhere is brought to the
        CPU and back: right, and slow."""
        if not self.data.is_cpu:
            return self.to(_CPU).decode().to(self.data.device)
        if self.format == "EXACT12":
            bits = _decode_exact12(self.data.numpy(), self.rows, self.cols)
            return torch.from_numpy(bits.view(np.int16)).view(torch.bfloat16)
        if self.scales is not None:
            return self.decode_rows(0, self.rows)
        size = _BLOCKS[self.format][1]
        blocks = self.data[: self.num_bytes].numpy().reshape(self.rows, -1, size)
        if self.format in BLOCKS:
            decoded = decode_blocks(blocks.reshape(-1, size), self.format)
        else:
            decoded = (_decode_q8 if self.format == "Q8_0" else _decode_q4)(blocks)
        return torch.from_numpy(decoded.reshape(self.rows, self.cols))


def row_bytes(number_format: str, cols: int) -> int:
    """Bytes of one row of a packed matrix; of formats in planes of its codes."""
    if number_format == "EXACT12":
        return -(-cols // UNIT) * _UNIT_BYTES
    if number_format in PLANES:
        return cols * PLANES[number_format] // 8
    weights, num_bytes = _BLOCKS[number_format]
    return cols // weights * num_bytes


def side_offset(number_format: str, rows: int, cols: int) -> int:
    """Where what a format keeps beside its rows begins."""
    return -(-rows * row_bytes(number_format, cols) // 64) * 64


def can_pack(number_format: str, shape: tuple[int, ...]) -> bool:
    """Whether matrices of this [out, in] shape can be encoded so."""
    if number_format == "EXACT12":
        return shape[-1] < _MAX_COLUMNS
    return shape[-1] % GROUP == 0


def encode(matrix: torch.Tensor, number_format: str) -> Bytes | None:
    """The bytes of a [rows, cols] matrix; None where EXACT12 would not pay.

    Raises UnsupportedModelError for columns that are not divisible by the group.
    """
    if not can_pack(number_format, tuple(matrix.shape)):
        raise UnsupportedModelError(
            f"got a matrix {list(matrix.shape)}, expected columns divisible by {GROUP} (EXACT12: "
            f"fewer than {_MAX_COLUMNS}) for {number_format}; keep these experts in 16 bit"
        )
    if number_format == "EXACT12":
        bits = matrix.contiguous().view(torch.int16).numpy().view(np.uint16)
        return _encode_exact12(bits)
    groups = matrix.float().numpy().reshape(matrix.shape[0], -1, GROUP)
    with np.errstate(over="ignore", invalid="ignore"):
        return (_encode_q8(groups) if number_format == "Q8_0" else _encode_q4(groups)).ravel()


def _encode_q8(groups: NDArray[np.float32]) -> Bytes:
    """[R, G, 32] -> [R, G, 34]: llama.cpp's Q8_0, the largest at 127."""
    scale = np.abs(groups).max(axis=2, keepdims=True) / np.float32(127)
    scaled = groups * _inverse(scale)
    rounded = np.trunc(scaled + np.copysign(np.float32(0.5), scaled))
    quants = rounded.astype(np.int8).view(np.uint8)
    return np.concatenate([_half(scale), quants], axis=2)


def _decode_q8(groups: Bytes) -> NDArray[np.float32]:
    quants = np.ascontiguousarray(groups[..., 2:]).view(np.int8).astype(np.float32)
    return quants * _scale(groups)


def _encode_q4(groups: NDArray[np.float32]) -> Bytes:
    """[R, G, 32] -> [R, G, 18]: llama.cpp's Q4_0, the value furthest from 0 at -8."""
    furthest = np.take_along_axis(groups, np.abs(groups).argmax(axis=2)[..., None], axis=2)
    scale = furthest / np.float32(-8)
    quants = np.minimum(15, (groups * _inverse(scale) + np.float32(8.5))).astype(np.uint8)
    return np.concatenate([_half(scale), quants[..., :16] | quants[..., 16:] << 4], axis=2)


def _decode_q4(groups: Bytes) -> NDArray[np.float32]:
    both = groups[..., 2:]
    quants = np.concatenate([both & 15, both >> 4], axis=2).astype(np.float32) - 8
    decoded: NDArray[np.float32] = quants * _scale(groups)
    return decoded


def _inverse(scale: NDArray[np.float32]) -> NDArray[np.float32]:
    return np.divide(np.float32(1), scale, out=np.zeros_like(scale), where=scale != 0)


def _half(scale: NDArray[np.float32]) -> Bytes:
    half = scale.astype(np.float16)
    if not np.isfinite(half).all():
        raise UnsupportedModelError(
            f"got weights with a scale of {np.abs(scale).max():.3g}, expected what 16-bit scales "
            f"hold; keep these experts in 16 bit"
        )
    return half.view(np.uint8)


def _scale(groups: Bytes) -> NDArray[np.float32]:
    half = np.ascontiguousarray(groups[..., :2]).view(np.float16)
    return half.astype(np.float32)


def _encode_exact12(bits: NDArray[np.uint16]) -> Bytes | None:
    """[R, C] bf16 bits -> rows of units, tops, starts and exceptions."""
    rows, cols = bits.shape
    exponents = (bits >> 7 & 255).astype(np.uint8)
    tops = _tops(exponents)
    codes = tops[:, None].astype(np.int16) - exponents
    is_exception = (codes < 0) | (codes >= _WINDOW)
    row, column = np.nonzero(is_exception)
    if len(row) > MAX_EXCEPTIONS * bits.size:
        return None
    width = -(-cols // UNIT) * UNIT
    planes = np.zeros((2, rows, width), dtype=np.uint8)  # sign and mantissa, codes
    planes[0, :, :cols] = (bits >> 8 & 0x80) | (bits & 0x7F)
    planes[1] = (tops == 255)[:, None]  # what pads a row must be finite: it is multiplied by 0
    planes[1, :, :cols] = np.where(is_exception, _WINDOW, codes)
    units = np.empty((rows, width // UNIT, _UNIT_BYTES), dtype=np.uint8)
    units[..., :UNIT] = planes[0].reshape(rows, -1, UNIT)
    halves = planes[1].reshape(rows, -1, 2, 2, 32)  # of 64 weights: the first 32 low, then high
    units[..., UNIT:] = (halves[..., 0, :] | halves[..., 1, :] << 4).reshape(rows, -1, 64)
    starts = np.concatenate([[0], np.cumsum(is_exception.sum(axis=1))]).astype(np.uint32)
    exceptions = column.astype(np.uint32) << 16 | bits[row, column]
    padding = np.zeros(-rows % 4, dtype=np.uint8)
    gap = np.zeros(-units.size % 64, dtype=np.uint8)
    side = (tops, padding, starts.view(np.uint8), exceptions.astype(np.uint32).view(np.uint8))
    return np.concatenate([units.ravel(), gap, *side])


def _tops(exponents: Bytes) -> Bytes:
    """[R] the largest exponent of each row's best window."""
    rows = len(exponents)
    flat = exponents + np.arange(rows, dtype=np.int64)[:, None] * 256
    counts = np.bincount(flat.ravel(), minlength=rows * 256).reshape(rows, 256)
    until = np.concatenate([np.zeros((rows, _WINDOW), int), counts.cumsum(axis=1)], axis=1)
    in_window = until[:, _WINDOW:] - until[:, :-_WINDOW]  # by largest exponent
    tops: Bytes = in_window.argmax(axis=1).astype(np.uint8)
    return tops


def _decode_exact12(data: Bytes, rows: int, cols: int) -> NDArray[np.uint16]:
    units = data[: rows * row_bytes("EXACT12", cols)].reshape(rows, -1, _UNIT_BYTES)
    side = data[side_offset("EXACT12", rows, cols) :]
    tops = side[:rows].astype(np.uint16)
    table = side[-(-rows // 4) * 4 :]
    table = table[: len(table) // 4 * 4].view(np.uint32)
    starts = table[: rows + 1].astype(np.int64)
    exceptions = table[rows + 1 : rows + 1 + starts[-1]]
    both = units[..., UNIT:].reshape(rows, -1, 2, 32)
    codes = np.stack([both & 15, both >> 4], axis=3).reshape(rows, -1)[:, :cols].astype(np.uint16)
    small = units[..., :UNIT].reshape(rows, -1)[:, :cols].astype(np.uint16)
    exponents = (tops[:, None] - codes) & 255
    bits = ((small & 0x80) << 8 | exponents << 7 | (small & 0x7F)).astype(np.uint16)
    row = np.repeat(np.arange(rows), np.diff(starts))
    bits[row, exceptions >> 16] = exceptions & 0xFFFF
    return bits
