"""Packed formats: what is stored, to the byte where it is exact and to the step where it is not."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from moe_infinity.errors import UnsupportedModelError
from moe_infinity.kernels.packed import (
    GROUP,
    MAX_EXCEPTIONS,
    PackedMatrix,
    can_pack,
    encode,
    row_bytes,
    side_offset,
)

NORMAL = 0.05


def bf16(bits: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(bits.view(np.int16)).view(torch.bfloat16)


def bits(matrix: torch.Tensor) -> np.ndarray:
    return matrix.view(torch.int16).numpy().view(np.uint16)


def round_trip(matrix: torch.Tensor, number_format: str) -> torch.Tensor | None:
    data = encode(matrix, number_format)
    if data is None:
        return None
    return PackedMatrix(number_format, *matrix.shape, torch.from_numpy(data)).decode()


def normal(rows: int, cols: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, cols, generator=generator) * NORMAL


class TestExact12:
    @pytest.mark.parametrize("shape", [(1, 1), (3, 40), (7, 128), (5, 129), (33, 1408), (2, 4096)])
    def test_every_bit_comes_back(self, shape: tuple[int, int]) -> None:
        matrix = normal(*shape).bfloat16()
        found = round_trip(matrix, "EXACT12")
        assert found is not None and (bits(found) == bits(matrix)).all()

    @pytest.mark.parametrize(
        "pattern", [0x0000, 0x8000, 0x0001, 0x807F, 0x7F80, 0xFF80, 0x7FC1, 0xFF81, 0x7F7F, 0x3F80]
    )
    def test_constant_rows(self, pattern: int) -> None:
        """Zeros, denormals, infinities and NaN with payloads included."""
        matrix = bf16(np.full((3, 200), pattern, dtype=np.uint16))
        found = round_trip(matrix, "EXACT12")
        assert found is not None and (bits(found) == pattern).all()

    def test_strangers_among_normal_weights(self) -> None:
        values = bits(normal(16, 2048).bfloat16()).copy()
        places = np.random.default_rng(0).choice(values.size, 200, replace=False)
        values.ravel()[places] = np.resize([0, 0x8000, 1, 0x7F80, 0xFFC1, 0x7F00], 200)
        found = round_trip(bf16(values), "EXACT12")
        assert found is not None and (bits(found) == values).all()

    @given(hnp.arrays(np.uint16, hnp.array_shapes(min_dims=2, max_dims=2, max_side=300)))
    def test_any_bits_or_refused(self, values: np.ndarray) -> None:
        found = round_trip(bf16(values), "EXACT12")
        exponents = (values >> 7 & 255).astype(int)
        counts = np.stack([np.bincount(row, minlength=256 + 14) for row in exponents])
        windows = np.lib.stride_tricks.sliding_window_view(counts, 15, axis=1).sum(axis=2)
        best = windows.max(axis=1).sum()  # of 15 neighbouring exponents
        if values.size - best > MAX_EXCEPTIONS * values.size:
            assert found is None
        else:
            assert found is not None and (bits(found) == values).all()

    def test_takes_twelve_bits_of_trained_looking_weights(self) -> None:
        data = encode(normal(512, 2048).bfloat16(), "EXACT12")
        assert data is not None and data.size * 8 / (512 * 2048) < 12.1

    def test_side_is_aligned(self) -> None:
        assert side_offset("EXACT12", 3, 40) % 64 == 0 >= 0
        assert side_offset("EXACT12", 3, 40) >= 3 * row_bytes("EXACT12", 40)


class TestGroups:
    @pytest.mark.parametrize(("number_format", "levels"), [("Q8_0", 127), ("Q4_0", 8)])
    def test_within_about_half_a_step(self, number_format: str, levels: int) -> None:
        matrix = normal(8, 256)
        found = round_trip(matrix, number_format)
        assert found is not None
        groups = matrix.reshape(8, -1, GROUP)
        step = groups.abs().amax(dim=2, keepdim=True) / levels
        error = (found.reshape(8, -1, GROUP) - groups).abs()
        # Q4_0's other end reaches 7 steps only; scales are rounded to half precision.
        assert (error <= step * (0.6 if number_format == "Q8_0" else 1.01)).all()

    def test_layouts_are_those_of_llama_cpp(self) -> None:
        values = torch.arange(-16, 16, dtype=torch.float32)[None] * 8
        q8 = encode(values, "Q8_0")
        assert q8 is not None and q8.size == 34
        assert q8[:2].view(np.float16)[0] == np.float16(128 / 127)
        assert q8[2:].view(np.int8).tolist()[:2] == [-127, -119]
        q4 = encode(values, "Q4_0")
        assert q4 is not None and q4.size == 18
        assert q4[:2].view(np.float16)[0] == np.float16(16)  # -128 / -8
        assert (q4[2] & 15, q4[2] >> 4) == (0, 8)  # elements 0 and 16: -128 and 0

    @pytest.mark.parametrize("number_format", ["Q8_0", "Q4_0"])
    def test_zeros_stay_zeros(self, number_format: str) -> None:
        found = round_trip(torch.zeros(2, 64), number_format)
        assert found is not None and not found.any()

    @given(st.integers(1, 200))
    def test_columns_must_be_divisible(self, cols: int) -> None:
        for number_format in ("Q8_0", "Q4_0"):
            assert can_pack(number_format, (4, cols)) is (cols % GROUP == 0)
            if cols % GROUP:
                with pytest.raises(UnsupportedModelError, match="divisible by 32"):
                    encode(torch.zeros(4, cols), number_format)
