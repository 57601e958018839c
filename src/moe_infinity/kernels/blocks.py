"""Decoder blocks as the compiled code reads them (native/block.hpp): numbers and addresses.

Whoever packs something keeps it alive.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

import torch

from moe_infinity.kernels.described import NO_MATRIX, TYPES, describe, num_cols, num_rows
from moe_infinity.kernels.packed import PackedMatrix

_BIASES = struct.Struct("<4Q")
_NORM = struct.Struct("<QfI")
_REST = struct.Struct("<fIIIIIIIII")
_TOKEN = struct.Struct("<12Q")
_SUM = struct.Struct("<4Q4I")
_ENDS = struct.Struct("<3Q")  # of a tail: x, out, scores
_TAIL = struct.Struct("<QII")  # behind the head's matrix and the norm


class Linear(NamedTuple):
    """weight [out, in], as it is or packed, and bias [out]."""

    weight: torch.Tensor | PackedMatrix
    bias: torch.Tensor | None = None


class Norm(NamedTuple):
    """An RMS norm, weight [size]; what is longer is normalised piece by piece."""

    weight: torch.Tensor
    eps: float


class Router(NamedTuple):
    """Softmax over weight [E, H] times the input, of which the top_k likeliest count.

    normalises: their weights add up to one. rounds: they are rounded to the model's dtype.
    """

    weight: torch.Tensor
    top_k: int
    normalises: bool
    rounds: bool


class BlockSpec(NamedTuple):
    """What a block of the usual kind does beside its experts. All of one dtype, but for linear
    layers that are packed."""

    q: Linear
    k: Linear
    v: Linear
    o: Linear
    before: Norm
    q_norm: Norm | None
    k_norm: Norm | None
    after: Norm
    head_dim: int
    rotary_dim: int
    scaling: float
    router: Router | None = None

    @property
    def num_kv_heads(self) -> int:
        return num_rows(self.k.weight) // self.head_dim

    def require_sizes(self) -> None:
        """Raise ValueError for sizes that do not fit together: the compiled code trusts them."""
        (q, k, v, o), hidden = _sizes_of(self), self.before.weight.numel()
        dim, router = self.head_dim, self.router
        sound = (
            dim > 0
            and k[0] > 0
            and q[0] % dim == k[0] % dim == 0
            and (q[0] // dim) % (k[0] // dim) == 0
            and v == k
            and q[1] == k[1] == hidden
            and o == (hidden, q[0])
            and 0 < self.rotary_dim <= dim
            and self.rotary_dim % 2 == 0
            and self.after.weight.numel() == hidden
            and (self.q_norm is None or self.q_norm.weight.numel() in (dim, q[0]))
            and (self.k_norm is None or self.k_norm.weight.numel() in (dim, k[0]))
            and (router is None or 0 < router.top_k <= router.weight.shape[0])
            and (router is None or router.weight.shape[1] == hidden)
        )
        for linear, size in zip((self.q, self.k, self.v, self.o), (q, k, v, o), strict=True):
            sound = sound and (linear.bias is None or linear.bias.numel() == size[0])
        if not sound:
            raise ValueError(f"got a block whose sizes do not fit together: {q}, {k}, {v}, {o}")

    def pack(self) -> bytes:
        self.require_sizes()
        linears, router = (self.q, self.k, self.v, self.o), self.router
        matrices = [describe(each.weight) for each in linears]
        matrices.append(NO_MATRIX if router is None else describe(router.weight))
        biases = _BIASES.pack(*(0 if x.bias is None else x.bias.data_ptr() for x in linears))
        norms = map(_pack_norm, (self.before, self.q_norm, self.k_norm, self.after))
        choice = (0, 0, 0) if router is None else (router.top_k, router.normalises, router.rounds)
        rest = _REST.pack(
            self.scaling,
            num_rows(self.q.weight) // self.head_dim,
            self.num_kv_heads,
            self.head_dim,
            self.rotary_dim,
            TYPES[self.before.weight.dtype],
            *choice,
            0,
        )
        return b"".join((*matrices, biases, *norms, rest))


def _sizes_of(block: BlockSpec) -> list[tuple[int, int]]:
    """[out, in] of q, k, v and o."""
    weights = (block.q.weight, block.k.weight, block.v.weight, block.o.weight)
    return [(num_rows(weight), num_cols(weight)) for weight in weights]


class Choice:
    """Where a router's word on one token goes: logits float32 [1, E], the top_k ids and weights
    [1, K]. seen: the same ids and weights as arrays."""

    def __init__(self, num_experts: int, top_k: int) -> None:
        self.logits = torch.empty(1, num_experts)
        self.ids = torch.empty(1, top_k, dtype=torch.int64)
        self.weights = torch.empty(1, top_k)
        self.seen = (self.ids.numpy(), self.weights.numpy())
        self.addresses = tuple(x.data_ptr() for x in (self.logits, self.ids, self.weights))


def pack_token(
    x: torch.Tensor,
    positions: tuple[torch.Tensor, torch.Tensor],
    cache: tuple[torch.Tensor, torch.Tensor],
    position: int,
    h: torch.Tensor,
    normed: torch.Tensor,
    choice: Choice,
) -> bytes:
    """One token x [H]; positions: cosines and sines [rotary_dim]; cache: keys and values
    [num_kv_heads, room, head_dim] of which ``position`` are there. All contiguous."""
    cos, sin = positions
    keys, values = cache
    return _TOKEN.pack(
        x.data_ptr(),
        cos.data_ptr(),
        sin.data_ptr(),
        keys.data_ptr(),
        values.data_ptr(),
        keys.shape[-2],
        position,
        h.data_ptr(),
        normed.data_ptr(),
        *choice.addresses,
    )


def pack_sum(
    outs: torch.Tensor, weights: torch.Tensor, rounds: bool, h: torch.Tensor, out: torch.Tensor
) -> bytes:
    """out [H] = h + weights [K] float32 times outs [K, H]. rounds: each product is rounded."""
    size, top_k = outs.shape[-1], weights.numel()
    at = (outs.data_ptr(), weights.data_ptr(), h.data_ptr(), out.data_ptr())
    return _SUM.pack(*at, size, top_k, TYPES[outs.dtype], rounds)


def pack_tail(norm: Norm, head: Linear | None) -> bytes:
    """The last norm and the head, of one dtype but for a head that is packed; None: the norm
    alone. Raises ValueError for sizes that do not fit together: the compiled code trusts them."""
    size, bias = norm.weight.numel(), None if head is None else head.bias
    if head is not None:
        rows, cols = num_rows(head.weight), num_cols(head.weight)
        if cols != size or rows < 1 or (bias is not None and bias.numel() != rows):
            raise ValueError(f"got a norm of {size} numbers before a head of {rows} x {cols}")
    matrix = NO_MATRIX if head is None else describe(head.weight)
    rest = _TAIL.pack(0 if bias is None else bias.data_ptr(), TYPES[norm.weight.dtype], 0)
    return matrix + _pack_norm(norm) + rest


class TailCall(NamedTuple):
    """A packed tail about a token, and where its word on that goes; scores: in float32 too."""

    packed: bytes
    out: torch.Tensor
    scores: torch.Tensor | None


def tail_call(
    tail: bytes, x: torch.Tensor, out: torch.Tensor, scores: torch.Tensor | None = None
) -> TailCall:
    """x: [H] in all, contiguous as out is; it has to stay until the call. scores: of a head."""
    scores_at = 0 if scores is None else scores.data_ptr()
    return TailCall(_ENDS.pack(x.data_ptr(), out.data_ptr(), scores_at) + tail, out, scores)


def _pack_norm(norm: Norm | None) -> bytes:
    if norm is None:
        return _NORM.pack(0, 0.0, 0)
    return _NORM.pack(norm.weight.data_ptr(), norm.eps, norm.weight.numel())
