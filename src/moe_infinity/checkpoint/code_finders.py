"""How each method of quantisation stores a weight: what its tensors are, and whether they fit."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from moe_infinity.checkpoint.base import SidePlane, Sides, TensorEntry

Tensors = dict[str, TensorEntry]
_FLOATS = ("BF16", "F16", "F32")
_POWERS = ("U8", "F8_E8M0")
_UNIT = 32  # columns that kernels take at once: groups are multiples of it


class Misfit(Exception):
    """What does not fit; is_unknown: it may be sound all the same."""

    def __init__(self, message: str, is_unknown: bool = False) -> None:
        super().__init__(message)
        self.is_unknown = is_unknown


_Found = Iterator[tuple[TensorEntry, Sides, tuple[str, ...]]]  # a weight, and tensors it replaces
_Finder = Callable[[Tensors, Mapping[str, Any]], _Found]


def _mxfp4(tensors: Tensors, quantisation: Mapping[str, Any]) -> _Found:
    """gpt-oss: X_blocks [..., R, G, 16] and X_scales [..., R, G] are X."""
    for name, entry in [(n, e) for n, e in tensors.items() if n.endswith("_blocks")]:
        stem = name.removesuffix("_blocks")
        scales = _beside(tensors, name, f"{stem}_scales")
        *lead, num_groups, size = entry.shape if len(entry.shape) > 2 else (1, 1, 0)
        fits = entry.format == "U8" and size == 16 and scales.shape == (*lead, num_groups)
        fits = fits and all(entry.shape)
        if not fits or scales.format not in _POWERS:
            raise _misfit(entry, scales, "16 bytes for each scale of a byte")
        shape = (*lead, num_groups * _UNIT)
        coded = replace(entry, name=stem, format="MXFP4_PLANES", shape=shape)
        grid = (math.prod(lead), num_groups)
        yield coded, Sides(_plane(scales, grid, (1, _UNIT))), (name, scales.name)


def _fp8(tensors: Tensors, quantisation: Mapping[str, Any]) -> _Found:
    """X in float8 with scales for blocks, rows or all of it under one of several names."""
    said = [quantisation.get("weight_block_size"), *_said(quantisation, "block_structure")]
    blocks = [(each[0], each[1]) for each in said if _is_pair(each)]
    for name, entry in [(n, e) for n, e in tensors.items() if e.format == "F8_E4M3"]:
        stem = name.removesuffix(".weight")
        names = (f"{name}_scale_inv", f"{name}_scale", f"{stem}.scale", f"{stem}.qscale_weight")
        found = next((each for each in names if each in tensors), names[0])
        scales = _beside(tensors, name, found)
        yield entry, Sides(_grid(entry, scales, blocks)), (found,)


def _said(quantisation: Mapping[str, Any], name: str) -> list[Any]:
    """What compressed-tensors says of weights, for each of its groups of layers."""
    groups = quantisation.get("config_groups")
    described = groups.values() if isinstance(groups, dict) else ()
    weights = (each.get("weights") for each in described if isinstance(each, dict))
    return [each[name] for each in weights if isinstance(each, dict) and name in each]


def _is_pair(value: Any) -> bool:
    return (
        isinstance(value, list) and len(value) == 2 and all(type(n) is int and n > 0 for n in value)
    )


def _grid(entry: TensorEntry, scales: TensorEntry, blocks: list[tuple[int, int]]) -> SidePlane:
    """Of a tensor [..., R, C]: one scale for it, for each block of a size that the config names or
    that divides the tensor, or for each row."""
    known = scales.format in (*_FLOATS, *_POWERS)
    if len(entry.shape) < 2 or not known or not all((*entry.shape, *scales.shape)):
        raise _misfit(entry, scales, "matrices with scales in floats or powers of two")
    *lead, rows, cols = entry.shape
    count, given = math.prod(lead), math.prod(scales.shape)
    if given == count:
        return _plane(scales, (count, 1), (rows, cols))
    down, across = scales.shape[-2:] if len(scales.shape) > 1 else (0, 0)
    if down * across * count == given:
        for height, width in (*blocks, *_dividing(rows, cols, down, across)):
            if (down, across) != (-(-rows // height), -(-cols // width)):
                continue
            if (count > 1 and rows % height) or (width % _UNIT and width < cols):
                raise Misfit(
                    f"{entry.name!r} has scales of blocks {height} x {width}, expected columns by "
                    f"{_UNIT} and blocks of one matrix",
                    is_unknown=True,
                )
            return _plane(scales, (count * down, across), (height, width))
    if scales.shape in ((count * rows,), (count, rows)):
        return _plane(scales, (count * rows, 1), (1, cols))
    raise _misfit(entry, scales, "a scale for all of it, for each row or for each block")


def _dividing(rows: int, cols: int, down: int, across: int) -> list[tuple[int, int]]:
    """The blocks that so many scales stand for, if they divide the matrix."""
    return [] if rows % down or cols % across else [(rows // down, cols // across)]


def _compressed(tensors: Tensors, quantisation: Mapping[str, Any]) -> _Found:
    """compressed-tensors: 4-bit words in rows with scales of groups, and float8."""
    bits = _said(quantisation, "num_bits")
    packed = [(n, e) for n, e in tensors.items() if n.endswith(".weight_packed")]
    if packed and bits and 4 not in bits:
        raise Misfit(f"got weights of {bits[0]} bits in words, expected 4", True)
    for name, entry in packed:
        stem = name.removesuffix("weight_packed")
        scales = _beside(tensors, name, f"{stem}weight_scale")
        rows, words = entry.shape if len(entry.shape) == 2 else (0, 0)
        groups = scales.shape[-1] if scales.shape else 0
        if f"{stem}weight_g_idx" in tensors:
            raise Misfit(f"{name!r} has its columns in another order, expected their own", True)
        is_sound = rows > 0 and scales.shape == (rows, groups)
        if entry.format != "I32" or not is_sound or scales.format not in _FLOATS:
            raise Misfit(
                f"{name!r} is stored as {entry.format} {list(entry.shape)} with scales "
                f"{scales.format} {list(scales.shape)}, expected words of eight 4-bit weights and "
                f"float scales [rows, groups]",
                is_unknown=True,
            )
        group = _group(entry, words * 8, groups, _said(quantisation, "group_size"))
        zeros = tensors.get(f"{stem}weight_zero_point")
        its_zeros = None
        if zeros is not None:
            its_zeros = _zero_points(entry, zeros, rows, groups, (groups, 1), group)
        coded = replace(entry, name=f"{stem}weight", format="INT4", shape=(rows, words * 8))
        used = (name, scales.name, f"{stem}weight_zero_point")
        yield coded, Sides(_plane(scales, (rows, groups), (1, group)), its_zeros), used
    yield from _fp8(tensors, quantisation)


def _gptq(tensors: Tensors, quantisation: Mapping[str, Any]) -> _Found:
    """X.qweight words [C / 8, R], X.scales [G, R], X.qzeros words [G, R / 8]."""
    if quantisation.get("desc_act"):
        raise Misfit("GPTQ with desc_act true, expected columns in their order (false)", True)
    is_second = quantisation.get("checkpoint_format") == "gptq_v2"
    yield from _in_columns(tensors, quantisation, "GPTQ_V2" if is_second else "GPTQ", 8, 1)


def _awq(tensors: Tensors, quantisation: Mapping[str, Any]) -> _Found:
    """X.qweight words [C, R / 8], X.scales [G, R], X.qzeros words [G, R / 8]."""
    version = str(quantisation.get("version") or "gemm").lower()
    if version != "gemm":
        raise Misfit(f"AWQ in the layout {version!r}, expected 'gemm'", True)
    yield from _in_columns(tensors, quantisation, "AWQ", 1, 8)


def _in_columns(
    tensors: Tensors,
    quantisation: Mapping[str, Any],
    number_format: str,
    word_cols: int,
    word_rows: int,
) -> _Found:
    bits = quantisation.get("bits", quantisation.get("w_bit", 4))
    if bits != 4:
        raise Misfit(f"got weights of {bits} bits, expected 4", True)
    for name, entry in [(n, e) for n, e in tensors.items() if n.endswith(".qweight")]:
        stem = name.removesuffix("qweight")
        scales = _beside(tensors, name, f"{stem}scales")
        zeros = _beside(tensors, name, f"{stem}qzeros")
        down, across = entry.shape if len(entry.shape) == 2 else (0, 0)
        cols, rows = down * word_cols, across * word_rows
        groups = scales.shape[0] if scales.shape else 0
        if entry.format != "I32" or scales.shape != (groups, rows) or scales.format not in _FLOATS:
            raise _misfit(
                entry,
                scales,
                f"words, and float scales [groups, {rows}]; is quant_method of config.json right?",
            )
        if cols % 8:
            raise Misfit(f"{name!r} has {cols} columns, expected a multiple of 8", True)
        group = _group(entry, cols, groups, [quantisation.get("group_size")])
        coded = replace(entry, name=f"{stem}weight", format=number_format, shape=(rows, cols))
        planes = Sides(
            SidePlane(scales, (rows, groups), (1, rows), (1, group)),
            _zero_points(entry, zeros, rows, groups, (1, rows // 8), group),
        )
        yield coded, planes, (name, scales.name, zeros.name)


def _plane(entry: TensorEntry, grid: tuple[int, int], group: tuple[int, int]) -> SidePlane:
    return SidePlane(entry, grid, (grid[1], 1), group)


def _group(entry: TensorEntry, cols: int, groups: int, said: list[Any]) -> int:
    """Columns of a group: as the config says, if there are as many scales; else what divides."""
    if not cols or not groups:
        raise Misfit(f"{entry.name!r} has {groups} groups for {cols} columns, expected some")
    for size in said:
        if type(size) is int and size > 0 and groups == -(-cols // size) and not size % _UNIT:
            return min(size, cols)
    size = cols // groups
    if cols % groups or (size % _UNIT and groups > 1):
        raise Misfit(
            f"{entry.name!r} has {groups} groups of scales for {cols} columns, expected groups "
            f"of a multiple of {_UNIT} that divide them"
        )
    return size


def _zero_points(
    entry: TensorEntry,
    zeros: TensorEntry,
    rows: int,
    groups: int,
    strides: tuple[int, int],
    group: int,
) -> SidePlane:
    """Words of eight rows each."""
    if rows % 8 or not rows:
        raise Misfit(f"{entry.name!r} has {rows} rows, expected a multiple of 8", True)
    shape = (rows // 8, groups)
    wanted = shape if strides[1] == 1 else shape[::-1]
    if zeros.format != "I32" or zeros.shape != wanted:
        raise _misfit(entry, zeros, f"zero points in words {list(wanted)}")
    return SidePlane(zeros, shape, strides, (8, group))


def _beside(tensors: Tensors, name: str, wanted: str) -> TensorEntry:
    if wanted not in tensors:
        raise Misfit(f"tensor {name!r} has no {wanted!r} beside it, expected its scales")
    return tensors[wanted]


def _misfit(entry: TensorEntry, side: TensorEntry, expected: str) -> Misfit:
    return Misfit(
        f"{entry.name!r} is stored as {entry.format} {list(entry.shape)} with {side.name!r} "
        f"{side.format} {list(side.shape)}, expected {expected}"
    )


METHODS: Mapping[str, _Finder] = {
    "mxfp4": _mxfp4,
    "fp8": _fp8,
    "compressed-tensors": _compressed,
    "gptq": _gptq,
    "awq": _awq,
}
