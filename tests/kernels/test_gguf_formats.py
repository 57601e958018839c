"""Formats of GGUF files: decoded as llama.cpp's own package does, to the bit, and those with two
levels of scales multiplied by every instruction set that this processor has."""

import gguf
import numpy as np
import pytest
import torch

from moe_infinity.kernels import native
from moe_infinity.kernels.base import ExpertMath, Job, Views
from moe_infinity.kernels.gguf_formats import BLOCKS, decode_blocks
from moe_infinity.kernels.packed import PackedMatrix
from moe_infinity.kernels.reference import Kernel as Reference
from support.products import matrix, one_by_one, product, tokens
from support.super_blocks import BLOCK_BYTES, random_blocks

FORMATS = sorted(BLOCK_BYTES)
SETS = native.native.instruction_sets() if native.native is not None else []
FEW, MANY = (1, 3, 4, 9, 31), (32, 70, 193)
TYPES = (torch.bfloat16, torch.float16, torch.float32)
TOLERANCE = 0.03  # of the largest value: few tokens are rounded to 8 bits


@pytest.mark.parametrize("number_format", sorted(BLOCKS))
def test_decoded_as_by_the_public_package(number_format: str) -> None:
    rng = np.random.default_rng(0)
    cases = [rng.integers(0, 256, (4096, BLOCKS[number_format][1]), dtype=np.uint8)]
    if number_format in FORMATS:
        cases.append(random_blocks(64, 1024, number_format).reshape(-1, BLOCKS[number_format][1]))
    for blocks in cases:
        with np.errstate(all="ignore"):  # scales that are no numbers
            kind = gguf.GGMLQuantizationType[number_format]
            expected = gguf.quants.dequantize(blocks, kind)
            found = decode_blocks(blocks, number_format)
        same = found.view(np.uint32) == expected.view(np.uint32)
        assert (same | (np.isnan(found) & np.isnan(expected))).all()


@pytest.mark.skipif(not SETS, reason="installed without a compiler")
class TestKernels:
    @pytest.fixture(params=SETS)
    def kernel(self, request: pytest.FixtureRequest) -> native.Kernel:
        return native.Kernel(2, str(request.param))

    @pytest.mark.parametrize("number_format", FORMATS)
    @pytest.mark.parametrize("shape", [(64, 256), (7, 768), (33, 2048), (1, 512)])
    def test_products(
        self, kernel: native.Kernel, number_format: str, shape: tuple[int, int]
    ) -> None:
        block = matrix(number_format, *shape)
        weights = block.decode()
        for dtype in TYPES:
            for count in FEW + MANY:
                x = tokens(count, shape[1], dtype)
                expected = x.float() @ weights.T
                error = (product(kernel, block, x).float() - expected).abs().max()
                assert error <= TOLERANCE * expected.abs().max(), (dtype, count)

    @pytest.mark.parametrize("number_format", FORMATS)
    def test_a_group_alone_weighs_what_it_should(
        self, kernel: native.Kernel, number_format: str
    ) -> None:
        """Each column by itself: a scale or minimum in the wrong place cannot hide in a sum."""
        block = matrix(number_format, 5, 512)
        weights = block.decode()
        for count in (16, 64):
            for start in range(0, 512, count):
                x = torch.zeros(count, 512)
                x[torch.arange(count), start + torch.arange(count)] = 1.0
                found = product(kernel, block, x)
                error = (found - weights.T[start : start + count]).abs().max()
                assert error <= 1e-5 * weights.abs().max(), start

    @pytest.mark.parametrize("number_format", FORMATS)
    def test_a_result_depends_on_its_row_and_token_alone(
        self, kernel: native.Kernel, number_format: str
    ) -> None:
        block = matrix(number_format, 53, 512)
        x = tokens(100, 512, torch.bfloat16)
        few = product(kernel, block, x[:7])
        assert torch.equal(one_by_one(kernel, block, x[:7]), few)
        together = product(kernel, block, x)
        for start, end in ((0, 32), (5, 45), (60, 100)):
            assert torch.equal(product(kernel, block, x[start:end]), together[start:end])
        moved = torch.empty(block.data.numel() + 64, dtype=torch.uint8)[2:]
        moved = moved[: block.data.numel()].copy_(block.data)
        other = PackedMatrix(number_format, block.rows, block.cols, moved)
        three = native.Kernel(3, kernel.instruction_set)
        assert torch.equal(product(three, other, x), together)
        assert torch.equal(product(three, other, x[:7]), few)

    @pytest.mark.parametrize("count", [1, 40])
    def test_a_whole_expert_of_mixed_formats(self, kernel: native.Kernel, count: int) -> None:
        def gate(x: torch.Tensor) -> torch.Tensor:
            first, second = x.chunk(2, dim=-1)
            return torch.nn.functional.silu(first) * second

        math = ExpertMath(True, False, False, gate)
        first = [matrix("Q4_K", 256, 512, seed) for seed in (1, 2)]
        views = Views({"gate_up_proj": [*first], "down_proj": [matrix("Q6_K", 512, 256)]})
        x = tokens(count, 512, torch.bfloat16)
        jobs = [Job(views, x, torch.empty_like(x))]
        kernel.run(math, jobs)
        expected = Reference().forward(math, views, x)
        error = (jobs[0].out.float() - expected.float()).norm()
        assert error <= TOLERANCE * expected.float().norm()
