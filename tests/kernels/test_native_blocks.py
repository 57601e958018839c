"""Compiled decoder blocks against plain ones, on every instruction set that this processor has."""

import math

import pytest
import torch

from moe_infinity.kernels import native
from moe_infinity.kernels.blocks import (
    BlockSpec,
    Choice,
    Linear,
    Norm,
    Router,
    pack_sum,
    pack_token,
)

pytestmark = pytest.mark.skipif(native.native is None, reason="installed without a compiler")

SETS = native.native.instruction_sets() if native.native is not None else []
TYPES = (torch.bfloat16, torch.float16)
ROUNDING = {torch.bfloat16: 2**-6, torch.float16: 2**-9}  # of a few operations one after the other
Token = tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor], torch.Tensor, torch.Tensor]

# hidden, heads, key-value heads, head_dim, rotary_dim, norms of heads, biases
SHAPES = [
    (64, 4, 2, 16, 16, "each", False),
    (96, 6, 1, 24, 8, None, True),
    (40, 20, 2, 8, 8, "all", True),
    (256, 2, 2, 128, 128, "each", False),
]


def random(*shape: int, seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=generator) * scale


def make_spec(shape: tuple, dtype: torch.dtype, router: Router | None = None) -> BlockSpec:
    hidden, heads, kv_heads, dim, rotary, norms, biases = shape

    def linear(rows: int, cols: int, seed: int) -> Linear:
        weight = random(rows, cols, seed=seed, scale=cols**-0.5).to(dtype)
        return Linear(weight, random(rows, seed=seed).to(dtype) if biases else None)

    def norm(size: int, seed: int) -> Norm:
        return Norm((1 + random(size, seed=seed, scale=0.2)).to(dtype), 1e-5)

    def head_norm(num_heads: int, seed: int) -> Norm | None:
        return norm(dim if norms == "each" else num_heads * dim, seed) if norms else None

    return BlockSpec(
        linear(heads * dim, hidden, 1),
        linear(kv_heads * dim, hidden, 2),
        linear(kv_heads * dim, hidden, 3),
        linear(hidden, heads * dim, 4),
        norm(hidden, 5),
        head_norm(heads, 6),
        head_norm(kv_heads, 7),
        norm(hidden, 8),
        dim,
        rotary,
        dim**-0.5,
        router,
    )


def make_token(spec: BlockSpec, position: int) -> Token:
    """x [1, H], cosines and sines, keys and values [kv_heads, room, head_dim], some of them set."""
    dtype, room = spec.q.weight.dtype, position + 3
    angles = random(spec.rotary_dim // 2, seed=9).repeat(2)
    turns = angles.cos().to(dtype), angles.sin().to(dtype)
    kv = random(2, spec.num_kv_heads, room, spec.head_dim, seed=10).to(dtype)
    kv[:, :, position:] = math.nan  # not there yet
    return random(1, spec.q.weight.shape[1], seed=11).to(dtype), turns, kv[0], kv[1]


def attend(kernel: native.Kernel, spec: BlockSpec, token: Token, position: int, choice: Choice):
    x, turns, keys, values = token
    h, normed = torch.empty_like(x), torch.empty_like(x)
    packed = pack_token(x, turns, (keys, values), position, h, normed, choice)
    kernel.attend(spec.pack(), packed)
    return h, normed


def normalise(norm: Norm | None, x: torch.Tensor) -> torch.Tensor:
    if norm is None:
        return x
    parts = x.float().view(-1, norm.weight.numel())
    scaled = parts * torch.rsqrt(parts.pow(2).mean(-1, keepdim=True) + norm.eps)
    return (norm.weight * scaled.to(x.dtype)).view_as(x)


def rotate(x: torch.Tensor, turns: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """x [heads, head_dim]"""
    cos, sin = turns
    turned, kept = x[:, : len(cos)], x[:, len(cos) :]
    first, second = turned.chunk(2, dim=-1)
    return torch.cat([turned * cos + torch.cat([-second, first], dim=-1) * sin, kept], dim=-1)


def plain_attend(spec: BlockSpec, token: Token, position: int) -> tuple[torch.Tensor, torch.Tensor]:
    """As transformers computes it; writes the token's keys and values."""
    x, turns, keys, values = token
    linear = torch.nn.functional.linear
    normed = normalise(spec.before, x)
    q, k, v = (linear(normed, *each)[0] for each in (spec.q, spec.k, spec.v))
    q = rotate(normalise(spec.q_norm, q).view(-1, spec.head_dim), turns)
    keys[:, position] = rotate(normalise(spec.k_norm, k).view(-1, spec.head_dim), turns)
    values[:, position] = v.view(-1, spec.head_dim)
    group = len(q) // len(keys)
    known = keys[:, : position + 1].float().repeat_interleave(group, 0)
    meant = values[:, : position + 1].float().repeat_interleave(group, 0)
    scores = torch.einsum("hd,htd->ht", q.float(), known) * spec.scaling
    context = torch.einsum("ht,htd->hd", scores.softmax(-1), meant).to(x.dtype)
    h = x + linear(context.reshape(1, -1), *spec.o)
    return h, normalise(spec.after, h)


def assert_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    error = (found.float() - expected.float()).abs().max()
    assert error <= ROUNDING[found.dtype] * (1 + expected.float().abs().max()), float(error)


@pytest.fixture(params=SETS)
def kernel(request: pytest.FixtureRequest) -> native.Kernel:
    return native.Kernel(2, str(request.param))


@pytest.mark.parametrize("position", [0, 1, 255, 256, 700])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", TYPES)
def test_equals_the_plain_block(
    kernel: native.Kernel, dtype: torch.dtype, shape: tuple, position: int
) -> None:
    spec = make_spec(shape, dtype)
    token, same = make_token(spec, position), make_token(spec, position)
    found = attend(kernel, spec, token, position, Choice(1, 1))
    expected = plain_attend(spec, same, position)
    for mine, plain in zip(found, expected, strict=True):
        assert_close(mine, plain)
    for mine, plain in zip(token[2:], same[2:], strict=True):
        assert_close(mine[:, : position + 1], plain[:, : position + 1])
        assert mine[:, position + 1 :].isnan().all(), "wrote beyond its place"


@pytest.mark.parametrize("shape", SHAPES)
def test_threads_and_addresses_change_nothing(shape: tuple) -> None:
    spec = make_spec(shape, torch.bfloat16)
    results = []
    for threads in (1, 2, 3):
        x, turns, keys, values = make_token(spec, 600)
        moved = torch.empty(x.numel() + threads, dtype=x.dtype)[threads:].view_as(x).copy_(x)
        kernel = native.Kernel(threads)
        results.append(attend(kernel, spec, (moved, turns, keys, values), 600, Choice(1, 1)))
    for h, normed in results[1:]:
        assert torch.equal(h, results[0][0]) and torch.equal(normed, results[0][1])


@pytest.mark.parametrize("normalises", [True, False])
@pytest.mark.parametrize("rounds", [True, False])
def test_router(kernel: native.Kernel, normalises: bool, rounds: bool) -> None:
    weight = random(30, 64, seed=3).bfloat16()
    spec = make_spec(SHAPES[0], torch.bfloat16, Router(weight, 5, normalises, rounds))
    choice = Choice(30, 5)
    _, normed = attend(kernel, spec, make_token(spec, 3), 3, choice)
    logits = torch.nn.functional.linear(normed, weight)
    assert_close(choice.logits.bfloat16(), logits)
    weights, ids = choice.logits.softmax(-1).topk(5)
    assert choice.ids.tolist() == ids.tolist()
    expected = weights / weights.sum() if normalises else weights
    expected = expected.bfloat16().float() if rounds else expected
    torch.testing.assert_close(choice.weights, expected, rtol=8e-3 if rounds else 1e-5, atol=0)


def test_of_equally_likely_experts_the_first_are_chosen(kernel: native.Kernel) -> None:
    weight = torch.zeros(9, 64, dtype=torch.bfloat16)
    spec = make_spec(SHAPES[0], torch.bfloat16, Router(weight, 4, True, True))
    choice = Choice(9, 4)
    attend(kernel, spec, make_token(spec, 3), 3, choice)
    assert choice.ids.tolist() == [[0, 1, 2, 3]]
    assert choice.weights.tolist() == [[0.25] * 4]


def wide(spec: BlockSpec, name: str) -> BlockSpec:
    weight = getattr(spec, name).weight
    return spec._replace(**{name: Linear(torch.cat([weight, weight]))})


@pytest.mark.parametrize(
    "change",
    [
        *(lambda spec, name=name: wide(spec, name) for name in "qkvo"),
        lambda spec: spec._replace(head_dim=0),
        lambda spec: spec._replace(head_dim=48),
        lambda spec: spec._replace(rotary_dim=32),
        lambda spec: spec._replace(rotary_dim=7),
        lambda spec: spec._replace(after=Norm(spec.after.weight[:5], 1e-5)),
        lambda spec: spec._replace(q_norm=Norm(spec.after.weight[:5], 1e-5)),
        lambda spec: spec._replace(router=Router(spec.q.weight, 65, True, True)),
        lambda spec: spec._replace(router=Router(spec.q.weight[:, :5], 2, True, True)),
        lambda spec: spec._replace(q=Linear(spec.q.weight, spec.q.weight[0, :5])),
    ],
)
def test_sizes_that_do_not_fit_together_never_reach_the_compiled_code(change) -> None:
    spec = make_spec(SHAPES[0], torch.bfloat16)
    spec.require_sizes()
    with pytest.raises(ValueError, match="sizes do not fit together"):
        change(spec).pack()


def test_a_broken_token_shows(kernel: native.Kernel) -> None:
    spec = make_spec(SHAPES[0], torch.bfloat16, Router(random(9, 64).bfloat16(), 4, True, True))
    x, *rest = make_token(spec, 3)
    x[0, 5] = math.nan
    choice = Choice(9, 4)
    h, _ = attend(kernel, spec, (x, *rest), 3, choice)
    assert h.isnan().any() and choice.weights.isnan().all()
    assert ((choice.ids >= 0) & (choice.ids < 9)).all()
    assert len(set(choice.ids[0].tolist())) == 4


@pytest.mark.parametrize("rounds", [True, False])
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("size", [50, 600])
def test_sum(kernel: native.Kernel, dtype: torch.dtype, rounds: bool, size: int) -> None:
    outs, h = random(3, size).to(dtype), random(1, size).to(dtype)
    weights = torch.tensor([0.5, 0.3, 0.2]).to(dtype).float()
    out = torch.empty_like(h)
    kernel.sum(pack_sum(outs, weights, rounds, h, out))
    products = outs.float() * weights[:, None]
    products = products.to(dtype).float() if rounds else products
    expected = products[0] + products[1] + products[2]
    assert torch.equal(out[0], h[0] + expected.to(dtype))
