"""Experts on devices beside the model's own: tokens go there once an event, results come back.

T: tokens, K: top-k, H: hidden size.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch

from moe_infinity.cache.base import Compute
from moe_infinity.devices.base import Device
from moe_infinity.devices.choice import computing_on
from moe_infinity.kernels.base import ExpertKernel, ExpertMath, Rows, Views
from moe_infinity.types import ExpertKey


class Elsewhere(NamedTuple):
    """devices: the model's own, then the others; kernels: of each other."""

    devices: Sequence[Device]
    kernels: Sequence[ExpertKernel]


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
        math: ExpertMath,
        x: torch.Tensor,
        out: torch.Tensor,
        places: Mapping[int, Rows],
    ) -> None:
        """x [T, H]; out [T * K, H], and by expert the rows of it that are its own."""
        self._home = elsewhere.devices[0]
        self._out, self._places = out, places
        others = zip(elsewhere.devices[1:], elsewhere.kernels, strict=True)
        self._visits = [
            _Visit(number, device, kernel, math, (x, self._home), out)
            for number, (device, kernel) in enumerate(others, start=1)
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
            if visit.rows:
                rows = np.concatenate(visit.rows)
                results = self._home.bring(visit.results(rows), visit.device)
                self._out[_placed(rows, self._out.device)] = results


class _Visit:
    """Of an event to one other device. rows: of out that were computed there."""

    def __init__(
        self,
        number: int,
        device: Device,
        kernel: ExpertKernel,
        math: ExpertMath,
        origin: tuple[torch.Tensor, Device],
        out: torch.Tensor,
    ) -> None:
        """origin: x [T, H] and where it lies; out: [T * K, H] where results go in the end."""
        self.number = number
        self.device = device
        self.rows: list[Rows] = []
        self._kernel, self._math = kernel, math
        self._origin, self._out_at_home = origin, out
        self._there: tuple[torch.Tensor, torch.Tensor] | None = None

    def run(self, views: list[Views], where: list[Rows]) -> None:
        with self._working():
            if self._there is None:
                out = torch.empty_like(self._out_at_home, device=self.device.torch_device)
                self._there = (self.device.bring(*self._origin), out)
            x, out = self._there
            top_k = len(out) // len(x)
            tokens = [rows // top_k for rows in where]
            self._kernel.run_placed(self._math, views, x, out, tokens, where)
        self.rows += where

    def results(self, rows: Rows) -> torch.Tensor:
        """These rows, still there."""
        assert self._there is not None, "nothing was computed there"
        with self._working():
            return self._there[1][_placed(rows, self.device.torch_device)]

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
