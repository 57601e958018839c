"""Compiled code touches nothing behind a matrix: there is a page that nobody may read."""

import ctypes
import mmap
from dataclasses import replace

import pytest
import torch

from moe_infinity.kernels import native
from moe_infinity.kernels.described import describe
from moe_infinity.kernels.gguf_formats import BLOCKS
from moe_infinity.kernels.packed import PackedMatrix, encode
from moe_infinity.kernels.planes import PLANES, Scales
from support.products import matrix
from support.super_blocks import BLOCK_BYTES

SETS = native.native.instruction_sets() if native.native is not None else []
ENCODED = ("Q8_0", "Q4_0", "EXACT12")
PAGE = mmap.PAGESIZE
_libc = ctypes.CDLL(None, use_errno=True)
_kept: list[mmap.mmap] = []  # as long as somebody may look


def at_the_edge(tensor: torch.Tensor) -> torch.Tensor:
    """The same numbers, the last of them right before a page that must not be read."""
    num_bytes = tensor.untyped_storage().nbytes()
    size = -(-num_bytes // PAGE) * PAGE
    room = mmap.mmap(-1, size + PAGE)
    _kept.append(room)
    start = ctypes.addressof(ctypes.c_char.from_buffer(room))
    raw = torch.frombuffer(room, dtype=torch.uint8)[size - num_bytes : size]
    raw.copy_(torch.tensor([], dtype=torch.uint8).set_(tensor.untyped_storage()))
    assert _libc.mprotect(ctypes.c_void_p(start + size), PAGE, 0) == 0  # PROT_NONE
    return raw.view(tensor.dtype).as_strided(tensor.shape, tensor.stride())


def matrix_at_the_edge(number_format: str, rows: int, cols: int) -> PackedMatrix:
    if number_format in ENCODED:
        weights = torch.randn(rows, cols).to(torch.bfloat16)
        data = torch.from_numpy(encode(weights, number_format))
        return PackedMatrix(number_format, rows, cols, at_the_edge(data))
    plain = matrix(number_format, rows, cols)
    scales, zeros = plain.scales, plain.zeros
    return replace(
        plain,
        data=at_the_edge(plain.data),
        scales=scales and Scales(at_the_edge(scales.values), scales.group),
        zeros=None if zeros is None else at_the_edge(zeros),
    )


@pytest.mark.skipif(not SETS, reason="installed without a compiler")
@pytest.mark.parametrize("instruction_set", SETS)
@pytest.mark.parametrize("number_format", [*ENCODED, *BLOCKS, *PLANES])
def test_nothing_behind_a_matrix_is_read(number_format: str, instruction_set: str) -> None:
    kernel = native.Kernel(1, instruction_set)
    widths = (256, 768) if number_format in BLOCK_BYTES else (32, 96, 160, 416)
    for cols in widths:
        block = matrix_at_the_edge(number_format, 40, cols)
        for count in (1, 5, 40):
            for dtype in (torch.bfloat16, torch.float32):
                out = kernel.linear(describe(block), 40, torch.ones(count, cols, dtype=dtype))
                assert out.isfinite().all()
    _kept.clear()


@pytest.mark.skipif(not SETS, reason="installed without a compiler")
@pytest.mark.parametrize("instruction_set", SETS)
@pytest.mark.parametrize("number_format", ["Q8_0", "Q4_0", "Q5_0", "MXFP4", "MXFP4_PLANES"])
def test_nothing_behind_every_other_row_is_read(number_format: str, instruction_set: str) -> None:
    """The last of them is the last of all."""
    kernel = native.Kernel(1, instruction_set)
    for cols in (32, 96, 160, 416):
        block = matrix_at_the_edge(number_format, 40, cols)
        for count in (1, 5, 40):
            x = torch.ones(count, cols, dtype=torch.bfloat16)
            every = kernel.linear(describe(block), 40, x)
            assert torch.equal(kernel.linear(describe(block, 1, 2, 20), 20, x), every[:, 1::2])
    _kept.clear()
