"""Formats whose scales lie apart from their codes, decoded plainly: those of safetensors files.

R: rows, C: columns of a matrix [out, in].
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

Floats = NDArray[np.float32]

# Bits of a code. MXFP4_PLANES: two numbers of 4 bits a byte, the first one low (gpt-oss). F8_E4M3:
# a byte. The others: whole numbers from 0 to 15 less a zero point; INT4 as compressed-tensors packs
# it, in rows [R, C / 8]; GPTQ in words of eight columns [C / 8, R], zero points less one, but for
# version 2; AWQ in words of eight rows [C, R / 8].
PLANES = {"MXFP4_PLANES": 4, "F8_E4M3": 8, "INT4": 4, "GPTQ": 4, "GPTQ_V2": 4, "AWQ": 4}
ZERO = 8  # where no zero points are stored
_FP4 = np.array(
    [0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], dtype=np.float32
)
_IN_WORD = np.arange(8)
_IN_AWQ_WORD = np.array([0, 4, 1, 5, 2, 6, 3, 7])


class Scales(NamedTuple):
    """values [rows, cols], in any order of memory: bfloat16, float16, float32, or uint8 for powers
    of two (E8M0). group: how many rows and columns of weights one stands for; the last ones may
    stand for fewer."""

    values: torch.Tensor
    group: tuple[int, int]

    def of_rows(self, rows: range, cols: int) -> Floats:
        """[rows, cols], one for each weight."""
        down, across = self.group
        first = rows.start // down
        some = _floats(self.values[first : (rows.stop - 1) // down + 1])
        places = np.ix_(np.asarray(rows) // down - first, np.arange(cols) // across)
        of_each: Floats = some[places]
        return of_each


def _floats(values: torch.Tensor) -> Floats:
    if values.dtype is not torch.uint8:
        return values.float().numpy()
    with np.errstate(over="ignore"):
        powers: Floats = np.ldexp(np.float32(1), values.numpy().astype(np.int32) - 127)
    return powers


def decode_planes(
    number_format: str,
    shape: tuple[int, int],
    codes: torch.Tensor,
    scales: Scales,
    zeros: torch.Tensor | None,
    rows: range,
) -> Floats:
    """Some rows of a matrix of ``shape`` [R, C]. codes: its bytes. zeros: words [R / 8, groups] of
    eight rows' zero points, in any order of memory."""
    weights = scales.of_rows(rows, shape[1])
    if number_format == "F8_E4M3":
        bytes_ = codes.view(shape)[rows.start : rows.stop]
        return bytes_.view(torch.float8_e4m3fn).float().numpy() * weights
    numbers = _codes(number_format, shape, codes.numpy(), rows)
    if number_format == "MXFP4_PLANES":
        return _FP4[numbers] * weights
    less: int | NDArray[np.int32] = ZERO
    if zeros is not None:
        groups = np.arange(shape[1]) // scales.group[1]
        less = _zeros(number_format, zeros, rows)[:, groups]
    return (numbers.astype(np.int32) - less).astype(np.float32) * weights


def _codes(
    number_format: str, shape: tuple[int, int], codes: NDArray[np.uint8], rows: range
) -> NDArray[np.uint32]:
    """[rows, C]"""
    num_rows, cols = shape
    if number_format in ("MXFP4_PLANES", "INT4"):
        some = codes.reshape(num_rows, cols // 2)[rows.start : rows.stop]
        both = np.stack([some & 15, some >> 4], axis=2)
        return both.reshape(len(rows), cols).astype(np.uint32)
    words = np.ascontiguousarray(codes).view(np.uint32)
    if number_format == "AWQ":
        each = np.asarray(rows)
        mine = words.reshape(cols, num_rows // 8)[:, each // 8]
        return (mine >> _shifts(_IN_AWQ_WORD[each % 8]) & np.uint32(15)).T
    mine = words.reshape(cols // 8, num_rows)[:, rows.start : rows.stop]
    apart = mine[:, None] >> _shifts(_IN_WORD)[:, None] & 15
    return apart.reshape(cols, len(rows)).T.astype(np.uint32)


def _zeros(number_format: str, zeros: torch.Tensor, rows: range) -> NDArray[np.int32]:
    """[rows, groups]"""
    each = np.asarray(rows)
    places = _IN_AWQ_WORD if number_format == "AWQ" else _IN_WORD
    words = zeros.numpy().view(np.uint32)[each // 8]
    stored = (words >> _shifts(places[each % 8])[:, None] & 15).astype(np.int32)
    zero_points: NDArray[np.int32] = (stored + 1) & 15 if number_format == "GPTQ" else stored
    return zero_points


def _shifts(places: NDArray[np.int64]) -> NDArray[np.uint32]:
    """Bits below a code in its word."""
    return (4 * places).astype(np.uint32)
