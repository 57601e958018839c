"""The compiled kernels: whole experts and dense products over a few threads of their own.

What they cannot do (transposed weights, mixed types) the reference does. T: tokens, H:
hidden size, I: intermediate size.
"""

from __future__ import annotations

import struct
import sys
import time
from types import ModuleType
from typing import Any

import torch

from moe_infinity.errors import ConfigError
from moe_infinity.kernels.activations import recognise
from moe_infinity.kernels.base import ExpertKernel, ExpertMath, Job, Views
from moe_infinity.kernels.blocks import TailCall
from moe_infinity.kernels.described import (
    TYPES,
    Blocks,
    Kind,
    Prepared,
    describe,
    num_rows,
    prepare,
)
from moe_infinity.kernels.reference import Kernel as Reference

try:
    from moe_infinity.kernels import _native  # type: ignore[attr-defined]
except ImportError:
    _native = None  # installed without a compiler
native: ModuleType | None = _native

_HEAD = struct.Struct("<QQI")  # of a call: x, out, num_tokens
_LATENT = struct.Struct("<5Qf7I")
# In float32 the order of a sum shows: there stock's own results are kept, to its own spread.
SHORT_TYPES = (torch.bfloat16, torch.float16)
# Beyond, torch's own products are the faster ones; but not of experts in bf16 with instructions for
# it, and of nothing in 16 bits where there is AVX2 alone (10 GFLOP/s against 80).
MOST_TOKENS = 32


class Kernel(ExpertKernel):
    """Experts by compiled code. What it computes does not depend on threads or addresses, nor on
    the number of tokens but for this: many are summed in another order than few; and formats with a
    K multiply few tokens in 8 bits, many by weights rounded to bf16 (architecture.md). Where torch
    computes in its place, more may matter."""

    def __init__(self, num_threads: int, instruction_set: str | None = None) -> None:
        """Raises ConfigError where there is no compiled code, or not for this processor."""
        if native is None:
            raise ConfigError(
                "kernel: got native, but this installation has no compiled kernels, expected a C++ "
                "compiler when it was installed; install again with one, or use kernel=torch"
            )
        known = native.instruction_sets()
        if instruction_set is not None and instruction_set not in known:
            raise ConfigError(
                f"instruction set: got {instruction_set!r}, expected one this processor has: "
                f"{', '.join(known)}"
            )
        self.instruction_set = instruction_set or known[-1]
        self.name = f"native ({self.instruction_set})"
        # Of a 16-bit linear layer, that are multiplied here.
        self.most_linear_tokens = sys.maxsize if self.instruction_set == "avx2" else MOST_TOKENS
        self._engine: Any = native.open(num_threads, self.instruction_set)
        self._reference = Reference()
        self._kinds: dict[int, tuple[ExpertMath, Kind]] = {}  # by id of the first
        self._begun: list[TailCall] = []  # whose memory other threads may write to

    def forward(self, math: ExpertMath, views: Views, x: torch.Tensor) -> torch.Tensor:
        expert = self._expert(math, views, x)
        if expert is None:
            return self._reference.forward(math, views, x)
        x = x.contiguous()
        if expert.call is None:
            out = self._apart(math, views, x)
        else:
            out = torch.empty_like(x)
            head = _HEAD.pack(x.data_ptr(), out.data_ptr(), x.shape[0])
            self._run([head + expert.call])
        return math.post(out) if math.post else out

    def run(self, math: ExpertMath, jobs: list[Job]) -> None:
        """Those that the compiled code knows whole go to it together."""
        calls = []
        for job in jobs:
            call = self._call_of(math, job.views, job.x)
            if call is None:
                job.out.copy_(self.forward(math, job.views, job.x))
            else:
                calls.append(_HEAD.pack(job.x.data_ptr(), job.out.data_ptr(), len(job.x)) + call)
        if calls:
            self._run(calls)

    def linear(
        self, weight: bytes, rows: int, x: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        """x [T, cols] contiguous by a matrix that ``describe`` described, plus bias [rows] of x's
        dtype -> [T, rows]."""
        assert native is not None
        out = x.new_empty((len(x), rows))
        at, added = x.data_ptr(), 0 if bias is None else bias.data_ptr()
        start = time.perf_counter()
        native.product(self._engine, weight, at, len(x), TYPES[x.dtype], out.data_ptr(), added)
        self.dense_s += time.perf_counter() - start
        return out

    def run_token(
        self,
        math: ExpertMath,
        views: list[Views],
        x: torch.Tensor,
        outs: torch.Tensor,
        places: list[int],
    ) -> None:
        """Several experts on one token x [1, H], each into its own row of outs [K, H]."""
        calls = []
        x_at, outs_at, size = x.data_ptr(), outs.data_ptr(), outs.shape[1] * outs.element_size()
        for each, place in zip(views, places, strict=True):
            call = self._call_of(math, each, x)
            if call is None:
                outs[place] = self.forward(math, each, x)[0]
            else:
                calls.append(_HEAD.pack(x_at, outs_at + place * size, 1) + call)
        if calls:
            self._run(calls)

    def attend(self, block: bytes, token: bytes) -> None:
        """One token through what a packed block does before its experts (kernels/blocks.py)."""
        assert native is not None
        start = time.perf_counter()
        native.attend(self._engine, block, token)
        self.dense_s += time.perf_counter() - start

    def attend_latents(
        self,
        query: torch.Tensor,
        weight: torch.Tensor,
        latents: torch.Tensor,
        rotary: torch.Tensor,
        scaling: float,
    ) -> torch.Tensor:
        """Multi-head latent attention of one token in its absorbed form (arXiv 2405.04434).

        query [heads, plain + R], weight [heads, plain + V, rank] of keys and then values, latents
        [length, rank], rotary [length, R]; contiguous, of one dtype -> [heads, V].
        """
        assert native is not None
        (heads, size), (length, rank), num_rotary = query.shape, latents.shape, rotary.shape[1]
        plain = size - num_rotary
        sizes = (heads, plain, num_rotary, weight.shape[1] - plain, rank, length)
        tensors = (query, weight, latents, rotary)
        same = all(x.is_contiguous() and x.dtype is query.dtype for x in tensors)
        if (
            not same
            or weight.shape[::2] != (heads, rank)
            or len(rotary) != length
            or min(sizes) < 1
        ):
            raise ValueError(
                f"got {[list(x.shape) for x in tensors]}, expected them to fit together"
            )
        out = query.new_empty((heads, sizes[3]))
        at = (each.data_ptr() for each in (*tensors, out))
        start = time.perf_counter()
        packed = _LATENT.pack(*at, scaling, *sizes, TYPES[query.dtype])
        native.attend_latents(self._engine, packed)
        self.dense_s += time.perf_counter() - start
        return out

    def sum(self, packed: bytes) -> None:
        """What a packed sum says (kernels/blocks.py)."""
        assert native is not None
        native.sum(self._engine, packed)

    def finish(self, tail: TailCall) -> None:
        """What a packed tail says of a token, into its ``out``."""
        assert native is not None
        start = time.perf_counter()
        native.finish(self._engine, tail.packed)
        self.dense_s += time.perf_counter() - start

    def settle(self) -> float:
        """What ``run_ahead`` has begun is done. Returns the seconds that its experts took, from
        their beginning to their end, whoever computed them."""
        assert native is not None
        experts_s, dense_s = native.settle(self._engine)
        self._begun.clear()
        self.dense_s += dense_s
        return float(experts_s)

    def call_on_token(self, math: ExpertMath, views: Views, x: torch.Tensor) -> bytes | None:
        """An expert on one token like x [1, H], where from and to left open; None where it is not
        the compiled code that computes all of it."""
        call = self._call_of(math, views, x)
        return None if call is None else _HEAD.pack(0, 0, 1) + call

    def run_ahead(self, stages_at: int, count: int, tail: TailCall | None) -> int:
        """Stages (kernels/stages.py) at an address; returns how many were run whole. Experts of the
        one behind them may be begun; with a tail, which follows, the last one's are: ``settle``
        helps with them and does the rest. Until then their slots and all memory of the stages have
        to stay, and the tail's does, whatever interrupts the caller."""
        assert native is not None
        if tail is not None:
            self._begun.append(tail)
        packed = None if tail is None else tail.packed
        done: int = native.run_ahead(self._engine, stages_at, count, packed)
        return done

    def close(self) -> None:
        self._engine = None  # its threads end with it

    def _call_of(self, math: ExpertMath, views: Views, x: torch.Tensor) -> bytes | None:
        """What follows a call's addresses and number of tokens."""
        expert = self._expert(math, views, x)
        return None if expert is None or math.post else expert.call

    def _expert(self, math: ExpertMath, views: Views, x: torch.Tensor) -> Prepared | None:
        """The expert for the compiled code; None where the reference computes these tokens."""
        kept, kind = views.prepared, self._kind_of(math)
        if kept is None or kept[0] != kind or kept[1] is not x.dtype:
            kept = views.prepared = (kind, x.dtype, prepare(kind, views, x.dtype))
        expert: Prepared | None = kept[2]
        return expert if expert is not None and self._takes(expert, x) else None

    def _takes(self, expert: Prepared, x: torch.Tensor) -> bool:
        """Whether these tokens are computed here. Not by how the weights are stored, unless torch
        has no such products: exact12 and bf16 must go the same way. In float32 the order of a sum
        shows, and stock's own is kept."""
        num_tokens, cols = x.shape
        if expert.cols != cols or not num_tokens:
            return False
        if expert.is_grouped:
            return True
        is_quick = x.dtype == torch.bfloat16 and self.instruction_set == "avx512_bf16"
        is_quick = is_quick or num_tokens <= self.most_linear_tokens
        return x.dtype != torch.float32 and is_quick

    def _run(self, calls: list[bytes]) -> None:
        assert native is not None
        native.run(self._engine, b"".join(calls))

    def _apart(self, math: ExpertMath, views: Views, x: torch.Tensor) -> torch.Tensor:
        """The model's own gate between two products."""
        first = "gate_up_proj" if math.has_gate else "up_proj"
        inner = math.gate(self._products(views[first], x))
        return self._products(views["down_proj"], inner.contiguous())

    def _products(self, blocks: Blocks, x: torch.Tensor) -> torch.Tensor:
        found = [self.linear(describe(block), num_rows(block), x) for block in blocks]
        return found[0] if len(found) == 1 else torch.cat(found, dim=-1)

    def _kind_of(self, math: ExpertMath) -> Kind:
        found = self._kinds.get(id(math))
        if found is None:
            kind = Kind(
                math.has_gate,
                math.has_bias,
                math.is_transposed,
                math.is_interleaved,
                recognise(math),
            )
            found = self._kinds[id(math)] = (math, kind)
        return found[1]
