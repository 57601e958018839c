"""The contract of an expert kernel: one expert's MLP over the tokens routed to it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from moe_infinity.kernels.packed import PackedMatrix


class Views(dict[str, list[torch.Tensor | PackedMatrix]]):
    """An expert's parts by name, each a list of blocks that lie in its slot.

    prepared: what a kernel made of them, kept while they are. on_host: they lie in RAM, while the
    model computes on a device. device: the number of the one they lie on; the model's own is 0.
    """

    prepared: Any = None
    on_host: bool = False
    device: int = 0


@dataclass(frozen=True)
class ExpertMath:
    """How the experts of one layer compute, taken from the model's own module.

    T: tokens, H: hidden, I: intermediate. gate: [T, 2I] -> [T, I] where has_gate, else the
    activation [T, I] -> [T, I]. post: applied to the [T, H] result, if the model has it.
    is_transposed: the model's weights are [in, out], not [out, in]; coded ones never are.
    is_interleaved: rows of gate and up take turns; where they come in two blocks, they are apart.
    """

    has_gate: bool
    has_bias: bool
    is_transposed: bool
    gate: Callable[[torch.Tensor], torch.Tensor]
    post: Callable[[torch.Tensor], torch.Tensor] | None = None
    is_interleaved: bool = False


class Job(NamedTuple):
    """One expert's tokens x [T, H] and where its results go: out, of the same shape, contiguous."""

    views: Views
    x: torch.Tensor
    out: torch.Tensor


Rows = NDArray[np.integer[Any]]
Places = Sequence[Rows]  # of each expert, rows of a tensor


class ExpertKernel(ABC):
    """Computes experts straight from their slots' bytes."""

    name: str  # for reports
    dense_s: float = 0.0  # spent beside experts so far, in dense products and attention

    @abstractmethod
    def forward(self, math: ExpertMath, views: Views, x: torch.Tensor) -> torch.Tensor:
        """[T, H] of x's dtype -> [T, H]; weights stored in another dtype are converted to x's."""

    def run(self, math: ExpertMath, jobs: list[Job]) -> None:
        """Several experts of one layer, each into its own place."""
        for job in jobs:
            job.out.copy_(self.forward(math, job.views, job.x))

    def run_placed(
        self,
        math: ExpertMath,
        experts: list[Views],
        x: torch.Tensor,
        out: torch.Tensor,
        token_of: Places,
        place_of: Places,
    ) -> None:
        """Of each expert rows ``token_of`` of x [T, H] into rows ``place_of`` of out [N, H]."""
        if all(len(places) == 1 for places in place_of):  # straight to where results go
            singles = zip(experts, token_of, place_of, strict=True)
            self.run(math, [_single(views, x, out, *row) for views, *row in singles])
            return
        some = x[_index(token_of, x)]
        results = torch.empty_like(some)
        sizes = [len(tokens) for tokens in token_of]
        parts = zip(
            experts, some.split_with_sizes(sizes), results.split_with_sizes(sizes), strict=True
        )
        self.run(math, [Job(*part) for part in parts])
        out[_index(place_of, out)] = results

    def close(self) -> None:
        """Let go of threads; idempotent."""


def _single(views: Views, x: torch.Tensor, out: torch.Tensor, tokens: Rows, places: Rows) -> Job:
    token, at = int(tokens[0]), int(places[0])
    return Job(views, x[token : token + 1], out[at : at + 1])


def _index(rows: Places, like: torch.Tensor) -> torch.Tensor:
    together = rows[0] if len(rows) == 1 else np.concatenate(rows)
    return torch.from_numpy(together).to(like.device)
