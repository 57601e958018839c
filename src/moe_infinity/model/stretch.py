"""Compiled blocks that follow one another, run in one call.

Between two blocks Python takes 0.1 ms, for the weights that stream by push what it needs out of
the processor's caches. So the compiled code goes on from block to block as far as the experts that
their routers choose are in memory. Where one is missing, that block's experts are asked as ever,
and it goes on behind them.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from moe_infinity.cache.base import Hierarchy
from moe_infinity.kernels.blocks import TailCall
from moe_infinity.kernels.native import Kernel
from moe_infinity.kernels.stages import FURTHEST, Stages
from moe_infinity.model.beginning import Beginning
from moe_infinity.model.blocks import CompiledBlock
from moe_infinity.model.kv_cache import preallocated_layer
from moe_infinity.model.routers import as_recorded
from moe_infinity.model.tail import Tail

_Memory = tuple[torch.Tensor, torch.Tensor]  # of all keys and all values of a layer


class Place(NamedTuple):
    """Of one token in the keys and values that each block of a stretch has."""

    memory: list[_Memory]
    position: int


class Stretch:
    """Blocks of the usual kind, in the order in which the model calls them.

    One after the other, or all at once: the same numbers, and the same events in the same order.
    """

    def __init__(
        self,
        kernel: Kernel,
        blocks: Sequence[CompiledBlock],
        hierarchy: Hierarchy,
        known: NDArray[np.uint8],
        tail: Tail | None = None,
    ) -> None:
        """blocks: that have routers; known: the hierarchy's, [L, E]. tail: follows them."""
        self.blocks = blocks
        self._tail = tail
        self._kernel = kernel
        self._hierarchy = hierarchy
        self._rows = blocks[0].h.new_empty(len(blocks) + 1, 1, 1, blocks[0].h.shape[-1])
        self._first = self._rows[0]
        self._stages = Stages(self._rows.flatten(1), known.shape[1])
        self._holds_all = len(blocks) == len(known)  # the model's layers of experts
        self._one_by_one = True
        self._reach = 0  # layers that routers are asked ahead
        self.num_looks = 0  # at what they said, for experts were missing
        # Whose keys, and values beside them, were told where they lie.
        self._told: list[weakref.ref[torch.Tensor] | None] = [None] * len(blocks)
        for stage, block in enumerate(blocks):
            of_layer = known[block.experts.layer, : block.experts.num_experts]
            results = (block.h, block.normed, block.outs)
            self._stages.describe(
                stage, block.packed, block.choice, results, block.rounds, of_layer
            )
            block.note_to(self._stages, stage, of_layer)
            if (early := hierarchy.early) is not None:
                self._stages.begin_early(stage, *early.of_layer(block.experts.layer))

    @property
    def dtype(self) -> torch.dtype:
        return self._first.dtype

    def fits(self, token: Beginning) -> bool:
        """Whether compiled code reads such a token, and such cosines and sines."""
        return token.are_in_tables or self.blocks[0].takes(token.x, token.turns)

    def place_in(self, cache: Any) -> Place | None:
        """Where the next token's keys and values go; None where compiled code cannot write there,
        or a layer holds another number of tokens. Changes nothing."""
        memory, positions, dtype = [], set(), self.dtype
        for block in self.blocks:
            layer = preallocated_layer(cache, block.found.layer_index)
            place = None if layer is None else layer.lone_place(dtype)
            if place is None:
                return None
            memory.append(place[0])
            positions.add(place[1])
        return Place(memory, positions.pop()) if len(positions) == 1 else None

    def run(
        self,
        x: torch.Tensor | None,
        token: Beginning,
        cache: Any,
        place: Place,
        check: Callable[[], None],
    ) -> tuple[torch.Tensor, TailCall | None]:
        """[1, 1, H] -> [1, 1, H], and the cache is one token longer. x: None at the beginning.
        check: asked before anything is told or kept; where it raises, nothing was done. With a
        call the tail follows, and will write there; ``settle`` in any case."""
        if x is not None or token.x_at is None:
            self._first.copy_(token.x if x is None else x)
        self._remember(place.memory)
        self._stages.begin(token.x_at if x is None else None, token.turns_at, place.position)
        self._look_ahead()
        tail = None if self._tail is None else self._tail.call(self._rows[-1])
        is_ended = self._through(token, x is None, place, tail, check)
        for block in self.blocks:
            cache.layers[block.found.layer_index].keep(place.position + 1)
            block.num_calls += 1
        if is_ended and self._tail is not None and tail is not None:
            self._tail.make_room()
            return tail.out, tail
        return self._rows[-1].clone(), None

    def settle(self, is_told: bool = True) -> None:
        """What ``run`` has begun is done, whether it returned or not. is_told: else its experts
        count for nothing."""
        spent_s = self._kernel.settle()
        if is_told:
            self._hierarchy.count_compute(spent_s)

    def _through(
        self,
        token: Beginning,
        is_first: bool,
        place: Place,
        tail: TailCall | None,
        check: Callable[[], None],
    ) -> bool:
        """Whether the last block was run ahead with the tail behind it: other threads compute its
        experts while events are told."""
        at, is_ended = 0, False
        while at < len(self.blocks):
            done = self._run_ahead(at, tail, check)
            at += done or 0
            is_ended = at == len(self.blocks)
            if is_ended or (done is not None and self._goes_on(at)):
                continue
            if done is not None:
                self.blocks[at].finish_part(self._rows[at + 1], self._said(at))
            else:
                x = token.x if is_first and at == 0 else self._rows[at]
                self._run_one(at, x, token, place)
            at += 1
        return is_ended

    def _goes_on(self, at: int) -> bool:
        """Whether a block that was run up to its choice can be run ahead from there: what it chose
        was noted, and later ones' missing experts are on their way; or may be in memory, and only
        had to be noted. In the first case other threads compute it now: until the next run nobody
        may begin a load, for it might take the place of an expert of its."""
        block = self.blocks[at]
        if self._stages.is_in_part(at):
            return False
        if self._stages.has_news(at):
            said = self._said(at)
            assert said is not None, "there is news that nobody asked for"
            self._hierarchy.foresee(block.experts.layer, said, block.chosen_keys)
            self.num_looks += 1
        else:
            block.note_chosen()
        self._stages.go_on(at)
        return True

    def _said(self, at: int) -> NDArray[np.float32] | None:
        """What later routers said [1, reach, E] to the input of this one's, if they were asked."""
        said = self._stages.said_early(at)
        return None if said is None else as_recorded(torch.from_numpy(said[None, : self._reach]))

    def _look_ahead(self) -> None:
        """How blocks are run in this pass. One by one where somebody wants to see routers, or who
        looks ahead wants more than the compiled code can tell: it asks routers of this stretch."""
        is_observed = self.blocks[0].experts.is_observed
        outlook = None if is_observed or not self._holds_all else self._hierarchy.outlook
        if outlook is None or outlook.depth > FURTHEST:
            self._reach = 0
            self._one_by_one = is_observed or not self._hierarchy.is_quiet()
            self._stages.look_ahead(0)
            return
        self._reach, self._one_by_one = outlook.depth, False
        changes = [block.experts.changes(outlook) for block in self.blocks]
        self._stages.look_ahead(self._reach, changes)

    def _remember(self, memory: list[_Memory]) -> None:
        for stage, (keys, values) in enumerate(memory):
            told = self._told[stage]
            if told is None or told() is not keys:
                self._stages.remember(stage, keys, values)
                self._told[stage] = weakref.ref(keys)

    def _run_ahead(
        self, first: int, tail: TailCall | None, check: Callable[[], None]
    ) -> int | None:
        """How many blocks were run whole; None if nothing was, not even a choice of experts."""
        if self._one_by_one:
            check()
            return None
        spent_s = self._stages.run(self._kernel, first, tail)
        check()
        if spent_s:
            events = [block.told() for block in self.blocks[first : first + len(spent_s)]]
            if not self._hierarchy.run_hits(events, spent_s):
                self.settle()  # what moves must not be read
                self._hierarchy.run_computed(events, spent_s)
        return len(spent_s)

    def _run_one(self, at: int, x: torch.Tensor, token: Beginning, place: Place) -> None:
        block = self.blocks[at]
        block.attend(x, token.turns, (*place.memory[at], place.position), block.normed)
        block.finish(self._rows[at + 1])
