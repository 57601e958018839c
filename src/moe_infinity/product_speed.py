"""How fast this machine multiplies by weights, in each of their formats."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from moe_infinity.kernels import native
from moe_infinity.kernels.choice import choose
from moe_infinity.kernels.described import describe
from moe_infinity.kernels.formats import DTYPES
from moe_infinity.kernels.packed import PackedMatrix, row_bytes
from moe_infinity.kernels.planes import PLANES, Scales
from moe_infinity.kernels.reference import plain

# Beyond most processors' caches, yet small enough to measure inside a tight budget.
BEYOND_CACHES_BYTES = 64 * 1024**2
_UNIT = 256  # columns that every format can have
# What weights are made of: an ordinary number in every format. Zeros would be scales of 2^-127 in
# some, which processors multiply by more slowly.
_BYTE = 0x3C


def measure_matvec_gbps(
    expert_bytes: int, number_format: str = "BF16", num_experts: int = 1
) -> float:
    """Bytes per second through matrix-vector products of bf16 tokens with weights of one format,
    the matrices beyond any cache, with the kernel that runs would choose. num_experts: of which the
    matrices are computed together, as a token's of one layer are."""
    cols = _whole(min(2048, (expert_bytes / 4) ** 0.5))
    most_bytes = min(num_experts * expert_bytes, BEYOND_CACHES_BYTES // 2)
    rows = max(cols, _whole(most_bytes / _row_bytes(number_format, cols)))
    blocks, num_bytes = _matrices(rows, cols, number_format)
    x = torch.ones(1, cols, dtype=torch.bfloat16)
    kernel = choose("auto")
    compiled = kernel if isinstance(kernel, native.Kernel) else None
    described = [describe(block) for block in blocks] if compiled else []

    def products() -> None:
        for matrix in described:
            assert compiled is not None
            compiled.linear(matrix, rows, x)
        for block in blocks[len(described) :]:
            torch.nn.functional.linear(x, plain(block).to(x.dtype))

    speed = len(blocks) * num_bytes / best_s(products) / 1e9
    kernel.close()
    return speed


def _whole(size: float) -> int:
    """Rows or columns that every format can have."""
    return max(1, int(size) // _UNIT) * _UNIT


def _row_bytes(number_format: str, cols: int) -> int:
    if number_format in DTYPES:
        return cols * DTYPES[number_format].itemsize
    return row_bytes(number_format, cols)


def _matrices(
    rows: int, cols: int, number_format: str
) -> tuple[list[torch.Tensor | PackedMatrix], int]:
    """And the bytes of each."""
    size = rows * _row_bytes(number_format, cols)
    count = max(2, BEYOND_CACHES_BYTES // size)
    if number_format in DTYPES:
        return list(torch.ones(count, rows, cols, dtype=DTYPES[number_format])), size
    scales, zeros = _sides(rows, cols, number_format) if number_format in PLANES else (None, None)
    codes = torch.full((size,), _BYTE, dtype=torch.uint8)
    beside = torch.zeros(8 * rows + 128, dtype=torch.uint8)  # what exact12 keeps there:
    beside[:rows] = 127  # rows' exponents, and no exceptions
    return [
        PackedMatrix(number_format, rows, cols, torch.cat([codes, beside]), scales, zeros)
        for _ in range(count)
    ], size


def _sides(rows: int, cols: int, number_format: str) -> tuple[Scales, torch.Tensor | None]:
    """Scales and zero points of a matrix in groups as most files have them."""
    if number_format == "F8_E4M3":
        return Scales(torch.ones(rows // 128, cols // 128), (128, 128)), None
    if number_format == "MXFP4_PLANES":
        return Scales(torch.full((rows, cols // 32), _BYTE, dtype=torch.uint8), (1, 32)), None
    groups = cols // 128
    if number_format == "INT4":
        return Scales(torch.ones(rows, groups, dtype=torch.bfloat16), (1, 128)), None
    values = torch.ones(groups, rows, dtype=torch.float16)
    return Scales(values.T, (1, 128)), torch.zeros(groups, rows // 8, dtype=torch.int32).T


def best_s(function: Callable[[], object]) -> float:
    """Seconds of the fastest of three calls, after one that warms up."""
    function()
    best = float("inf")
    for _ in range(3):
        start = time.perf_counter()
        function()
        best = min(best, time.perf_counter() - start)
    return best
