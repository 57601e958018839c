"""Number formats of expert weights, and how a part's bytes in a slot become tensors."""

from __future__ import annotations

import torch

from moe_infinity.errors import UnsupportedModelError
from moe_infinity.kernels.base import Views
from moe_infinity.kernels.packed import PACKED, PackedMatrix
from moe_infinity.kernels.planes import PLANES, Scales
from moe_infinity.types import Block, ExpertSpec, Part, Plane

DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
SIDE_DTYPES = {**DTYPES, "U8": torch.uint8, "F8_E8M0": torch.uint8, "I32": torch.int32}


def require_supported(name: str, number_format: str) -> None:
    """Raise UnsupportedModelError unless expert weights of a safetensors file can be computed."""
    if number_format not in (*DTYPES, *PLANES):
        raise UnsupportedModelError(
            f"expert tensor {name!r} is stored as {number_format}, expected one of "
            f"{', '.join((*DTYPES, *PLANES))}; use the model's 16-bit checkpoint"
        )


def part_views(spec: ExpertSpec, slot: torch.Tensor) -> Views:
    """The blocks of every part as views of ``slot`` ([slot_bytes] uint8); nothing is copied.

    Only a block that does not start at a multiple of its element size is copied, because torch
    cannot view it.
    """
    return Views(
        {part.name: [_view(part, block, slot) for block in part.blocks] for part in spec.parts}
    )


def is_viewable(spec: ExpertSpec) -> bool:
    """Whether part_views copies nothing of this expert."""
    return all(
        offset % (1 if number_format in PACKED else SIDE_DTYPES[number_format].itemsize) == 0
        for part in spec.parts
        for block in part.blocks
        for offset, number_format in _places(part, block)
    )


def _places(part: Part, block: Block) -> list[tuple[int, str]]:
    planes = [plane for plane in (block.scales, block.zeros) if plane is not None]
    return [(block.offset_bytes, part.format)] + [(p.offset_bytes, p.format) for p in planes]


def _view(part: Part, block: Block, slot: torch.Tensor) -> torch.Tensor | PackedMatrix:
    if part.format not in PACKED:
        dtype = DTYPES[part.format]
        return _strided(slot, block.offset_bytes, dtype, block.shape, block.strides)
    rows, cols = block.shape
    scales = zeros = None
    if block.scales is not None:
        scales = Scales(_plane_view(block.scales, slot), block.scales.group)
    if block.zeros is not None:
        zeros = _plane_view(block.zeros, slot)
    data = slot[block.offset_bytes :]
    return PackedMatrix(part.format, rows, cols, data, scales, zeros)


def _plane_view(plane: Plane, slot: torch.Tensor) -> torch.Tensor:
    dtype = SIDE_DTYPES[plane.format]
    return _strided(slot, plane.offset_bytes, dtype, plane.shape, plane.strides)


def span_bytes(shape: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype) -> int:
    """From the first byte of a strided rectangle to behind its last."""
    extent = 1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
    return extent * dtype.itemsize


def _strided(
    slot: torch.Tensor,
    offset_bytes: int,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    strides: tuple[int, ...],
) -> torch.Tensor:
    raw = slot[offset_bytes : offset_bytes + span_bytes(shape, strides, dtype)]
    if raw.storage_offset() % dtype.itemsize:
        raw = raw.clone()
    return raw.view(dtype).as_strided(shape, strides)
