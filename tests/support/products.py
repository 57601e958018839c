"""Coded matrices of every format that is not packed here, and products by them."""

import torch

from moe_infinity.kernels import native
from moe_infinity.kernels.described import describe
from moe_infinity.kernels.packed import PackedMatrix
from moe_infinity.kernels.planes import PLANES
from support.planes import random_planes
from support.super_blocks import BLOCK_BYTES, random_blocks, random_groups


def matrix(number_format: str, rows: int, cols: int, seed: int = 0) -> PackedMatrix:
    if number_format in PLANES:
        return random_planes(number_format, rows, cols, seed)
    make = random_blocks if number_format in BLOCK_BYTES else random_groups
    data = torch.from_numpy(make(rows, cols, number_format, seed).ravel())
    return PackedMatrix(number_format, rows, cols, data)


def tokens(count: int, cols: int, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(count)
    return torch.randn(count, cols, generator=generator).to(dtype)


def product(kernel: native.Kernel, block: PackedMatrix, x: torch.Tensor) -> torch.Tensor:
    return kernel.linear(describe(block), block.rows, x.contiguous())


def one_by_one(kernel: native.Kernel, block: PackedMatrix, x: torch.Tensor) -> torch.Tensor:
    """The product of each token by itself."""
    return torch.cat([product(kernel, block, token[None]) for token in x])
