"""Experts and matrices as the compiled code reads them: numbers and addresses.

Numbers and layouts are those of native/matrix.hpp and native/engine.hpp. Whoever describes
something keeps it alive.
"""

from __future__ import annotations

import struct
from typing import Any, NamedTuple

import torch

from moe_infinity.kernels.base import Views
from moe_infinity.kernels.packed import PackedMatrix, row_bytes, side_offset

_FORMATS = {"BF16": 0, "F16": 1, "F32": 2, "Q8_0": 3, "Q4_0": 4, "EXACT12": 5}
_FORMATS |= {"Q4_K": 6, "Q5_K": 7, "Q6_K": 8, "MXFP4": 9, "Q5_0": 10, "Q4_1": 11, "Q5_1": 12}
_FORMATS |= {"MXFP4_PLANES": 13, "F8_E4M3": 14, "INT4": 15, "GPTQ": 16, "GPTQ_V2": 17, "AWQ": 18}
TYPES = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}  # of plain formats too
_SCALE_TYPES = {**TYPES, torch.uint8: 3}
_MATRIX = struct.Struct("<QQQQIIIIIIIIII")
_BIAS = struct.Struct("<QII")
_KIND = struct.Struct("<III")  # type, activation, has_gate; then the matrices and biases
_WORD_BYTES = {"GPTQ": 32, "GPTQ_V2": 32, "AWQ": 4}  # of eight rows, from words to the next
NO_MATRIX, _NO_BIAS = bytes(_MATRIX.size), bytes(_BIAS.size)
Blocks = list[torch.Tensor | PackedMatrix]


class Kind(NamedTuple):
    """What of an ExpertMath shows in how its experts are prepared: layers have it in common.

    activation: None where torch does the gate.
    """

    has_gate: bool
    has_bias: bool
    is_transposed: bool
    is_interleaved: bool
    activation: int | None


class Prepared(NamedTuple):
    """One expert as the compiled code reads it.

    call: what follows a call's addresses and number of tokens; None where torch does the gate.
    """

    call: bytes | None
    cols: int  # of the tokens
    is_grouped: bool  # in groups with scales, as torch has no product of


def prepare(kind: Kind, views: Views, dtype: torch.dtype) -> Prepared | None:
    """An expert in its slot, for tokens of ``dtype``; None where the reference computes it."""
    first_name = "gate_up_proj" if kind.has_gate else "up_proj"
    first, last = views[first_name], views["down_proj"]
    blocks = [*first, *last]
    if dtype not in TYPES or not all(_can_multiply(block, dtype) for block in blocks):
        return None
    if kind.is_transposed and not all(isinstance(block, PackedMatrix) for block in blocks):
        return None
    rows, cols = sum(map(num_rows, first)) // (2 if kind.has_gate else 1), num_cols(first[0])
    if set(map(num_cols, first)) != {cols} or set(map(num_cols, last)) != {rows}:
        return None  # the reference says what is wrong
    if sum(map(num_rows, last)) != cols:
        return None  # its results are not of the tokens' size
    whole = _whole(kind, first, last, dtype)
    if whole is not None:
        biases: bytes | None = 3 * _NO_BIAS
        if kind.has_bias:
            biases = _biases(kind, views[f"{first_name}_bias"], views["down_proj_bias"])
        whole = None if biases is None else whole + biases
    if whole is None and (kind.has_bias or kind.is_interleaved):
        return None
    is_grouped = any(isinstance(b, PackedMatrix) and b.format != "EXACT12" for b in blocks)
    return Prepared(whole, cols, is_grouped)


def _whole(kind: Kind, first: Blocks, last: Blocks, dtype: torch.dtype) -> bytes | None:
    """An expert that the compiled code can do in one call, but for its biases."""
    halves = _gate_and_up(kind, first) if kind.has_gate else (NO_MATRIX, describe(first[0]))
    is_one = len(last) == 1 and (kind.has_gate or len(first) == 1)
    if halves is None or kind.activation is None or not is_one:
        return None
    head = _KIND.pack(TYPES[dtype], kind.activation, kind.has_gate)
    return head + halves[0] + halves[1] + describe(last[0])


def describe(
    block: torch.Tensor | PackedMatrix, first: int = 0, every: int = 1, count: int | None = None
) -> bytes:
    """A matrix [out, in] for the compiled code, by address: it must outlive what is made of it.
    ``count`` of its rows from ``first`` on, one of ``every``; all of what is not in rows."""
    count = num_rows(block) if count is None else count
    if isinstance(block, PackedMatrix):
        return _describe_packed(block, first, every, count)
    assert block.stride(1) == 1, "rows are contiguous"
    stride = block.stride(0) * block.element_size()
    at = block.data_ptr() + first * stride
    return _MATRIX.pack(
        at, 0, 0, stride * every, count, block.shape[1], TYPES[block.dtype], *[0] * 7
    )


def _describe_packed(block: PackedMatrix, first: int, every: int, count: int) -> bytes:
    at, cols, number = block.data.data_ptr(), block.cols, _FORMATS[block.format]
    if block.scales is None:
        side = at + side_offset(block.format, block.rows, cols)
        stride = row_bytes(block.format, cols)
        at += first * stride
        return _MATRIX.pack(at, side, 0, stride * every, count, cols, number, *[0] * 7)
    stride = row_bytes(block.format, cols)
    if block.format in _WORD_BYTES:
        stride = _WORD_BYTES[block.format] * block.rows // 8
    values, (group_rows, group_cols) = block.scales
    rows_apart, cols_apart = (n * values.element_size() for n in values.stride())
    zeros_at, zeros_apart = 0, [0, 0]
    if block.zeros is not None:
        zeros_at, zeros_apart = block.zeros.data_ptr(), list(block.zeros.stride())
    return _MATRIX.pack(
        at + first * stride,
        values.data_ptr() + first // group_rows * rows_apart,
        zeros_at,
        stride * every,
        count,
        cols,
        number,
        _SCALE_TYPES[values.dtype],
        rows_apart * every,
        cols_apart,
        group_rows,
        group_cols,
        *(4 * n for n in zeros_apart),
    )


def _gate_and_up(kind: Kind, blocks: Blocks) -> tuple[bytes, bytes] | None:
    """Of gate_up: two blocks, or the two halves of one; None if neither."""
    if len(blocks) == 2 and num_rows(blocks[0]) == num_rows(blocks[1]):
        return describe(blocks[0]), describe(blocks[1])
    half, odd = divmod(num_rows(blocks[0]), 2)
    every, second = (2, 1) if kind.is_interleaved else (1, half)
    if len(blocks) != 1 or odd or not _is_divisible(blocks[0], second):
        return None
    return describe(blocks[0], 0, every, half), describe(blocks[0], second, every, half)


def _is_divisible(block: torch.Tensor | PackedMatrix, first: int) -> bool:
    """Whether rows from ``first`` on, or every other one, can be described by themselves."""
    if not isinstance(block, PackedMatrix):
        return True
    if block.scales is None:
        return block.format != "EXACT12"
    return block.format in ("MXFP4_PLANES", "F8_E4M3") and first % block.scales.group[0] == 0


def _biases(kind: Kind, first: Blocks, last: Blocks) -> bytes | None:
    """Of gate, up and down."""
    if not all(isinstance(b, torch.Tensor) and b.dtype in TYPES for b in (*first, *last)):
        return None
    if not kind.has_gate:
        halves = [None, *first]
    elif len(first) == 1 and kind.is_interleaved:
        halves = [first[0][0::2], first[0][1::2]]  # type: ignore[index]
    else:
        halves = list(first if len(first) == 2 else first[0].chunk(2))  # type: ignore[union-attr]
    if len(halves) != 2 or len(last) != 1:
        return None
    return b"".join(_NO_BIAS if b is None else _describe_bias(b) for b in (*halves, *last))


def _describe_bias(bias: Any) -> bytes:
    return _BIAS.pack(bias.data_ptr(), bias.stride(0) * bias.element_size(), TYPES[bias.dtype])


def _can_multiply(block: torch.Tensor | PackedMatrix, dtype: torch.dtype) -> bool:
    if isinstance(block, PackedMatrix):
        return block.format in _FORMATS
    is_row_major = block.ndim == 2 and block.stride(1) == 1
    return is_row_major and block.dtype in TYPES and dtype in (block.dtype, torch.float32)


def num_rows(block: torch.Tensor | PackedMatrix) -> int:
    return block.rows if isinstance(block, PackedMatrix) else block.shape[0]


def num_cols(block: torch.Tensor | PackedMatrix) -> int:
    return block.cols if isinstance(block, PackedMatrix) else block.shape[-1]
