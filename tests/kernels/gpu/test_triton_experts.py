"""Whole experts on the GPU's kernel against the plain one: formats, layouts, activations."""

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

from moe_infinity.kernels.activations import recognise
from moe_infinity.kernels.base import ExpertMath, Job, Views
from moe_infinity.kernels.gpu import kernel as gpu
from moe_infinity.kernels.gpu.layout import kind_of, lay_out
from moe_infinity.kernels.reference import Kernel as Reference
from support.gpu import (
    DEVICE,
    FORMATS,
    GATED,
    LARGE,
    OF_256,
    OF_PLANES,
    Shape,
    close,
    encoded,
    expert,
    gated,
    random,
    strange,
    views_there,
)
from support.planes import random_planes

FEW, MANY = 3, 11  # tokens: multiplied in one way and in the other
SILU = torch.nn.functional.silu


@pytest.fixture
def kernel() -> gpu.Kernel:
    return gpu.Kernel(DEVICE, LARGE)


def check(
    kernel: gpu.Kernel, math: ExpertMath, views: Views, tokens: int, dtype=torch.float32
) -> None:
    layout = lay_out(kind_of(math), views)
    assert layout is not None, "computed plainly"
    x = (random(tokens, layout[0].hidden, seed=5) * 10).to(dtype)
    expected = Reference().forward(math, views, x)
    close(kernel.forward(math, views_there(views), x.to(DEVICE)), expected)


def shape_of(number_format: str) -> Shape:
    if number_format in OF_256:
        return Shape(256, 256)
    in_words = number_format in OF_PLANES
    return Shape(160, 96) if in_words or number_format[0] in "QM" else Shape(139, 75)


@pytest.mark.parametrize("tokens", [FEW, MANY])
@pytest.mark.parametrize("number_format", FORMATS)
def test_formats(kernel: gpu.Kernel, number_format: str, tokens: int) -> None:
    check(kernel, GATED, expert(number_format, shape_of(number_format)), tokens)


@pytest.mark.parametrize("tokens", [FEW, MANY])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("number_format", ["BF16", "F32", "EXACT12", "Q4_0", "MXFP4_PLANES"])
def test_short_types(
    kernel: gpu.Kernel, number_format: str, dtype: torch.dtype, tokens: int
) -> None:
    check(kernel, GATED, expert(number_format, shape_of(number_format)), tokens, dtype)


def odd(x: torch.Tensor) -> torch.Tensor:
    return x.clamp(max=0.5)


def clamped(x: torch.Tensor) -> torch.Tensor:
    gate, up = x[..., ::2].clamp(max=7.0), x[..., 1::2].clamp(-7.0, 7.0)
    return (up + 1) * (gate * torch.sigmoid(1.702 * gate))


def tanh_gelu(x: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.gelu(x, approximate="tanh")


def in_turns(x: torch.Tensor) -> torch.Tensor:
    return odd(x[..., ::2]) * x[..., 1::2]


# Number of the activation (None: torch computes it), blocks of the first part, and the math.
LAYOUTS = {
    "one block": (1, 1, ExpertMath(True, False, False, gated(SILU))),
    "gelu, biases": (2, 2, ExpertMath(True, True, False, gated(tanh_gelu))),
    "relu, one bias": (3, 1, ExpertMath(True, True, False, gated(torch.relu))),
    "transposed": (1, 1, ExpertMath(True, False, True, gated(SILU))),
    "gpt-oss": (4, 1, ExpertMath(True, True, True, clamped, None, True)),
    "in turns": (4, 1, ExpertMath(True, True, False, clamped, None, True)),
    "in turns, apart": (4, 2, ExpertMath(True, True, False, clamped, None, True)),
    "no gate": (3, 1, ExpertMath(False, True, False, torch.relu)),
    "no gate, transposed": (2, 1, ExpertMath(False, False, True, tanh_gelu)),
    "unknown": (None, 1, ExpertMath(True, False, False, gated(odd))),
    "unknown, in turns": (None, 2, ExpertMath(True, True, False, in_turns, None, True)),
    "unknown, no gate": (None, 1, ExpertMath(False, True, False, odd)),
    "post": (1, 2, ExpertMath(True, True, False, gated(SILU), lambda x: 3 * x + 1)),
}


def of_layout(math: ExpertMath, num_blocks: int, hidden: int = 45, inner: int = 37) -> Views:
    rows = inner * (2 if math.has_gate else 1)
    first, last = random(rows, hidden) * 3, random(hidden, inner, seed=1)
    name = "gate_up_proj" if math.has_gate else "up_proj"
    blocks = list(first.chunk(num_blocks))
    if math.is_transposed:
        blocks, last = [block.T.contiguous() for block in blocks], last.T.contiguous()
    views = Views({name: blocks, "down_proj": [last]})
    if math.has_bias:
        views[f"{name}_bias"] = list((random(rows, seed=2) * 3).chunk(num_blocks))
        views["down_proj_bias"] = [random(hidden, seed=3)]
    return views


@pytest.mark.parametrize("tokens", [FEW, MANY])
@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts(kernel: gpu.Kernel, name: str, tokens: int) -> None:
    activation, num_blocks, math = LAYOUTS[name]
    assert recognise(math) == activation
    check(kernel, math, of_layout(math, num_blocks), tokens)


@pytest.mark.parametrize("name", ["gelu, biases", "gpt-oss", "post"])
def test_every_step_is_rounded(kernel: gpu.Kernel, name: str) -> None:
    _, num_blocks, math = LAYOUTS[name]
    views = of_layout(math, num_blocks)
    check(kernel, math, views, FEW, torch.float16)


@pytest.mark.parametrize("number_format", ["EXACT12", *OF_PLANES])
@pytest.mark.parametrize("in_turns", [False, True])
def test_halves_of_one_coded_block(kernel: gpu.Kernel, number_format: str, in_turns: bool) -> None:
    """Whatever lies beside the rows; coded matrices are [out, in], also of transposed models."""
    if number_format == "EXACT12":
        blocks = [encoded(strange(80, 48), "EXACT12"), encoded(strange(48, 40), "EXACT12")]
    else:
        group = (32, 16) if number_format == "F8_E4M3" else None
        blocks = [random_planes(number_format, 2 * 64, 48 + 16, group=group)]
        blocks += [random_planes(number_format, 64, 64, 1, group=group)]
    gate = clamped if in_turns else gated(SILU)
    math = ExpertMath(True, False, True, gate, None, in_turns)
    check(kernel, math, Views(gate_up_proj=blocks[:1], down_proj=blocks[1:]), FEW)


def test_what_has_no_layout_here_is_computed_plainly(kernel: gpu.Kernel) -> None:
    math = ExpertMath(True, False, True, gated(SILU))
    views = Views(gate_up_proj=[random(64, 10), random(64, 86)], down_proj=[random(48, 64)])
    assert lay_out(kind_of(math), views) is None
    x = random(2, 64)
    found = kernel.forward(math, views_there(views), x.to(DEVICE))
    close(found, Reference().forward(math, views, x))
    views["down_proj"] = [encoded(random(64, 32).bfloat16(), "Q8_0")]
    views["gate_up_proj"] = [random(64, 10), random(64, 54)]
    turned = Views({**views, "down_proj": [views["down_proj"][0].decode().T]})
    found = kernel.forward(math, views_there(views), x.to(DEVICE))
    close(found, Reference().forward(math, turned, x))


def test_tokens_of_another_size_are_the_references_affair(kernel: gpu.Kernel) -> None:
    views = views_there(expert("BF16", Shape()))
    with pytest.raises(RuntimeError, match="shapes"):
        kernel.forward(GATED, views, random(2, 33).to(DEVICE))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_what_is_not_finite_shows(kernel: gpu.Kernel, dtype: torch.dtype) -> None:
    views = views_there(expert("Q8_0", Shape(64, 32)))
    for value in (float("nan"), float("inf")):
        for tokens in (2, MANY):
            x = torch.ones(tokens, 64, dtype=dtype)
            x[-1, 5] = value
            with np.errstate(invalid="ignore", over="ignore"):
                found = kernel.forward(GATED, views, x.to(DEVICE)).cpu()
            assert not found[-1].isfinite().any() and found[:-1].isfinite().all()


def test_no_tokens(kernel: gpu.Kernel) -> None:
    views = views_there(expert("BF16", Shape()))
    x = random(0, 48).to(DEVICE)
    kernel.run(GATED, [Job(views, x, torch.empty_like(x))])
    assert kernel.forward(GATED, views, x).shape == (0, 48)
