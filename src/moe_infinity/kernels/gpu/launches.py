"""Starts the two steps of experts (steps.py) on what is on the device already."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from moe_infinity.kernels.gpu.layout import Layout, Matrix
from moe_infinity.kernels.gpu.steps import inner_step, product_step
from moe_infinity.kernels.gpu.tuning import Way


class Jobs(NamedTuple):
    """int32 on the device: which [J] rows of ``table`` [N, NUM_FIELDS] int64, starts [J + 1] of
    their places, token_of [P] rows of x, place_of [P] rows of the result."""

    table: torch.Tensor
    which: torch.Tensor
    starts: torch.Tensor
    token_of: torch.Tensor
    place_of: torch.Tensor


def launch_inner(
    jobs: Jobs, num_jobs: int, way: Way, dot: tl.dtype, layout: Layout, x: torch.Tensor
) -> torch.Tensor:
    """x [T, H] -> [P, I]: gate, up and activation of every place. dot: the type to multiply in."""
    inner = x.new_empty((len(jobs.token_of), layout.inner))
    inner_step[(triton.cdiv(layout.inner, way.rows), num_jobs)](
        jobs.table,
        jobs.which,
        jobs.starts,
        jobs.token_of,
        x,
        inner,
        GATE=layout.gate,
        UP=layout.up,
        ACTIVATION=layout.activation,
        DOT=dot if way.is_many else None,
        T=way.tokens,
        R=way.rows,
        W=way.columns,
        num_warps=way.num_warps,
        num_stages=way.num_stages,
    )
    return inner


def launch_product(
    jobs: Jobs,
    num_jobs: int,
    way: Way,
    dot: tl.dtype,
    matrix: Matrix,
    field: int,
    x: torch.Tensor,
    out: torch.Tensor,
    columns: tuple[int, int] | None = None,
) -> None:
    """A matrix that a table has from ``field`` on. x [P, cols] into rows ``place_of`` of out; with
    ``columns`` x [T, cols] by ``token_of`` into [P, ...], from the first of them on, one of every.
    """
    first, every = columns or (0, 1)
    product_step[(triton.cdiv(matrix.rows, way.rows), num_jobs)](
        jobs.table,
        jobs.which,
        jobs.starts,
        jobs.token_of,
        jobs.place_of,
        x,
        out,
        out.shape[1],
        first,
        MATRIX=matrix,
        FIELD=field,
        EVERY=every,
        IS_PLACED=columns is None,
        DOT=dot if way.is_many else None,
        T=way.tokens,
        R=way.rows,
        W=way.columns,
        num_warps=way.num_warps,
        num_stages=way.num_stages,
    )
