"""Experts in GPU memory: two launches for all of a layer's that few tokens chose, two for the rest.

What has no decoder here plain torch computes. T: tokens, H: hidden size, I: intermediate size,
J: jobs, P: places, one for each token of each job.
"""

from __future__ import annotations

from collections import defaultdict
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import triton.language as tl

from moe_infinity.kernels.base import ExpertKernel, ExpertMath, Job, Places, Views
from moe_infinity.kernels.gpu import tuning
from moe_infinity.kernels.gpu.indices import is_computed, of_jobs, of_one, room_for, rows_of
from moe_infinity.kernels.gpu.launches import Jobs, launch_inner, launch_product
from moe_infinity.kernels.gpu.layout import (
    DOWN,
    GATE,
    PLAIN,
    UP,
    Kind,
    Layout,
    Matrix,
    Row,
    kind_of,
    lay_out,
    lay_out_matrix,
)
from moe_infinity.kernels.gpu.tuning import Tuning, Way
from moe_infinity.kernels.packed import PackedMatrix
from moe_infinity.kernels.reference import Kernel as Reference
from moe_infinity.kernels.reference import plain

_BF16_CAPABILITY = (8, 0)  # from which on there are products in bf16


class _Linear(NamedTuple):
    """A dense layer that is ready; the tensors are kept alive."""

    weight: PackedMatrix | torch.Tensor
    bias: torch.Tensor | None
    matrix: Matrix
    table: torch.Tensor


class Kernel(ExpertKernel):
    """A result depends on its expert, its token and, from ``tuning.FEW`` tokens of that expert on,
    on how many there are: never on other jobs, on addresses or on how launches are cut."""

    name = "triton"

    def __init__(self, device: torch.device, tuned: Tuning | None = None) -> None:
        """device: where slots and tokens are; the CPU where Triton interprets."""
        self.device = device
        is_cuda = device.type == "cuda"
        gpu = torch.cuda.get_device_name(device) if is_cuda else "cpu"
        self.tuned = tuned or tuning.load(gpu)
        self._has_bf16 = is_cuda and torch.cuda.get_device_capability(device) >= _BF16_CAPABILITY
        self._reference = Reference()
        self._kinds: dict[int, tuple[ExpertMath, Kind]] = {}  # by id of the first
        self._linears: dict[tuple[int, int], _Linear] = {}  # by id of weight and bias

    def forward(self, math: ExpertMath, views: Views, x: torch.Tensor) -> torch.Tensor:
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
        self.run(math, [Job(views, x, out)])
        return out

    def run(self, math: ExpertMath, jobs: list[Job]) -> None:
        """In place where all results lie in one tensor, as those of decode do."""
        jobs = [job for job in jobs if len(job.x)]
        if not jobs:
            return
        x, token_of = rows_of([job.x.contiguous() for job in jobs])
        out, place_of = room_for([job.out for job in jobs])
        self.run_placed(math, [job.views for job in jobs], x, out, token_of, place_of)
        if out.untyped_storage().data_ptr() != jobs[0].out.untyped_storage().data_ptr():
            for job, places in zip(jobs, place_of, strict=True):
                job.out.copy_(out[places[0] : places[-1] + 1])

    def run_placed(
        self,
        math: ExpertMath,
        experts: list[Views],
        x: torch.Tensor,
        out: torch.Tensor,
        token_of: Places,
        place_of: Places,
    ) -> None:
        """Of each expert rows ``token_of`` of x [T, H] into rows ``place_of`` of out [N, H], both
        contiguous. Experts laid out alike go together, of few tokens and of many apart."""
        counts = [len(tokens) for tokens in token_of]
        most = max((count for count in counts if count <= tuning.FEW), default=1)
        launches: dict[tuple[Layout, Way], list[tuple[Row, int]]] = defaultdict(list)
        for at, (views, count) in enumerate(zip(experts, counts, strict=True)):
            found = self.lay_out(math, views)
            if found is None or x.dtype not in PLAIN or x.shape[1] != found[0].hidden:
                tokens = torch.from_numpy(token_of[at]).to(x.device)
                places = torch.from_numpy(place_of[at]).to(x.device).long()
                out[places] = self._plainly(math, views, x[tokens])
            elif count:
                way = self.tuned.way(max(count, most), found[0].up.is_tall)
                launches[found[0], way].append((found[1], at))
        for (layout, way), some in launches.items():
            rows, which = zip(*some, strict=True)
            tokens_of, places_of = ([each[at] for at in which] for each in (token_of, place_of))
            limit = way.tokens if way.is_many else tuning.FEW
            with _on(x):
                jobs = of_jobs(list(rows), tokens_of, places_of, limit, x.device)
                self.compute(math, layout, way, jobs, x, out)

    def compute(
        self,
        math: ExpertMath,
        layout: Layout,
        way: Way,
        jobs: Jobs,
        x: torch.Tensor,
        out: torch.Tensor,
    ) -> None:
        """Jobs that are on the device already: x [T, H] into rows ``place_of`` of out. Whatever is
        in the tensors of ``jobs``, the same launches: a graph can hold them."""
        num_jobs, dot = len(jobs.which), self._dot(x.dtype)
        if layout.activation:
            inner = launch_inner(jobs, num_jobs, way, dot, layout, x)
        else:
            inner = math.gate(self._gate_up(layout, way, jobs, x)).contiguous()
        down_way = self._down_way(layout, way)
        if math.post is None:
            launch_product(jobs, num_jobs, down_way, dot, layout.down, DOWN, inner, out)
            return
        own = torch.zeros_like(out)
        launch_product(jobs, num_jobs, down_way, dot, layout.down, DOWN, inner, own)
        torch.where(is_computed(jobs, len(out))[:, None], math.post(own), out, out=out)

    def linear(
        self,
        weight: PackedMatrix | torch.Tensor,
        x: torch.Tensor,
        bias: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """x [..., cols] by a matrix [rows, cols], plus bias [rows] -> [..., rows]. The weight is
        kept until ``close``."""
        ready = self._linears.get((id(weight), id(bias))) or self._ready(weight, bias)
        if ready is None or x.dtype not in PLAIN:
            whole = self._on_device(weight, False).to(x.dtype)
            return torch.nn.functional.linear(x, whole, bias)
        flat = x.reshape(-1, ready.matrix.cols).contiguous()
        out = flat.new_empty((len(flat), ready.matrix.rows))
        if len(flat):
            way = self.tuned.way(len(flat), ready.matrix.is_tall)
            jobs = of_one(ready.table, len(flat), way.tokens if way.is_many else len(flat))
            with _on(x):
                dot, here = self._dot(x.dtype), (0, 1)
                launch_product(jobs, len(jobs.which), way, dot, ready.matrix, UP, flat, out, here)
        return out.reshape(*x.shape[:-1], ready.matrix.rows)

    def close(self) -> None:
        self._linears.clear()

    def _gate_up(self, layout: Layout, way: Way, jobs: Jobs, x: torch.Tensor) -> torch.Tensor:
        """[P, 2I] as the model's own gate wants it; [P, I] where there is no gate."""
        num_jobs, dot, inner = len(jobs.which), self._dot(x.dtype), layout.inner
        num_places = len(jobs.token_of)
        if layout.gate is None:
            out = x.new_zeros((num_places, inner))
            launch_product(jobs, num_jobs, way, dot, layout.up, UP, x, out, (0, 1))
            return out
        out = x.new_zeros((num_places, 2 * inner))
        second, every = (1, 2) if layout.is_interleaved else (inner, 1)
        launch_product(jobs, num_jobs, way, dot, layout.gate, GATE, x, out, (0, every))
        launch_product(jobs, num_jobs, way, dot, layout.up, UP, x, out, (second, every))
        return out

    def _down_way(self, layout: Layout, way: Way) -> Way:
        if way.is_many or layout.down.is_tall == layout.up.is_tall:
            return way
        return self.tuned.way(way.tokens, layout.down.is_tall)

    def _dot(self, dtype: torch.dtype) -> tl.dtype:
        """Older GPUs, and the interpreter, have no products in bf16; those in float32 are exact."""
        if dtype == torch.float32 or not self._has_bf16:
            return tl.float16 if dtype == torch.float16 and self._is_cuda else tl.float32
        return tl.bfloat16 if dtype == torch.bfloat16 else tl.float16

    @property
    def _is_cuda(self) -> bool:
        return self.device.type == "cuda"

    def lay_out(self, math: ExpertMath, views: Views) -> tuple[Layout, Row] | None:
        """How an expert lies in its slot, and its row of a table; None: plain torch computes it."""
        kind, kept = self._kind_of(math), views.prepared
        if kept is None or kept[0] is not kind:
            kept = views.prepared = (kind, lay_out(kind, views))
        found: tuple[Layout, Row] | None = kept[1]
        return found

    def _plainly(self, math: ExpertMath, views: Views, x: torch.Tensor) -> torch.Tensor:
        blocks: dict[str, Any] = {
            name: [
                self._on_device(block, math.is_transposed and not name.endswith("_bias"))
                for block in part
            ]
            for name, part in views.items()
        }
        return self._reference.forward(math, Views(blocks), x)

    def _on_device(self, block: PackedMatrix | torch.Tensor, is_turned: bool) -> torch.Tensor:
        """A block as a plain tensor. Codes are decoded on the CPU: slow, and seldom, for every
        format of today has a decoder here."""
        if not isinstance(block, PackedMatrix):
            return block
        whole = plain(block)
        return whole.T if is_turned else whole

    def _ready(
        self, weight: PackedMatrix | torch.Tensor, bias: torch.Tensor | None
    ) -> _Linear | None:
        found = lay_out_matrix(weight, bias)
        if found is None:
            return None
        matrix, row = found
        table = torch.tensor([row], dtype=torch.int64, device=self.device)
        ready = _Linear(weight, bias, matrix, table)
        self._linears[id(weight), id(bias)] = ready
        return ready

    def _kind_of(self, math: ExpertMath) -> Kind:
        found = self._kinds.get(id(math))
        if found is None:
            found = self._kinds[id(math)] = (math, kind_of(math))
        return found[1]


def _on(x: torch.Tensor) -> AbstractContextManager[object]:
    """Launches go to the current GPU, which need not be that of the tokens."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()
