"""Formats with scales apart from their codes: decoded as their public definitions say, multiplied
by every instruction set that this processor has; experts of gpt-oss whole."""

import numpy as np
import pytest
import torch
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from moe_infinity.kernels import native
from moe_infinity.kernels.base import ExpertMath, Job, Views
from moe_infinity.kernels.packed import PackedMatrix
from moe_infinity.kernels.planes import PLANES, Scales
from moe_infinity.kernels.reference import Kernel as Reference
from support.planes import random_planes
from support.products import matrix, one_by_one, product, tokens

SETS = native.native.instruction_sets() if native.native is not None else []
needs_compiler = pytest.mark.skipif(not SETS, reason="installed without a compiler")
COUNTS = (1, 3, 4, 7, 9, 31, 33, 70)
BLOCKS = ("MXFP4", "Q5_0", "Q4_1", "Q5_1")
TYPES = (torch.bfloat16, torch.float16, torch.float32)
WORDS = ("INT4", "GPTQ", "GPTQ_V2", "AWQ")
TOLERANCE = 0.03  # of the largest value: some formats round tokens to 8 bits
AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]  # which of eight rows a word's nibble belongs to


class TestDecoding:
    def test_mxfp4_as_transformers_does(self) -> None:
        block = random_planes("MXFP4_PLANES", 48, 96)
        assert block.scales is not None
        blocks = block.data.view(1, 48, 3, 16)
        expected = convert_moe_packed_tensors(blocks, block.scales.values.view(1, 48, 3))
        assert torch.equal(block.decode().to(torch.bfloat16), expected[0].T)

    def test_fp8_blocks(self) -> None:
        block = random_planes("F8_E4M3", 200, 300)
        assert block.scales is not None
        grid = block.scales.values.repeat_interleave(128, 0).repeat_interleave(128, 1)
        stored = block.data.view(torch.float8_e4m3fn).view(200, 300).float()
        assert torch.equal(block.decode(), stored * grid[:200, :300])

    def test_gptq_one_by_one(self) -> None:
        for number_format, added in (("GPTQ", 1), ("GPTQ_V2", 0)):
            block = random_planes(number_format, 16, 128)
            assert block.scales is not None and block.zeros is not None
            words = block.data.numpy().view(np.uint32).reshape(16, 16)  # [C / 8, R]
            zeros = block.zeros.numpy().view(np.uint32)
            decoded = block.decode()
            for row, col in ((0, 0), (3, 9), (15, 127), (8, 64)):
                code = int(words[col // 8, row]) >> (col % 8 * 4) & 15
                zero = (int(zeros[row // 8, col // 64]) >> (row % 8 * 4) & 15) + added & 15
                scale = block.scales.values[row, col // 64].float()
                assert decoded[row, col] == (code - zero) * scale

    def test_awq_one_by_one(self) -> None:
        block = random_planes("AWQ", 16, 128)
        assert block.scales is not None and block.zeros is not None
        words = block.data.numpy().view(np.uint32).reshape(128, 2)  # [C, R / 8]
        zeros = block.zeros.numpy().view(np.uint32)
        decoded = block.decode()
        for word in range(2):
            for nibble, row in enumerate(AWQ_ORDER):
                for col in (0, 5, 127):
                    code = int(words[col, word]) >> (4 * nibble) & 15
                    zero = int(zeros[word, col // 64]) >> (4 * nibble) & 15
                    scale = block.scales.values[8 * word + row, col // 64].float()
                    assert decoded[8 * word + row, col] == (code - zero) * scale

    def test_int4_without_zero_points(self) -> None:
        block = random_planes("INT4", 8, 64, has_zeros=False)
        assert block.scales is not None
        code = int(block.data[3]) >> 4
        assert block.decode()[0, 7] == (code - 8) * block.scales.values[0, 0].float()

    @pytest.mark.parametrize("number_format", [*PLANES, *BLOCKS])
    def test_rows_alone_are_those_of_the_whole(self, number_format: str) -> None:
        block = matrix(number_format, 264, 256)
        decoded = block.decode()
        for first, count in ((0, 1), (7, 9), (120, 144), (263, 1)):
            assert torch.equal(block.decode_rows(first, count), decoded[first : first + count])


@needs_compiler
class TestProducts:
    @pytest.fixture(params=SETS)
    def kernel(self, request: pytest.FixtureRequest) -> native.Kernel:
        return native.Kernel(2, str(request.param))

    @pytest.mark.parametrize("number_format", [*PLANES, *BLOCKS])
    @pytest.mark.parametrize("shape", [(64, 256), (8, 96), (40, 544), (136, 1056)])
    def test_products(
        self, kernel: native.Kernel, number_format: str, shape: tuple[int, int]
    ) -> None:
        block = matrix(number_format, *shape)
        weights = block.decode()
        for dtype in TYPES:
            for count in COUNTS:
                x = tokens(count, shape[1], dtype)
                expected = x.float() @ weights.T
                error = (product(kernel, block, x).float() - expected).abs().max()
                assert error <= TOLERANCE * expected.abs().max(), (dtype, count)

    @pytest.mark.parametrize("number_format", WORDS)
    @pytest.mark.parametrize("group", [16, 48, 64, 80, 128, 512])
    def test_words_of_many_rows(
        self, kernel: native.Kernel, number_format: str, group: int
    ) -> None:
        """More rows than are taken at once, and groups that do and don't end where registers do."""
        alone = native.Kernel(1, kernel.instruction_set)
        for has_zeros in (True, False):
            block = random_planes(number_format, 4616, 136, 0, has_zeros, (1, group))
            weights = block.decode()
            for count in (1, 2, 3, 6, 33):
                x = tokens(count, 136, torch.float32)
                expected = x @ weights.T
                error = (product(alone, block, x) - expected).abs().max()
                assert error <= 1e-5 * expected.abs().max(), (has_zeros, count)

    @pytest.mark.parametrize("number_format", WORDS)
    @pytest.mark.parametrize("shape", [(8, 544, 32), (24, 704, 64), (136, 1856, 32)])
    def test_nothing_is_left_of_the_product_before(
        self, kernel: native.Kernel, number_format: str, shape: tuple[int, int, int]
    ) -> None:
        """Not even where it was no number: registers reach beyond rows and columns."""
        rows, cols, group = shape
        alone = native.Kernel(1, kernel.instruction_set)
        broken = random_planes(number_format, 64, 4096, group=(1, 32))
        assert broken.scales is not None
        broken.scales.values.fill_(float("nan"))
        block = random_planes(number_format, rows, cols, group=(1, group))
        for count in (1, 4, 40):
            assert product(alone, broken, tokens(count, 4096, torch.float32)).isnan().all()
            x = tokens(count, cols, torch.float32)
            expected = x @ block.decode().T
            error = (product(alone, block, x) - expected).abs().max()
            assert error <= 1e-5 * expected.abs().max(), count

    @pytest.mark.parametrize("number_format", WORDS)
    def test_a_result_depends_on_its_row_and_token_alone(
        self, kernel: native.Kernel, number_format: str
    ) -> None:
        block = random_planes(number_format, 1304, 544)
        x = tokens(7, 544, torch.bfloat16)
        together = product(kernel, block, x)
        assert torch.equal(one_by_one(kernel, block, x), together)
        many = tokens(70, 544, torch.bfloat16)
        expected = product(kernel, block, many)
        for threads in (1, 3):
            other = native.Kernel(threads, kernel.instruction_set)
            assert torch.equal(product(other, block, x), together)
            assert torch.equal(product(other, block, many), expected)

    @pytest.mark.parametrize("number_format", [*BLOCKS, "MXFP4_PLANES"])
    def test_a_token_of_groups_is_computed_alone_as_with_others(
        self, kernel: native.Kernel, number_format: str
    ) -> None:
        block = matrix(number_format, 53, 544)
        x = tokens(7, 544, torch.bfloat16)
        alone = one_by_one(kernel, block, x)
        for count in range(2, 8):
            assert torch.equal(product(kernel, block, x[:count]), alone[:count])

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.uint8])
    def test_scales_of_every_kind(self, kernel: native.Kernel, dtype: torch.dtype) -> None:
        rows, blocks = [(1, 32), (1, 96), (1, 1056)], [(16, 128), (128, 32), (136, 1056)]
        cases = [("F8_E4M3", group) for group in rows + blocks]
        if dtype is not torch.uint8:  # are not stored so
            cases += [
                (name, group) for name in ("INT4", "GPTQ", "GPTQ_V2", "AWQ") for group in rows
            ]
        for number_format, group in cases:
            block = random_planes(number_format, 136, 1056, group=group, dtype=dtype)
            weights = block.decode()
            for count in (1, 5, 40):
                x = tokens(count, 1056, torch.float32)
                expected = x @ weights.T
                error = (product(kernel, block, x) - expected).abs().max()
                assert error <= 1e-5 * expected.abs().max(), (number_format, group, count)

    @pytest.mark.parametrize("number_format", [*PLANES, *BLOCKS])
    def test_a_few_columns_alone_weigh_what_they_should(
        self, kernel: native.Kernel, number_format: str
    ) -> None:
        """Nothing in the wrong place can hide in a sum."""
        block = matrix(number_format, 8, 416)
        weights = block.decode()
        for width in (1, 16):
            for start in range(0, 416, 13):
                x = torch.zeros(40, 416)
                x[:, start : start + width] = 1.0
                for count in (1, 40):
                    found = product(kernel, block, x[:count].to(torch.bfloat16)).float()
                    expected = weights[:, start : start + width].sum(dim=1)
                    largest = weights[:, start : start + width].abs().max().clamp(min=1e-9)
                    assert ((found - expected).abs() <= 0.05 * largest).all()

    @pytest.mark.parametrize("number_format", [*PLANES, *BLOCKS])
    def test_every_instruction_set_says_the_same(self, number_format: str) -> None:
        block = matrix(number_format, 40, 544)
        x = tokens(5, 544, torch.float32)
        found = [product(native.Kernel(1, name), block, x) for name in SETS]
        for each in found[1:]:
            assert torch.allclose(
                each, found[0], rtol=1e-4, atol=1e-4 * float(found[0].abs().max())
            )


def test_what_is_no_number_stays_so() -> None:
    codes = torch.full((8 * 64,), 0x7F, dtype=torch.uint8)
    scales = Scales(torch.ones(1, 1), (128, 128))
    block = PackedMatrix("F8_E4M3", 8, 64, codes, scales)
    assert block.decode().isnan().all()
    for name in SETS:
        for count in (1, 40):
            assert product(native.Kernel(1, name), block, torch.ones(count, 64)).isnan().all()


def gpt_oss_gate(gate_up: torch.Tensor) -> torch.Tensor:
    """As its modelling code does."""
    gate, up = gate_up[..., ::2], gate_up[..., 1::2]
    gate, up = gate.clamp(max=7.0), up.clamp(-7.0, 7.0)
    return (up + 1) * (gate * torch.sigmoid(gate * 1.702))


def gpt_oss_expert(is_apart: bool, hidden: int = 96, inner: int = 64) -> Views:
    """is_apart: gate and up in two blocks, as GGUF files have them."""
    generator = torch.Generator().manual_seed(3)
    gate_up = random_planes("MXFP4_PLANES", 2 * inner, hidden, seed=1)
    bias = torch.randn(2 * inner, generator=generator).to(torch.bfloat16)
    views = Views(
        gate_up_proj=[gate_up],
        gate_up_proj_bias=[bias],
        down_proj=[random_planes("MXFP4_PLANES", hidden, inner, seed=2)],
        down_proj_bias=[torch.randn(hidden, generator=generator)],
    )
    if is_apart:
        assert gate_up.scales is not None
        codes, scales = gate_up.data.view(2 * inner, -1), gate_up.scales.values
        views["gate_up_proj"] = [
            PackedMatrix(
                "MXFP4_PLANES",
                inner,
                hidden,
                codes[n::2].contiguous().view(-1),
                Scales(scales[n::2].contiguous(), (1, 32)),
            )
            for n in (0, 1)
        ]
        views["gate_up_proj_bias"] = [bias[0::2].contiguous(), bias[1::2].contiguous()]
    return views


MATH = ExpertMath(True, True, True, gpt_oss_gate, is_interleaved=True)


def test_apart_or_in_turns_is_the_same() -> None:
    x = tokens(3, 96, torch.float32)
    one, other = (Reference().forward(MATH, gpt_oss_expert(apart), x) for apart in (False, True))
    assert torch.allclose(one, other, rtol=1e-5, atol=1e-6)


@needs_compiler
@pytest.mark.parametrize("instruction_set", SETS)
@pytest.mark.parametrize("is_apart", [False, True])
def test_whole_experts_with_biases(instruction_set: str, is_apart: bool) -> None:
    kernel, views = native.Kernel(2, instruction_set), gpt_oss_expert(is_apart)
    for dtype in TYPES:
        for count in (1, 5, 40):
            x = tokens(count, 96, dtype)
            out = torch.empty_like(x)
            kernel.run(MATH, [Job(views, x, out)])
            assert views.prepared[2].call is not None, "not by the reference"
            expected = Reference().forward(MATH, views, x.float())
            error = (out.float() - expected).abs().max()
            assert error <= TOLERANCE * expected.abs().max(), (dtype, count)
