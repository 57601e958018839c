"""Experts for the GPU kernel, which Triton interprets on the CPU unless TRITON_INTERPRET is 0."""

import os
from collections.abc import Callable
from dataclasses import dataclass

import torch

from moe_infinity.kernels.base import ExpertMath, Views
from moe_infinity.kernels.gpu.tuning import Tuning
from moe_infinity.kernels.packed import PackedMatrix, encode
from moe_infinity.kernels.planes import Scales
from support.products import matrix

DEVICE = torch.device("cpu" if os.environ["TRITON_INTERPRET"] == "1" else "cuda")
DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
OF_32 = ("Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "MXFP4")
OF_PLANES = ("MXFP4_PLANES", "F8_E4M3", "INT4", "GPTQ", "GPTQ_V2", "AWQ")
OF_256 = ("Q4_K", "Q5_K", "Q6_K")
FORMATS = (*DTYPES, "EXACT12", *OF_32, *OF_PLANES, *OF_256)
# Of the largest value. Sums are float32, in another order than torch's; what is left in 16 bits is
# the rounding of inner results.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 1.5e-3, torch.bfloat16: 1e-2}
Block = torch.Tensor | PackedMatrix
# Large programs: to interpret one takes as long whatever its size.
LARGE = Tuning(
    few=({"most_tokens": 8, "rows": 64, "num_warps": 4, "num_stages": 2},),
    tall=({"most_tokens": 8, "rows": 64, "num_warps": 4, "num_stages": 2},),
    many=(
        {
            "most_tokens": 1024,
            "tokens": 16,
            "rows": 64,
            "columns": 128,
            "num_warps": 4,
            "num_stages": 2,
        },
    ),
)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed * 1000 + sum(shape))
    return torch.randn(*shape, generator=generator) * 0.1


def stored(number_format: str, rows: int, cols: int, seed: int = 0) -> Block:
    if number_format in DTYPES:
        return random(rows, cols, seed=seed).to(DTYPES[number_format])
    if number_format in ("EXACT12", "Q8_0", "Q4_0"):
        return encoded(random(rows, cols, seed=seed).bfloat16(), number_format)
    return matrix(number_format, rows, cols, seed)


def encoded(whole: torch.Tensor, number_format: str) -> PackedMatrix:
    data = encode(whole, number_format)
    assert data is not None
    return PackedMatrix(number_format, *whole.shape, torch.from_numpy(data))


def strange(rows: int, cols: int, seed: int = 0) -> torch.Tensor:
    """bfloat16 with exceptions for EXACT12: in few rows, several in a row and in one step."""
    whole = random(rows, cols, seed=seed).bfloat16()
    some = max(1, whole.numel() // 150)
    places = torch.randperm(whole.numel(), generator=torch.Generator().manual_seed(seed))[:some]
    whole.view(-1)[places] = torch.tensor([1e-30, -0.0, 3e-20, 0.0]).bfloat16()[places % 4]
    whole[rows // 2, : max(1, some // 8)] = 1e-25
    return whole


def there(block: Block) -> Block:
    """On the device of these tests."""
    if not isinstance(block, PackedMatrix):
        return block.to(DEVICE)
    scales, zeros = block.scales, block.zeros
    if scales is not None:
        scales = Scales(scales.values.to(DEVICE), scales.group)
    zeros = None if zeros is None else zeros.to(DEVICE)
    data = block.data.to(DEVICE)
    return PackedMatrix(block.format, block.rows, block.cols, data, scales, zeros)


def views_there(views: Views) -> Views:
    return Views({name: [there(block) for block in blocks] for name, blocks in views.items()})


def gated(act: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[torch.Tensor], torch.Tensor]:
    def gate(x: torch.Tensor) -> torch.Tensor:
        first, second = x.chunk(2, dim=-1)
        return act(first) * second

    return gate


GATED = ExpertMath(True, False, False, gated(torch.nn.functional.silu))


@dataclass(frozen=True)
class Shape:
    hidden: int = 48
    inner: int = 40


def expert(number_format: str, shape: Shape, seed: int = 0) -> Views:
    """Gate and up in two blocks, and down."""
    halves = [stored(number_format, shape.inner, shape.hidden, 2 * seed + i) for i in (0, 1)]
    last = stored(number_format, shape.hidden, shape.inner, 2 * seed + 7)
    return Views(gate_up_proj=halves, down_proj=[last])


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert found.shape == expected.shape and found.dtype == expected.dtype
    error = (found.cpu().float() - expected.float()).abs().max()
    assert error <= TOLERANCE[found.dtype] * expected.float().abs().max() + 1e-7, float(error)
