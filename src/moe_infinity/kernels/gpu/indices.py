"""Which tokens of which jobs, as tensors on the device. Knows nothing of kernels.

J: jobs, P: places, one for each token of each job, F: fields of a table's row.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from moe_infinity.kernels.base import Places
from moe_infinity.kernels.gpu.launches import Jobs
from moe_infinity.kernels.gpu.layout import NUM_FIELDS, Row

_ALIGNMENT = 4  # int32 numbers: launches are compiled for tensors that begin at 16 bytes


def rows_of(parts: list[torch.Tensor]) -> tuple[torch.Tensor, Places]:
    """One tensor [T, H] that all parts [., H] are rows of, and which: copied together only if they
    do not lie in one tensor already."""
    whole = _common(parts)
    if whole is not None:
        return whole
    return torch.cat(parts), _one_after_another(parts)


def room_for(parts: list[torch.Tensor]) -> tuple[torch.Tensor, Places]:
    """As ``rows_of``, of what is to be written: a new tensor where parts lie apart."""
    whole = _common(parts)
    if whole is not None:
        return whole
    num_rows = sum(map(len, parts))
    return parts[0].new_empty((num_rows, parts[0].shape[1])), _one_after_another(parts)


def of_jobs(
    rows: list[Row], token_of: Places, place_of: Places, most: int, device: torch.device
) -> Jobs:
    """One copy to the device for all. most: tokens of one entry; jobs of more become several."""
    pieces = [
        (job, first, min(first + most, len(tokens)))
        for job, tokens in enumerate(token_of)
        for first in range(0, len(tokens), most)
    ]
    ends = np.cumsum([last - first for _, first, last in pieces])
    numbers = [
        np.asarray(rows, dtype=np.int64).view(np.int32).ravel(),
        np.array([job for job, *_ in pieces], dtype=np.int32),
        np.concatenate([[0], ends]).astype(np.int32),
        np.concatenate(token_of).astype(np.int32, copy=False),
        np.concatenate(place_of).astype(np.int32, copy=False),
    ]
    table, which, starts, tokens, places = _on_device(numbers, device)
    return Jobs(table.view(torch.int64).view(-1, NUM_FIELDS), which, starts, tokens, places)


def of_one(table: torch.Tensor, num_tokens: int, most: int) -> Jobs:
    """All tokens to the one row of a table, made on the device."""
    device = table.device
    num_jobs = -(-num_tokens // most)
    starts = torch.arange(num_jobs + 1, dtype=torch.int32, device=device) * most
    tokens = torch.arange(num_tokens, dtype=torch.int32, device=device)
    which = torch.zeros(num_jobs, dtype=torch.int32, device=device)
    return Jobs(table, which, starts.clamp_(max=num_tokens), tokens, tokens)


def is_computed(jobs: Jobs, num_rows: int) -> torch.Tensor:
    """[num_rows] bool: the rows of the result that these jobs write; nothing leaves the device."""
    places = torch.arange(len(jobs.place_of), dtype=torch.int32, device=jobs.place_of.device)
    job_of = torch.searchsorted(jobs.starts, places, right=True) - 1
    is_one = (job_of >= 0) & (job_of < len(jobs.which))
    is_one &= jobs.which[job_of.clamp(0, len(jobs.which) - 1)] >= 0
    found = torch.zeros(num_rows + 1, dtype=torch.bool, device=places.device)
    found[torch.where(is_one, jobs.place_of, num_rows).long()] = True
    found[num_rows] = False
    return found[:num_rows]


def _common(parts: list[torch.Tensor]) -> tuple[torch.Tensor, Places] | None:
    cols, storage = parts[0].shape[1], parts[0].untyped_storage().data_ptr()
    offsets = [part.storage_offset() for part in parts]
    start = min(offsets)
    if any(part.untyped_storage().data_ptr() != storage for part in parts):
        return None
    if any((offset - start) % cols for offset in offsets):
        return None
    firsts = [(offset - start) // cols for offset in offsets]
    last = max(first + len(part) for first, part in zip(firsts, parts, strict=True))
    whole = parts[0].as_strided((last, cols), (cols, 1), start)
    return whole, [
        np.arange(first, first + len(part), dtype=np.int32)
        for first, part in zip(firsts, parts, strict=True)
    ]


def _one_after_another(parts: list[torch.Tensor]) -> Places:
    numbers = np.arange(sum(map(len, parts)), dtype=np.int32)
    return np.split(numbers, np.cumsum([len(part) for part in parts])[:-1])


def _on_device(numbers: list[NDArray[np.int32]], device: torch.device) -> list[torch.Tensor]:
    sizes = [len(each) for each in numbers]
    starts = np.cumsum([0, *(-(-size // _ALIGNMENT) * _ALIGNMENT for size in sizes)])
    together = torch.empty(int(starts[-1]), dtype=torch.int32, pin_memory=device.type == "cuda")
    for start, each in zip(starts, numbers, strict=False):
        together[start : start + len(each)] = torch.from_numpy(each)
    there = together.to(device, non_blocking=True)
    return [there[start : start + size] for start, size in zip(starts, sizes, strict=False)]
