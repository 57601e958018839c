"""The last norm and the head of one token: the same bits together as one after the other."""

from typing import Any

import pytest
import torch
from torch import nn
from transformers.models.cohere.modeling_cohere import CohereLayerNorm
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeRMSNorm

from moe_infinity.kernels import native
from moe_infinity.kernels.packed import PackedMatrix, encode
from moe_infinity.model.linears import speed_up
from moe_infinity.model.packed_linears import attach_packed, run_packed
from moe_infinity.model.tail import Tail, speed_up_tail

pytestmark = pytest.mark.skipif(native.native is None, reason="installed without a compiler")
SETS = native.native.instruction_sets() if native.native else []
HIDDEN, VOCABULARY = 96, 70


def ends(dtype: torch.dtype, bias: bool = False, head_format: str | None = None) -> nn.Module:
    torch.manual_seed(0)
    model: Any = nn.Module()
    model.norm = Qwen3MoeRMSNorm(HIDDEN)
    nn.init.normal_(model.norm.weight)
    model.head = nn.Linear(HIDDEN, VOCABULARY, bias=bias)
    model.to(dtype)
    if head_format is not None:
        codes = encode(model.head.weight.detach(), head_format)
        assert codes is not None
        packed = PackedMatrix(head_format, VOCABULARY, HIDDEN, torch.from_numpy(codes))
        attach_packed(model.head, packed)
    return model


def faster(model: Any, instruction_set: str) -> Tail | None:
    kernel = native.Kernel(2, instruction_set)
    run_packed(model, kernel)
    speed_up(model, kernel)
    return speed_up_tail(kernel, model.norm, model.head)


@pytest.mark.parametrize("instruction_set", SETS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias, head_format", [(False, None), (True, None), (True, "Q8_0")])
@torch.no_grad()
def test_together_and_apart_say_every_bit_alike(
    instruction_set: str, dtype: torch.dtype, bias: bool, head_format: str | None
) -> None:
    plain, fast = (ends(dtype, bias, head_format) for _ in range(2))
    run_packed(plain, native.Kernel(1, "portable"))
    tail = faster(fast, instruction_set)
    assert tail is not None
    generator = torch.Generator().manual_seed(1)
    for scale in (1e-3, 1.0, 50.0):
        x = (torch.randn(1, 1, HIDDEN, generator=generator) * scale).to(dtype)
        apart = fast.head(fast.norm(x))
        assert torch.equal(tail.of(x), apart)
        call = tail.call(x)
        tail._kernel.finish(call)
        assert call.scores is not None and torch.equal(call.scores, apart[0].float())
        torch.testing.assert_close(apart, plain.head(plain.norm(x)), atol=0.03, rtol=0.03)
        torch.testing.assert_close(fast.norm(x), plain.norm(x), atol=0, rtol=2**-6)


OTHERS = ["gemma", "layer_norm", "no_bias", "cohere", "float32", "odd_sizes", "strided"]


@pytest.mark.parametrize("other", OTHERS)
@torch.no_grad()
def test_others_are_left_alone(other: str) -> None:
    model = ends(torch.float32 if other == "float32" else torch.bfloat16)
    if other == "gemma":
        model.norm = GemmaRMSNorm(HIDDEN).bfloat16()
        nn.init.normal_(model.norm.weight)
    if other == "layer_norm":
        model.norm = nn.LayerNorm(HIDDEN).bfloat16()
        nn.init.normal_(model.norm.bias)
    if other in ("no_bias", "cohere"):
        hidden = 4096  # a token's mean is small beside its length there
        make = nn.LayerNorm if other == "no_bias" else CohereLayerNorm
        model.norm = (make(hidden, bias=False)).bfloat16()
        model.head = nn.Linear(hidden, VOCABULARY).bfloat16()
    if other == "odd_sizes":
        model.head = nn.Linear(HIDDEN + 2, VOCABULARY).bfloat16()
    if other == "strided":
        model.head.weight = nn.Parameter(torch.randn(HIDDEN, VOCABULARY).bfloat16().t())
    stock = model.norm.forward
    assert faster(model, SETS[-1]) is None
    assert model.norm.forward == stock


@torch.no_grad()
def test_each_has_a_place_of_its_own_whatever_torch_makes_by_default() -> None:
    tail = faster(ends(torch.bfloat16), SETS[-1])
    assert tail is not None
    x = torch.randn(1, 1, HIDDEN).bfloat16()
    first = tail.of(x)
    kept = first.clone()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            tail.make_room()
            second = tail.of(-x)
            call = tail.call(x)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(first, kept) and not torch.equal(second, kept)
    assert call.scores is not None and call.scores.dtype is torch.float32 and call.scores.is_cpu


@torch.no_grad()
def test_more_tokens_and_a_changed_norm_are_the_modules_own() -> None:
    plain, fast = ends(torch.bfloat16), ends(torch.bfloat16)
    assert faster(fast, SETS[-1]) is not None
    many = torch.randn(1, 3, HIDDEN).bfloat16()
    assert torch.equal(fast.norm(many), plain.norm(many))
    x = many[:, :1]
    for model in (plain, fast):
        model.norm.variance_epsilon = 5.0
    assert torch.equal(fast.norm(x), plain.norm(x))
    with torch.enable_grad():
        assert fast.norm(x).requires_grad
