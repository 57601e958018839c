"""The reference kernel against the formula, written out on whole matrices."""

import itertools
from collections.abc import Callable

import pytest
import torch

from moe_infinity.errors import UnsupportedModelError
from moe_infinity.kernels.base import ExpertMath, Views
from moe_infinity.kernels.formats import DTYPES, is_viewable, part_views, require_supported
from moe_infinity.kernels.reference import Kernel
from moe_infinity.types import Block, ExpertKey, ExpertSpec, Part, ReadRange

HIDDEN, INTER, TOKENS = 6, 4, 5
Act = Callable[[torch.Tensor], torch.Tensor]


def gated(x: torch.Tensor) -> torch.Tensor:
    gate, up = x.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate) * up


def weights(first: str, width: int, has_bias: bool, transposed: bool) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    up, down = torch.randn(width, HIDDEN), torch.randn(HIDDEN, INTER)
    found = {first: up.T.contiguous() if transposed else up}
    found["down_proj"] = down.T.contiguous() if transposed else down
    if has_bias:
        found |= {f"{first}_bias": torch.randn(width), "down_proj_bias": torch.randn(HIDDEN)}
    return found


def cut(matrix: torch.Tensor, dim: int, num_blocks: int) -> list[torch.Tensor]:
    """Uneven blocks along dim that cover it."""
    if num_blocks == 1:
        return [matrix]
    return [matrix.narrow(dim, 0, 1), matrix.narrow(dim, 1, matrix.shape[dim] - 1)]


def formula(math: ExpertMath, whole: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    def apply(name: str, value: torch.Tensor) -> torch.Tensor:
        matrix = whole[name] if math.is_transposed else whole[name].T
        result = torch.einsum("ti,io->to", value, matrix)
        return result + whole[f"{name}_bias"] if math.has_bias else result

    inner = math.gate(apply("gate_up_proj" if math.has_gate else "up_proj", x))
    out = apply("down_proj", inner)
    return math.post(out) if math.post else out


@pytest.mark.parametrize(
    ("has_gate", "has_bias", "transposed", "has_post", "num_blocks"),
    list(itertools.product(*[(False, True)] * 4, (1, 2))),
)
def test_forward(
    has_gate: bool, has_bias: bool, transposed: bool, has_post: bool, num_blocks: int
) -> None:
    first, width = ("gate_up_proj", 2 * INTER) if has_gate else ("up_proj", INTER)
    post: Act | None = (lambda out: out * 3 + 1) if has_post else None
    math = ExpertMath(has_gate, has_bias, transposed, gated if has_gate else torch.relu, post)
    whole = weights(first, width, has_bias, transposed)
    views: Views = {
        name: cut(value, 1 if transposed and value.ndim == 2 else 0, num_blocks)
        for name, value in whole.items()
    }
    x = torch.randn(TOKENS, HIDDEN)
    out = Kernel().forward(math, views, x)
    assert out.shape == (TOKENS, HIDDEN)
    torch.testing.assert_close(out, formula(math, whole, x))
    assert Kernel().forward(math, views, x[:0]).shape == (0, HIDDEN)


@pytest.mark.parametrize("stored", list(DTYPES.values()))
@pytest.mark.parametrize("computed", list(DTYPES.values()))
def test_weights_are_converted_to_the_dtype_of_x(
    stored: torch.dtype, computed: torch.dtype
) -> None:
    math = ExpertMath(True, True, False, gated)
    whole = {n: v.to(stored) for n, v in weights("gate_up_proj", 2 * INTER, True, False).items()}
    x = torch.randn(TOKENS, HIDDEN).to(computed)
    out = Kernel().forward(math, {n: [v] for n, v in whole.items()}, x)
    assert out.dtype == computed
    same = {n: v.to(computed) for n, v in whole.items()}
    tolerance = {torch.float32: 1e-5, torch.float16: 2e-2, torch.bfloat16: 2e-1}[computed]
    expected = formula(math, same, x)
    torch.testing.assert_close(out, expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("number_format", ["F8_E5M2", "I8", "F64", "NF4"])
def test_unsupported_formats_are_named(number_format: str) -> None:
    with pytest.raises(UnsupportedModelError, match=rf"'a\.b'.*{number_format}.*BF16, F16, F32"):
        require_supported("a.b", number_format)


@pytest.mark.parametrize("number_format", list(DTYPES))
def test_supported_formats(number_format: str) -> None:
    require_supported("a.b", number_format)


@pytest.mark.parametrize("offset", [0, 1, 2, 3, 4])
@pytest.mark.parametrize("number_format", list(DTYPES))
def test_views_share_the_slot_unless_they_cannot(number_format: str, offset: int) -> None:
    dtype = DTYPES[number_format]
    values = torch.arange(6, dtype=dtype).reshape(2, 3)
    slot = torch.zeros(64, dtype=torch.uint8)
    slot[offset : offset + values.nbytes] = values.view(torch.uint8).flatten()
    part = Part("w", number_format, (3, 2), 0, (Block(offset, (3, 2), (1, 3), 0),))
    spec = ExpertSpec(ExpertKey(0, 0), (part,), (ReadRange(0, 0, 4096, 64, 0),), values.nbytes)
    (view,) = part_views(spec, slot)["w"]
    assert torch.equal(view, values.T)
    shared = view.untyped_storage().data_ptr() == slot.untyped_storage().data_ptr()
    assert shared == is_viewable(spec) == (offset % dtype.itemsize == 0)
