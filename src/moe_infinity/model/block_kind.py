"""Is a decoder block of the usual kind: norm, attention with rotary positions, norm, experts?

Llama's, and that of most models since. Its parts have to look so, and it has to compute what the
compiled code computes, shown a few tokens: what scales, bounds or orders things otherwise is found
out and left alone.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn

from moe_infinity.kernels import native
from moe_infinity.kernels.blocks import BlockSpec, Choice, Linear, Norm, Router, pack_token
from moe_infinity.model.cache_name import CACHE
from moe_infinity.model.found_block import Found
from moe_infinity.model.kv_cache import PreallocatedLayer, new_cache
from moe_infinity.model.loading import Anatomy
from moe_infinity.model.packed_linears import packed_of
from moe_infinity.model.routers import block_around

_log = logging.getLogger(__name__)

_BLOCK = ("input_layernorm", "self_attn", "post_attention_layernorm")  # and what has the experts
_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
_HEAD_NORMS = ("q_norm", "k_norm")
# They bound large numbers, which a few random tokens may not reach.
_BOUNDS = ("clip_qkv", "attn_logit_softcapping", "attn_logit_softcap")
_CONTEXT = 4  # tokens before the one that is compared
SCALES = (1e-3, 1.0)  # of the tokens: small beside what attention adds, and not
_TOLERANCE = 0.03  # relative: what rounding explains; another norm or scale is far beyond
_ULP = 2**-7  # of bf16, the coarser type
_ROUTED = 8  # tokens whose routing is compared


class _Parts(NamedTuple):
    before: Any
    attention: Any
    after: Any
    mlp: Any


def recognise(
    model: Any, kernel: native.Kernel, block: nn.Module, experts: nn.Module
) -> Found | None:
    """What the compiled code needs to know of ``block``, which holds ``experts``; None: leave it
    to torch."""
    parts = _parts_of(block, experts)
    if parts is None or _is_bounded(model.config):
        return None
    try:
        positions = torch.zeros(1, 1, dtype=torch.int64)
        turns = _rotary(model, parts.before.weight[None, None], positions)
        spec = _spec_of(parts, turns[0].shape[-1])
        if spec is None or not _computes_the_same(model, kernel, block, parts, spec):
            return None
        router = _router_of(model, kernel, parts.mlp, experts, spec)
        return Found(block, parts.mlp, parts.attention.layer_idx, spec._replace(router=router))
    except Exception:  # a block of another kind may want anything
        _log.debug("%s: not of the usual kind", type(block).__name__, exc_info=True)
        return None


def look_usual(anatomy: Anatomy) -> bool:
    """Whether a model's blocks look of the usual kind, before any weight is read."""
    if anatomy.dtype not in native.SHORT_TYPES or _is_bounded(anatomy.config):
        return False
    found = [
        _parts_of(block_around(anatomy.meta, each.name), each.module) for each in anatomy.experts
    ]
    return all(parts is not None and _has_usual_attention(parts) for parts in found)


def _is_bounded(config: Any) -> bool:
    text = config.get_text_config()
    return any(getattr(each, name, None) for each in (config, text) for name in _BOUNDS)


def _parts_of(block: nn.Module, experts: nn.Module) -> _Parts | None:
    children = dict(block.named_children())
    if len(children) != 4 or not children.keys() >= set(_BLOCK):
        return None
    before, attention, after = (children.pop(name) for name in _BLOCK)
    (mlp,) = children.values()
    found = _Parts(before, attention, after, mlp)
    return found if any(module is experts for module in mlp.modules()) else None


def _spec_of(parts: _Parts, rotary_dim: int) -> BlockSpec | None:
    """Read off the modules; the comparison says whether it is all there is to them."""
    if not _has_usual_attention(parts):
        return None
    attention, children = parts.attention, dict(parts.attention.named_children())
    q, k, v, o = (linear_of(children[name]) for name in _PROJECTIONS)
    q_norm, k_norm = (norm_of(children[name]) if name in children else None for name in _HEAD_NORMS)
    before, after = norm_of(parts.before), norm_of(parts.after)
    sizes = (attention.head_dim, rotary_dim, attention.scaling)
    spec = BlockSpec(q, k, v, o, before, q_norm, k_norm, after, *sizes)
    linears = (q, k, v, o)
    weights = [x.weight for x in linears if isinstance(x.weight, torch.Tensor)]
    weights += [x.weight for x in (before, q_norm, k_norm, after) if x is not None]
    weights += [x.bias for x in linears if x.bias is not None]
    dtype = before.weight.dtype
    is_alike = all(w.dtype is dtype and w.is_contiguous() for w in weights)
    return spec if dtype in native.SHORT_TYPES and is_alike else None


def _has_usual_attention(parts: _Parts) -> bool:
    children = {name for name, _ in parts.attention.named_children()}
    known = {*_PROJECTIONS, *_HEAD_NORMS}
    has_own = any(True for _ in parts.attention.parameters(recurse=False))  # such as sinks
    return known >= children >= set(_PROJECTIONS) and not has_own


def linear_of(module: Any) -> Linear:
    if type(module) is not nn.Linear:
        raise TypeError(f"{type(module).__name__}: not a plain linear layer")
    bias = module.bias
    weight = packed_of(module) or module.weight.detach()
    return Linear(weight, None if bias is None else bias.detach())


def norm_of(module: Any) -> Norm:
    if [name for name, _ in module.named_parameters()] != ["weight"]:
        raise TypeError(f"{type(module).__name__}: not a plain RMS norm")
    eps = getattr(module, "variance_epsilon", None)
    return Norm(module.weight.detach(), module.eps if eps is None else eps)


@torch.no_grad()
def _computes_the_same(
    model: Any, kernel: native.Kernel, block: Any, parts: _Parts, spec: BlockSpec
) -> bool:
    (hidden,), dtype = spec.before.weight.shape, spec.before.weight.dtype
    generator = torch.Generator().manual_seed(0)
    for scale in SCALES:
        # Not around 0: a norm that subtracts the mean is another one.
        x = torch.randn(1, _CONTEXT + 1, hidden, generator=generator).add(1).mul(scale).to(dtype)
        answer = torch.randn(1, 1, hidden, generator=generator).mul(scale).to(dtype)
        cache: Any = new_cache(model.config, _CONTEXT + 1)
        with _answering(parts.mlp, answer) as shown:
            _call(model, block, x[:, :-1], 0, cache)
            said = _call(model, block, x[:, -1:], _CONTEXT, cache)
        layer = cache.layers[parts.attention.layer_idx]
        if type(layer) is not PreallocatedLayer or not isinstance(said, torch.Tensor):
            return False
        before, expected_keys = x[0, -1:], layer.keys.clone()
        expected_h = said[0] - answer[0]
        h, normed, _ = _attend(model, kernel, spec, before, layer)
        room = _ULP * float(said.float().norm())  # added and subtracted, small numbers lose digits
        if not (
            _is_close(layer.keys, expected_keys)
            and _is_close(normed, shown[-1][0].view(1, -1))
            and _is_close(h - before, expected_h - before, room)
        ):
            return False
    return True


def _call(model: Any, block: Any, x: torch.Tensor, start: int, cache: Any) -> Any:
    """The block as its model calls it, on tokens from position ``start`` on."""
    positions = torch.arange(start, start + x.shape[1])[None]
    return block(
        x,
        attention_mask=None,
        position_ids=positions,
        use_cache=True,
        position_embeddings=_rotary(model, x, positions),
        **{CACHE: cache},
    )


def _rotary(model: Any, x: torch.Tensor, positions: torch.Tensor) -> Any:
    """Cosines and sines [1, T, rotary_dim] as the model makes them for all of its blocks."""
    return model.get_decoder().rotary_emb(x, positions)


def _attend(
    model: Any, kernel: native.Kernel, spec: BlockSpec, x: torch.Tensor, layer: PreallocatedLayer
) -> tuple[torch.Tensor, torch.Tensor, Choice]:
    """The compiled code on the last token x [1, H] that ``layer`` holds: h, normed, routing."""
    position = layer.keys.shape[-2] - 1
    turns = _rotary(model, x[None], torch.tensor([[position]]))
    h, normed = torch.empty_like(x), torch.empty_like(x)
    router = spec.router
    choice = Choice(router.weight.shape[0], router.top_k) if router else Choice(1, 1)
    kv = (layer.keys.contiguous(), layer.values.contiguous())
    kernel.attend(spec.pack(), pack_token(x.contiguous(), turns, kv, position, h, normed, choice))
    return h, normed, choice


def _is_close(found: torch.Tensor, expected: torch.Tensor, room: float = 0.0) -> bool:
    found, expected = found.float(), expected.float()
    return bool((found - expected).norm() <= _TOLERANCE * expected.norm() + room)


@contextmanager
def _answering(module: Any, answer: torch.Tensor) -> Iterator[list[list[torch.Tensor]]]:
    """A module that says ``answer`` to everything; yields what it is shown, call by call."""
    shown: list[list[torch.Tensor]] = []

    def forward(*args: Any, **kwargs: Any) -> torch.Tensor:
        shown.append([x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor)])
        return answer

    own = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield shown
    finally:
        del module.forward
        if own is not None:
            module.forward = own


def _router_of(
    model: Any, kernel: native.Kernel, mlp: Any, experts: Any, spec: BlockSpec
) -> Router | None:
    """The router, if all that ``mlp`` does is to choose experts and to add up what they say."""
    others = [child for child in mlp.children() if child is not experts]
    weight = getattr(others[0], "weight", None) if len(others) == 1 else None
    if weight is None or sum(1 for _ in mlp.parameters()) != 1 or any(True for _ in mlp.buffers()):
        return None
    if weight.dtype is not spec.before.weight.dtype or not weight.is_contiguous():
        return None
    plain = Router(weight.detach(), others[0].top_k, normalises=False, rounds=False)
    routed = [_route(model, kernel, spec._replace(router=plain), x) for x in _routed_tokens(spec)]
    said = _routing_of(mlp, experts, routed)
    if said is None:
        return None
    kinds = itertools.product((True, False), (said.dtype is spec.before.weight.dtype,))
    routers = [Router(plain.weight, plain.top_k, *kind) for kind in kinds]
    errors = [_routing_error(router, said, [choice for _, choice in routed]) for router in routers]
    best = min(errors)
    return routers[errors.index(best)] if best <= _TOLERANCE else None


def _routed_tokens(spec: BlockSpec) -> list[torch.Tensor]:
    (hidden,), dtype = spec.before.weight.shape, spec.before.weight.dtype
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(1, hidden, generator=generator).to(dtype) for _ in range(_ROUTED)]


def _route(
    model: Any, kernel: native.Kernel, spec: BlockSpec, x: torch.Tensor
) -> tuple[torch.Tensor, Choice]:
    """What the experts of a token x [1, H] that is alone are shown, and which they are."""
    layer = PreallocatedLayer(1)
    layer.lazy_initialization(torch.empty(0, dtype=x.dtype), torch.empty(0, dtype=x.dtype))
    layer.keys, layer.values = torch.zeros(2, 1, spec.num_kv_heads, 1, spec.head_dim, dtype=x.dtype)
    _, normed, choice = _attend(model, kernel, spec, x, layer)
    return normed, choice


@torch.no_grad()
def _routing_of(
    mlp: Any, experts: Any, routed: list[tuple[torch.Tensor, Choice]]
) -> torch.Tensor | None:
    """The weights [T, K] that the model's own code gives to the same experts of tokens; None if it
    chooses others, or does more than to choose."""
    tokens = torch.cat([normed for normed, _ in routed])
    generator = torch.Generator().manual_seed(2)
    answer = torch.randn(tokens.shape, generator=generator).to(tokens.dtype)
    with _answering(experts, answer) as shown:
        said = mlp(tokens[None])
    given, ids, weights = shown[0]
    is_all = torch.equal(said.view(answer.shape), answer) and torch.equal(given, tokens)
    if not is_all or ids.shape[0] != len(routed):
        return None
    choices = zip(routed, ids, strict=True)
    is_same = all(_is_same_choice(choice, own[None]) for (_, choice), own in choices)
    return weights if is_same else None


def _routing_error(router: Router, said: torch.Tensor, choices: list[Choice]) -> float:
    """Mean relative error of a router's weights."""
    chances = torch.cat([choice.weights for choice in choices])
    weights = chances / chances.sum(-1, keepdim=True) if router.normalises else chances
    if router.rounds:
        weights = weights.to(said.dtype)
    return float(((weights - said).abs() / said).mean())


def _is_same_choice(choice: Choice, ids: torch.Tensor) -> bool:
    """Up to rounding: of experts that are next to equally likely either may be chosen."""
    if ids.shape != choice.ids.shape:
        return False
    difference = choice.logits[0, choice.ids[0]] - choice.logits[0, ids[0]]
    return bool((difference.abs() <= _TOLERANCE * (1 + choice.logits.abs().max())).all())
