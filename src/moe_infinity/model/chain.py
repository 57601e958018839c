"""Compiled blocks that follow one another, run ahead of the model's own calls.

Between two blocks Python takes 0.2 ms, for the weights that stream by push what it needs out of the
processor's caches. So the first block that is called lets the compiled code go on into the next
ones, as far as the experts that their routers choose are in memory; what it found waits for the
model to call those blocks. A result is used only if that call is the one that was foreseen: the
very tensor, unchanged to the bit, at the same place of the same cache. Nothing is told to anybody
(cache, policy, trace) before; the cache is told of all of them at once then. Who changes the
numbers of a later block's weights or keys in the middle of a pass is heard from the next pass on.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum
from operator import is_
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from moe_infinity.cache.base import Hierarchy
from moe_infinity.kernels.blocks import Choice
from moe_infinity.kernels.native import Kernel
from moe_infinity.kernels.stages import Stages
from moe_infinity.model.kv_cache import one_row_layer
from moe_infinity.tracing.event import Event


class Member(NamedTuple):
    """A block of the chain. layer: of its experts; cache_layer: of its keys and values; block:
    packed; results: where h [1, H], normed [1, H] and its experts' outputs [K, H] go."""

    layer: int
    cache_layer: int
    num_experts: int
    block: bytes
    choice: Choice
    results: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
    rounds: bool


class Reached(Enum):
    """How far the compiled code has come with a block that is called."""

    NOTHING = 0
    CHOICE = 1  # its experts are chosen
    WHOLE = 2


class _Run(NamedTuple):
    """What was found ahead, from block ``first`` on. whole: how many were run whole; inputs: of
    each block, and the last one's output; bits: of the outputs [n, H], now and as they were;
    places: each one's keys, values and position."""

    first: int
    whole: int
    inputs: list[torch.Tensor]
    bits: tuple[NDArray[np.int16], NDArray[np.int16]]
    places: list[tuple[torch.Tensor, torch.Tensor, int]]
    setting: _Setting


class _Setting(NamedTuple):
    """What blocks have in common that are called for the same token."""

    cache: Any
    cos: torch.Tensor
    sin: torch.Tensor

    @classmethod
    def of(cls, kwargs: dict[str, Any]) -> _Setting:
        return cls(kwargs["past_key_values"], *kwargs["position_embeddings"])

    def is_that_of(self, kwargs: dict[str, Any]) -> bool:
        return all(map(is_, self, _Setting.of(kwargs)))


class Chain:
    """The compiled blocks of a model that have routers, in their order."""

    def __init__(
        self,
        kernel: Kernel,
        members: Sequence[Member],
        hierarchy: Hierarchy,
        known: NDArray[np.uint8],
    ) -> None:
        """known: the hierarchy's, [L, E]."""
        self._kernel = kernel
        self._members = members
        self._hierarchy = hierarchy
        self._known = known
        self._stages = Stages(len(members), known.shape[1])
        for place, each in enumerate(members):
            of_layer = known[each.layer, : each.num_experts]
            self._stages.describe(
                place, each.block, each.choice, each.results, each.rounds, of_layer
            )
        self._follows = [False] * (len(members) + 1)  # the one before, as was seen
        self._changed: set[int] = set()  # somebody changes their input in its place
        self._length = 1  # blocks to run at once: as many as lately went well, and some more
        # Who was called last, what it returned, and how it was called.
        self._last: tuple[int, torch.Tensor, _Setting] | None = None
        self._run: _Run | None = None
        self._untold: list[Event] = []  # of blocks of this run that the model has called
        self._untold_s: list[float] = []

    def note(self, place: int, expert: int, call: bytes) -> None:
        """How to compute an expert, true until its place in memory is given to another."""
        self._stages.note(place, expert, call)
        self._known[self._members[place].layer, expert] = 1

    def is_noted(self, place: int, expert: int) -> bool:
        return bool(self._known[self._members[place].layer, expert])

    def reach(self, place: int, x: torch.Tensor, kwargs: dict[str, Any]) -> Reached:
        """How far block ``place``, called with x [1, 1, H] and kwargs, has been run; now, if not
        before."""
        run, self._run = self._run, None
        if run is not None and self._is_foreseen(run, place, x, kwargs):
            self._run = run
            return Reached.WHOLE if place < run.first + run.whole else Reached.CHOICE
        self._tell()
        self._learn(place, x, kwargs)
        if not self._follows[place + 1] or not self._hierarchy.is_quiet():
            return Reached.NOTHING
        return self._run_ahead(place, x, kwargs)

    def output(self, place: int) -> torch.Tensor:
        """Of a block that was run whole, [1, 1, H]."""
        assert self._run is not None, "nothing was run ahead"
        return self._run.inputs[place - self._run.first + 1]

    def experts_s(self, place: int) -> float:
        """Seconds that the experts of a block that was run whole took."""
        return self._stages.experts_s(place)

    def tell_later(self, place: int, event: Event) -> None:
        """The model has called a block that was run whole: with the last such, all are told of."""
        assert self._run is not None, "nothing was run ahead"
        self._untold.append(event)
        self._untold_s.append(self.experts_s(place))
        if place == self._run.first + self._run.whole - 1:
            self._tell()

    def _tell(self) -> None:
        if self._untold:
            events, spent_s = self._untold, self._untold_s
            self._untold, self._untold_s = [], []
            self._hierarchy.run_hits(events, spent_s)

    def returned(self, place: int, out: torch.Tensor, kwargs: dict[str, Any]) -> None:
        """Block ``place``, called with kwargs, gives ``out`` to the model."""
        self._last = (place, out, _Setting.of(kwargs))
        if place == len(self._members) - 1:
            self.forget()

    def left(self, place: int) -> None:
        """Block ``place`` was called in a way that the compiled code does not know."""
        self._follows[place] = False
        self._tell()
        self.forget()

    def forget(self) -> None:
        """Hold on to nothing that somebody else made: a cache is large. What is untold then was
        cut off by an error."""
        self._run = self._last = None
        self._untold.clear()
        self._untold_s.clear()

    def _learn(self, place: int, x: torch.Tensor, kwargs: dict[str, Any]) -> None:
        """Whether this block is shown what the one before has returned."""
        last, self._last = self._last, None
        self._follows[place] = (
            place not in self._changed
            and last is not None
            and last[0] == place - 1
            and last[1] is x
            and last[2].is_that_of(kwargs)
        )

    def _is_foreseen(self, run: _Run, place: int, x: torch.Tensor, kwargs: dict[str, Any]) -> bool:
        at = place - run.first
        if not 0 < at < len(run.places) or at > run.whole or x is not run.inputs[at]:
            return False
        is_now, was = run.bits
        if (is_now[at - 1] != was[at - 1]).any():
            self._changed.add(place)
            return False
        if not run.setting.is_that_of(kwargs):
            return False
        now = run.setting.cache.layers[self._members[place].cache_layer].next_place()
        keys, values, position = run.places[at]
        return now is not None and now[0] is keys and now[1] is values and now[2] == position

    def _run_ahead(self, first: int, x: torch.Tensor, kwargs: dict[str, Any]) -> Reached:
        setting = _Setting.of(kwargs)
        places: list[tuple[torch.Tensor, torch.Tensor, int]] = []
        while len(places) < self._length:
            place = first + len(places)
            if places and not self._follows[place]:
                break
            member = self._members[place]
            layer = one_row_layer(setting.cache, member.cache_layer, member.results[0].dtype)
            found = None if layer is None else layer.next_place()
            if found is None:
                break
            places.append(found)
            self._stages.remember(place, *found)
        if not places:
            return Reached.NOTHING
        outs = torch.empty((len(places), *x.shape), dtype=x.dtype)
        positions = (setting.cos, setting.sin)
        whole = self._stages.run(self._kernel, first, x.contiguous(), positions, outs)
        self._length = 2 * self._length if whole == self._length else whole + 1
        bits = outs[:whole].view(torch.int16).flatten(1).numpy()
        self._run = _Run(first, whole, [x, *outs.unbind()], (bits, bits.copy()), places, setting)
        return Reached.WHOLE if whole else Reached.CHOICE
