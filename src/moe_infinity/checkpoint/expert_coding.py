"""One expert's bytes as they are packed, from those its source has."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from moe_infinity.checkpoint.pack_format import FORMATS
from moe_infinity.checkpoint.pack_job import BLOCK_ALIGNMENT, Job
from moe_infinity.kernels.formats import part_views
from moe_infinity.kernels.packed import PACKED, PackedMatrix, encode
from moe_infinity.types import Block, ExpertKey, Part


def coded_expert(job: Job, key: ExpertKey, slot: memoryview) -> tuple[memoryview, list[Part]]:
    """One expert's bytes, packed, and where its parts lie in them."""
    spec = job.specs[key]
    views = part_views(spec, torch.frombuffer(slot, dtype=torch.uint8))
    data = bytearray()
    parts = []
    for part in spec.parts:
        number_format = FORMATS[job.experts_format]
        blocks = [_numbers(block, number_format) for block in views[part.name]]
        if part.name == "gate_up_proj" and len(blocks) == 1:
            if job.splits_gate_up:
                blocks = list(blocks[0].chunk(2))
            elif job.is_interleaved and part.format in PACKED:
                blocks = [blocks[0][0::2], blocks[0][1::2]]
        plain = replace(part, format="BF16") if part.format in PACKED else part
        parts.append(_append(data, plain, blocks, number_format, job.is_transposed))
    return memoryview(data), parts


def _append(
    data: bytearray,
    part: Part,
    blocks: list[torch.Tensor],
    number_format: str | None,
    is_transposed: bool,
) -> Part:
    """Code a part's blocks behind ``data``; all of them plain if one of them does not pay.
    is_transposed: the model would have plain ones [in, out]; what was coded is not."""
    coded: list[Any] = []  # bytes of each block
    if number_format is not None and len(part.shape) == 2:
        coded = [encode(block, number_format) for block in blocks]
    if not coded or any(each is None for each in coded):
        if is_transposed and len(part.shape) == 2 and part.concat_dim == 0:
            blocks, part = (
                [b.T for b in blocks],
                replace(part, shape=part.shape[::-1], concat_dim=1),
            )
        coded, number_format = [raw_bytes(block) for block in blocks], None
    found, origin = [], 0
    for block, each in zip(blocks, coded, strict=True):
        data.extend(bytes(-len(data) % BLOCK_ALIGNMENT))
        found.append(Block(len(data), tuple(block.shape), _row_major(block.shape), origin))
        data.extend(memoryview(each))
        origin += block.shape[part.concat_dim]
    return replace(part, format=number_format or part.format, blocks=tuple(found))


def _numbers(block: torch.Tensor | PackedMatrix, number_format: str | None) -> torch.Tensor:
    """What is to be coded, as exactly as it can be."""
    if not isinstance(block, PackedMatrix):
        return block
    decoded = block.decode()
    return decoded.to(torch.bfloat16) if number_format in (None, "EXACT12") else decoded


def raw_bytes(block: torch.Tensor) -> np.ndarray[Any, np.dtype[np.uint8]]:
    return block.contiguous().view(-1).view(torch.uint8).numpy()


def _row_major(shape: Sequence[int]) -> tuple[int, ...]:
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= size
    return tuple(reversed(strides))
