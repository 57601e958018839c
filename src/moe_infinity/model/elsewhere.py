"""Experts on devices beside the model's own: tokens go there once an event, results come back.

T: tokens, K: top-k, H: hidden size.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from moe_infinity.cache.base import Compute
from moe_infinity.devices.base import Device
from moe_infinity.devices.choice import computing_on
from moe_infinity.kernels.base import ExpertKernel, ExpertMath, Rows, Views
from moe_infinity.types import ExpertKey

_FEW_ROWS = 256  # results are copied back so many at once, or as many as there are tokens
_NONE = np.empty(0, dtype=np.int64)


class Other(NamedTuple):
    """A device beside the model's own; maths: of each MoE layer, with what they need of memory
    there."""

    device: Device
    kernel: ExpertKernel
    maths: Sequence[ExpertMath]


class Elsewhere(NamedTuple):
    """home: the model's own device."""

    home: Device
    others: Sequence[Other]


def maths_on(device: torch.device, maths: Sequence[ExpertMath]) -> list[ExpertMath]:
    """The same computations, for tensors on another device: a model's own norm after its experts
    has weights."""
    return [
        replace(math, post=copy.deepcopy(math.post).to(device))
        if isinstance(math.post, nn.Module)
        else math
        for math in maths
    ]


class FullElsewhereError(torch.OutOfMemoryError):
    """device: the number of the one that has no memory left."""

    def __init__(self, message: str, device: int) -> None:
        super().__init__(message)
        self.device = device


class Trip:
    """One event's computation, in which experts of other devices are computed where they lie.

    All devices work at once: nothing is waited for before ``bring_back``, which puts each result
    into the place where the model's own device would have put it.
    """

    def __init__(
        self,
        elsewhere: Elsewhere,
        layer: int,
        x: torch.Tensor,
        out: torch.Tensor,
        places: Mapping[int, Rows],
    ) -> None:
        """x [T, H]; out [T * K, H], and by expert the rows of it that are its own. Tokens go now,
        before the others' computation waits for experts: the copy would wait with it."""
        self._home = elsewhere.home
        self._out, self._places = out, places
        self._visits = [
            _Visit(number, other, layer, (x, self._home), out)
            for number, other in enumerate(elsewhere.others, start=1)
        ]

    def around(self, compute: Compute) -> Compute:
        """What brings experts of the model's own device, and of RAM, to ``compute``, and the others
        to where they are computed: these first, for that device works on its own."""

        def divided(keys: list[ExpertKey], views: list[Views]) -> float | None:
            pairs = list(zip(keys, views, strict=True))
            for visit in self._visits:
                there = [pair for pair in pairs if pair[1].device == visit.number]
                if there:
                    visit.run([v for _, v in there], [self._places[k.expert] for k, _ in there])
            here = [pair for pair in pairs if pair[1].device == 0]
            return compute([k for k, _ in here], [v for _, v in here]) if here else None

        return divided

    def bring_back(self) -> None:
        """The event is computed: all results to their places."""
        for visit in self._visits:
            rows = np.concatenate(visit.rows or [_NONE])
            most = max(visit.num_tokens, _FEW_ROWS)
            for first in range(0, len(rows), most):
                some = rows[first : first + most]
                results = self._home.bring(visit.results(some), visit.device)
                self._out[_placed(some, self._out.device)] = results


class _Visit:
    """Of an event to one other device. rows: of out that were computed there."""

    def __init__(
        self,
        number: int,
        other: Other,
        layer: int,
        origin: tuple[torch.Tensor, Device],
        out: torch.Tensor,
    ) -> None:
        """origin: x [T, H] and where it lies; out: [T * K, H] where results go in the end."""
        self.number = number
        self.device = other.device
        self.rows: list[Rows] = []
        self._kernel, self._math = other.kernel, other.maths[layer]
        with self._working():
            self._x = self.device.bring(*origin)
            self._out = torch.empty_like(out, device=self.device.torch_device)

    @property
    def num_tokens(self) -> int:
        return len(self._x)

    def run(self, views: list[Views], where: list[Rows]) -> None:
        top_k = len(self._out) // self.num_tokens
        tokens = [rows // top_k for rows in where]
        with self._working():
            self._kernel.run_placed(self._math, views, self._x, self._out, tokens, where)
        self.rows += where

    def results(self, rows: Rows) -> torch.Tensor:
        """These rows, still there."""
        with self._working():
            return self._out[_placed(rows, self.device.torch_device)]

    @contextlib.contextmanager
    def _working(self) -> Iterator[None]:
        """Launches go to that device, and what it lacks is said to be its own."""
        try:
            with computing_on(self.device):
                yield
        except torch.OutOfMemoryError as error:
            raise FullElsewhereError(str(error), self.number) from error


def _placed(rows: Rows, device: torch.device) -> torch.Tensor:
    """Numbers on a device, for which the host does not wait."""
    held = torch.from_numpy(rows)
    return held.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else held
