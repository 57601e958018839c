"""Blocks that follow one another, as the compiled code reads them (native/block.hpp): one call runs
them ahead, as far as their experts are in memory."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from moe_infinity.kernels.blocks import Choice, TailCall
from moe_infinity.kernels.described import TYPES
from moe_infinity.kernels.native import Kernel

_CALL_BYTES = 296
# Words of a stage: the block; a token's x, cos, sin, keys, values, room, position, h, normed,
# logits, ids, weights; a sum's outs, weights, h, out, sizes, types; calls, known, num_experts; a
# times; an outlook's changes, said, told, reach and stride; how far it is, and whether that was
# asked; reads' plans, where they begin, the first expert's number.
_BLOCK, _X, _COS, _SIN, _KEYS, _POSITION, _H, _SUM, _OUT, _CALLS = 0, 1, 2, 3, 4, 7, 8, 13, 16, 19
_EXPERTS_S, _DENSE_S, _CHANGES, _SAID, _REACH, _PROGRESS, _EARLY, _NUM_WORDS = (
    *range(22, 26),
    27,
    28,
    29,
    32,
)
_NONE, _CHOSEN, _BEGUN, _NEWS, _PART = range(5)  # of progress
_LOW = np.uint64(0xFFFFFFFF)  # half of a word
FURTHEST = 3  # stages whose routers are asked early


class Stages:
    """Memory of some stages. Whoever gives addresses keeps what lies there alive.

    rows: [num_stages + 1, H] what goes into the first and comes out of each.
    """

    def __init__(self, rows: torch.Tensor, num_experts: int) -> None:
        num_stages = len(rows) - 1
        self._words = np.zeros((num_stages, _NUM_WORDS), dtype=np.uint64)
        self._at = self._words.ctypes.data
        self._experts_s = self._words[:, _EXPERTS_S].view(np.float64)
        self._dense_s = self._words[:, _DENSE_S].view(np.float64)
        self._calls = np.zeros((num_stages, num_experts, _CALL_BYTES), dtype=np.uint8)
        self._blocks: dict[int, NDArray[np.uint8]] = {}
        self._said = np.full((num_stages, FURTHEST, num_experts), -np.inf, dtype=np.float32)
        self._told = np.zeros((num_stages, num_experts), dtype=np.uint8)
        self._changes: list[NDArray[np.float32] | None] = [None] * num_stages
        for words, said, told in zip(self._words, self._said, self._told, strict=True):
            words[_SAID : _SAID + 2] = said.ctypes.data, told.ctypes.data
        row_bytes = rows.stride(0) * rows.element_size()
        at = rows.data_ptr() + row_bytes * np.arange(len(rows), dtype=np.uint64)
        self._words[:, _X], self._words[:, _OUT] = at[:-1], at[1:]
        self._first_at = rows.data_ptr()

    def describe(
        self,
        stage: int,
        block: bytes,
        choice: Choice,
        results: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
        rounds: bool,
        known: NDArray[np.uint8],
    ) -> None:
        """What is the same for every token. block: packed; results: h [1, H], normed [1, H] and
        what the experts say [K, H]; known [E]: NOWHERE, NOTED or COMING (cache/base.py)."""
        kept = self._blocks[stage] = np.frombuffer(block, dtype=np.uint8).copy()
        h, normed, outs = results
        top_k, size = outs.shape
        words = self._words[stage]
        words[_BLOCK] = kept.ctypes.data
        words[_H : _H + 5] = (h.data_ptr(), normed.data_ptr(), *choice.addresses)
        words[_SUM : _SUM + 3] = (outs.data_ptr(), choice.weights.data_ptr(), h.data_ptr())
        words[_OUT + 1 : _OUT + 3] = (size | top_k << 32, TYPES[outs.dtype] | rounds << 32)
        words[_CALLS : _CALLS + 3] = (self._calls[stage].ctypes.data, known.ctypes.data, len(known))

    def begin_early(self, stage: int, plans_at: int, early_at: int, first_key: int) -> None:
        """Have missing experts of a stage read at once (cache/early_reads.py): by plans, each one's
        at an address; first_key: the flat key of its expert 0."""
        self._words[stage, _EARLY : _EARLY + 3] = (plans_at, early_at, first_key)

    def note(self, stage: int, expert: int, call: bytes) -> None:
        """How to compute an expert on one token."""
        self._calls[stage, expert] = np.frombuffer(call, dtype=np.uint8)

    def remember(self, stage: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Where the block's keys and values lie, [num_kv_heads, room, head_dim]."""
        at = (keys.data_ptr(), values.data_ptr(), keys.shape[-2])
        self._words[stage, _KEYS:_POSITION] = at

    def begin(self, x_at: int | None, turns_at: tuple[int, ...], position: int) -> None:
        """Of a token, where it lies, None being the first row; where its cosines and sines lie;
        and how many tokens there are before it."""
        self._words[0, _X] = self._first_at if x_at is None else x_at
        self._words[:, _COS : _SIN + 1] = turns_at
        self._words[:, _POSITION] = position
        self._words[:, _PROGRESS] = _NONE
        self._told[:] = 0

    def look_ahead(self, reach: int, changes: Sequence[NDArray[np.float32] | None] = ()) -> None:
        """From now on stop where one of the next ``reach`` routers, at most FURTHEST, would choose
        an expert that is nowhere, were it asked now; 0: nobody looks ahead. changes: by stage,
        [reach, H] from its router's input to theirs; None where they are shown the same."""
        self._words[:, _REACH] = min(reach, FURTHEST) | self._said.shape[2] << 32
        for stage, change in enumerate(changes):
            if change is not self._changes[stage]:
                self._changes[stage] = change
                self._words[stage, _CHANGES] = 0 if change is None else change.ctypes.data

    def go_on(self, stage: int) -> None:
        """The next run begins with this one, where the last one stopped; what was ``said_early``
        there was seen."""
        self._words[stage, _PROGRESS] = _BEGUN if self._progress(stage) == _NEWS else _CHOSEN

    def has_news(self, stage: int) -> bool:
        """Whether the last run stopped at this stage, its experts begun, because one of the next
        ones' routers likes an expert that is nowhere."""
        return self._progress(stage) == _NEWS

    def is_in_part(self, stage: int) -> bool:
        """Whether it did because an expert of its own is missing, those that are noted begun."""
        return self._progress(stage) == _PART

    def said_early(self, stage: int) -> NDArray[np.float32] | None:
        """What later routers say [FURTHEST, E], if the last run asked them at this stage; -inf of
        those that there are not."""
        return self._said[stage] if self._words[stage, _PROGRESS] > _LOW else None

    def _progress(self, stage: int) -> int:
        return int(self._words[stage, _PROGRESS] & _LOW)

    def run(self, kernel: Kernel, first: int, tail: TailCall | None) -> list[float]:
        """The token, in its row, through the stages from ``first`` on. Returns of each that was run
        whole the seconds that its experts took; the next one, if there is one, was run up to the
        choice of its experts, and ``has_news``, or ``is_in_part`` done, or one that may be in
        memory is not noted. Then it has to ``go_on``, or somebody else does the rest of it. With a
        tail the last one's experts, and it behind them, are begun: ``settle`` says what these
        took."""
        done = kernel.run_ahead(self._at + first * _NUM_WORDS * 8, len(self._words) - first, tail)
        kernel.dense_s += float(self._dense_s[first : first + done + 1].sum())
        experts_s: list[float] = self._experts_s[first : first + done].tolist()
        return experts_s
