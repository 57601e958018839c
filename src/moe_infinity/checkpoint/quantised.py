"""Quantised weights in safetensors files: which tensors are a weight's codes, scales, zero points.

The codes take the name and shape of the weight; its scales and zero points go beside it
(``Sides``), so that everything else sees a model's usual tensors. Methods are those of the
``quantization_config`` in config.json.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from moe_infinity.checkpoint.base import SidePlane, Sides, TensorEntry
from moe_infinity.errors import CorruptCheckpointError, UnsupportedModelError

Tensors = dict[str, TensorEntry]
_FLOATS = ("BF16", "F16", "F32")
_POWERS = ("U8", "F8_E8M0")
_UNIT = 32  # columns that kernels take at once: groups are multiples of it
# Of activations and keys, which are computed as they are; and words about what is told elsewhere.
_IGNORED = (
    *(".input_scale", "activation_scale", "activation_scale_inv", ".k_scale", ".v_scale"),
    *(".weight_shape", ".g_idx"),
)


def quantisation_of(path: Path) -> dict[str, Any] | None:
    """What a folder's config.json says of quantised weights; None if it does not, or cannot be
    read: whoever builds a model of it says so."""
    try:
        raw = json.loads((path / "config.json").read_text())
        values = (raw, raw.get("text_config") or {})
        found = (v.get(n) for v in values for n in ("quantization_config", "compression_config"))
        return next((each for each in found if isinstance(each, dict) and each), None)
    except (OSError, ValueError, AttributeError):
        return None


def gather(
    path: Path, stored: Mapping[str, TensorEntry], quantisation: Mapping[str, Any]
) -> tuple[Tensors, dict[str, Sides]]:
    """The model's tensors, and what of them lies apart.

    Raises UnsupportedModelError for a method or form that is not known here, CorruptCheckpointError
    for tensors that do not fit together or are not what the config says.
    """
    method = str(quantisation.get("quant_method", "")).replace("_", "-")
    find = _METHODS.get(method)
    if find is None:
        raise UnsupportedModelError(
            f"{path}: the weights are quantised by {method or 'an unnamed method'!r}, expected one "
            f"of {', '.join(_METHODS)}; use the model's 16-bit checkpoint"
        )
    tensors = {n: e for n, e in stored.items() if not n.endswith(_IGNORED)}
    sides: dict[str, Sides] = {}
    try:
        for coded, its_sides, used in find(tensors, quantisation):
            for name in used:
                tensors.pop(name, None)
            tensors[coded.name] = coded
            sides[coded.name] = its_sides
    except _Misfit as error:
        kind = UnsupportedModelError if error.is_unknown else CorruptCheckpointError
        raise kind(f"{path}: {error}") from error
    if not sides:
        raise CorruptCheckpointError(
            f"{path}: its config says the weights are quantised by {method}, expected such tensors "
            f"and found none; is the config of another checkpoint?"
        )
    return tensors, sides


class _Misfit(Exception):
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
        if not fits or scales.format not in _POWERS:
            raise _misfit(entry, scales, "16 bytes for each scale of a byte")
        shape = (*lead, num_groups * _UNIT)
        coded = replace(entry, name=stem, format="MXFP4_PLANES", shape=shape)
        grid = (math.prod(lead), num_groups)
        yield coded, Sides(_plane(scales, grid, (1, _UNIT))), (name, scales.name)


def _fp8(tensors: Tensors, quantisation: Mapping[str, Any]) -> _Found:
    """X in float8 with scales for blocks, rows or all of it under one of several names."""
    block = quantisation.get("weight_block_size")
    for name, entry in [(n, e) for n, e in tensors.items() if e.format == "F8_E4M3"]:
        stem = name.removesuffix(".weight")
        names = (f"{name}_scale_inv", f"{name}_scale", f"{stem}.scale", f"{stem}.qscale_weight")
        found = next((each for each in names if each in tensors), names[0])
        scales = _beside(tensors, name, found)
        yield entry, Sides(_grid(entry, scales, block)), (found,)


def _grid(entry: TensorEntry, scales: TensorEntry, block: Any) -> SidePlane:
    """Of a tensor [..., R, C]: one scale for it, for each row, or for each block."""
    if len(entry.shape) < 2 or scales.format not in (*_FLOATS, *_POWERS):
        raise _misfit(entry, scales, "matrices with scales in floats or powers of two")
    *lead, rows, cols = entry.shape
    count, given = math.prod(lead), math.prod(scales.shape)
    if given == count:
        return _plane(scales, (count, 1), (rows, cols))
    if given == count * rows and scales.shape[-1] in (1, rows):
        return _plane(scales, (count * rows, 1), (1, cols))
    down, across = scales.shape[-2:] if len(scales.shape) > 1 else (0, 0)
    height, width = _block_of(rows, cols, down, across, block)
    is_whole = down == -(-rows // height) and across == -(-cols // width)
    if given != count * down * across or not is_whole or (count > 1 and rows % height):
        raise _misfit(entry, scales, f"a scale for each block of {height} x {width}")
    if width % _UNIT and width < cols:
        raise _Misfit(f"{entry.name!r}: scales stand for {width} columns, expected 32s", True)
    return _plane(scales, (count * down, across), (height, width))


def _block_of(rows: int, cols: int, down: int, across: int, block: Any) -> tuple[int, int]:
    """As the config says; else what divides the matrix."""
    if isinstance(block, list) and len(block) == 2 and all(type(n) is int and n > 0 for n in block):
        return block[0], block[1]
    return -(-rows // max(1, down)), -(-cols // max(1, across))


def _compressed(tensors: Tensors, quantisation: Mapping[str, Any]) -> _Found:
    """compressed-tensors: 4-bit words in rows with scales of groups, and float8."""
    for name, entry in [(n, e) for n, e in tensors.items() if n.endswith(".weight_packed")]:
        stem = name.removesuffix("weight_packed")
        scales = _beside(tensors, name, f"{stem}weight_scale")
        rows, words = entry.shape if len(entry.shape) == 2 else (0, 0)
        groups = scales.shape[-1] if scales.shape else 0
        if f"{stem}weight_g_idx" in tensors:
            raise _Misfit(f"{name!r} has its columns in another order, expected their own", True)
        if entry.format != "I32" or scales.shape != (rows, groups) or scales.format not in _FLOATS:
            raise _Misfit(
                f"{name!r} is stored as {entry.format} {list(entry.shape)} with scales "
                f"{scales.format} {list(scales.shape)}, expected words of eight 4-bit weights and "
                f"float scales [rows, groups]",
                is_unknown=True,
            )
        group = _group(entry, words * 8, groups)
        zeros = tensors.get(f"{stem}weight_zero_point")
        its_zeros = None
        if zeros is not None:
            _require_words(entry, zeros, (rows // 8, groups))
            its_zeros = _plane(zeros, (rows // 8, groups), (8, group))
        coded = replace(entry, name=f"{stem}weight", format="INT4", shape=(rows, words * 8))
        used = (name, scales.name, f"{stem}weight_zero_point")
        yield coded, Sides(_plane(scales, (rows, groups), (1, group)), its_zeros), used
    yield from _fp8(tensors, quantisation)


def _gptq(tensors: Tensors, quantisation: Mapping[str, Any]) -> _Found:
    """X.qweight words [C / 8, R], X.scales [G, R], X.qzeros words [G, R / 8]."""
    if quantisation.get("desc_act"):
        raise _Misfit("GPTQ with desc_act true, expected columns in their order (false)", True)
    is_second = quantisation.get("checkpoint_format") == "gptq_v2"
    yield from _in_columns(tensors, quantisation, "GPTQ_V2" if is_second else "GPTQ", 8, 1)


def _awq(tensors: Tensors, quantisation: Mapping[str, Any]) -> _Found:
    """X.qweight words [C, R / 8], X.scales [G, R], X.qzeros words [G, R / 8]."""
    version = str(quantisation.get("version", "gemm")).lower()
    if version != "gemm":
        raise _Misfit(f"AWQ in the layout {version!r}, expected 'gemm'", True)
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
        raise _Misfit(f"got weights of {bits} bits, expected 4", True)
    for name, entry in [(n, e) for n, e in tensors.items() if n.endswith(".qweight")]:
        stem = name.removesuffix("qweight")
        scales = _beside(tensors, name, f"{stem}scales")
        zeros = _beside(tensors, name, f"{stem}qzeros")
        down, across = entry.shape if len(entry.shape) == 2 else (0, 0)
        cols, rows = down * word_cols, across * word_rows
        groups = scales.shape[0] if scales.shape else 0
        if entry.format != "I32" or scales.shape != (groups, rows) or scales.format not in _FLOATS:
            raise _misfit(entry, scales, "words and float scales [groups, rows]")
        _require_words(entry, zeros, (groups, rows // 8))
        group = _group(entry, cols, groups)
        coded = replace(entry, name=f"{stem}weight", format=number_format, shape=(rows, cols))
        planes = Sides(
            SidePlane(scales, (rows, groups), (1, rows), (1, group)),
            SidePlane(zeros, (rows // 8, groups), (1, rows // 8), (8, group)),
        )
        yield coded, planes, (name, scales.name, zeros.name)


_METHODS: Mapping[str, _Finder] = {
    "mxfp4": _mxfp4,
    "fp8": _fp8,
    "compressed-tensors": _compressed,
    "gptq": _gptq,
    "awq": _awq,
}


def _plane(entry: TensorEntry, grid: tuple[int, int], group: tuple[int, int]) -> SidePlane:
    return SidePlane(entry, grid, (grid[1], 1), group)


def _group(entry: TensorEntry, cols: int, groups: int) -> int:
    """Columns of a group. What the config says of it may be wrong; the tensors are not."""
    size = cols // groups if groups else 0
    if not size or cols % groups or (size % _UNIT and groups > 1):
        raise _Misfit(
            f"{entry.name!r} has {groups} groups of scales for {cols} columns, expected groups "
            f"of a multiple of {_UNIT} that divide them"
        )
    return size


def _require_words(entry: TensorEntry, zeros: TensorEntry, shape: tuple[int, int]) -> None:
    if zeros.format != "I32" or zeros.shape != shape:
        raise _misfit(entry, zeros, f"zero points in words {list(shape)}")


def _beside(tensors: Tensors, name: str, wanted: str) -> TensorEntry:
    if wanted not in tensors:
        raise _Misfit(f"tensor {name!r} has no {wanted!r} beside it, expected its scales")
    return tensors[wanted]


def _misfit(entry: TensorEntry, side: TensorEntry, expected: str) -> _Misfit:
    return _Misfit(
        f"{entry.name!r} is stored as {entry.format} {list(entry.shape)} with {side.name!r} "
        f"{side.format} {list(side.shape)}, expected {expected}"
    )
