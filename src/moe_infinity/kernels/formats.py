"""Number formats of expert weights, and how a part's bytes in a slot become tensors."""

from __future__ import annotations

import torch

from moe_infinity.errors import UnsupportedModelError
from moe_infinity.kernels.base import Views
from moe_infinity.kernels.packed import PACKED, PackedMatrix
from moe_infinity.types import Block, ExpertSpec, Part

DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


def require_supported(name: str, number_format: str) -> None:
    """Raise UnsupportedModelError unless expert weights of this format can be computed."""
    if number_format not in DTYPES:
        raise UnsupportedModelError(
            f"expert tensor {name!r} is stored as {number_format}, expected one of "
            f"{', '.join(DTYPES)}; quantised experts cannot be run by this version: use the "
            f"model's 16-bit checkpoint"
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
        part.format in PACKED or block.offset_bytes % DTYPES[part.format].itemsize == 0
        for part in spec.parts
        for block in part.blocks
    )


def _view(part: Part, block: Block, slot: torch.Tensor) -> torch.Tensor | PackedMatrix:
    if part.format in PACKED:
        rows, cols = block.shape
        return PackedMatrix(part.format, rows, cols, slot[block.offset_bytes :])
    dtype = DTYPES[part.format]
    extent = 1 + sum((n - 1) * s for n, s in zip(block.shape, block.strides, strict=True))
    raw = slot[block.offset_bytes : block.offset_bytes + extent * dtype.itemsize]
    if raw.storage_offset() % dtype.itemsize:
        raw = raw.clone()
    return raw.view(dtype).as_strided(block.shape, block.strides)
