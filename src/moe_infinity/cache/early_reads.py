"""Loads that compiled code begins by itself where it finds an expert missing (native/reads.hpp).

Python takes half a millisecond to look an event up and to choose victims, in which the disk would
have nothing to do. So such reads go into memory that is spare. When the load is decided on, its
slot and the spare memory change places: which expert goes for which is decided as ever.
"""

from __future__ import annotations

import ctypes
from collections.abc import Collection, Sequence
from typing import NamedTuple

import numpy as np

from moe_infinity.checkpoint.direct_io import address_of
from moe_infinity.checkpoint.kernel_reads import KernelReads
from moe_infinity.types import ExpertKey, ReadRange

NUM_EARLY = 2  # as many as keep a disk busy until Python has begun the others
_MOST_PIECES = 8  # of an expert
_PIECE_WORDS = 4
_PLAN_WORDS = 1 + _MOST_PIECES * _PIECE_WORDS
_CONTEXT, _NUM_BEGUN, _BELL, _FIRST_NUMBER, _SPARES = range(5)
_BUFFER, _IS_TAKEN, _KEY, _PIECES, _SPARE_WORDS = range(5)
_FIRST = 1 << 62  # number of such a read: far from those that others are given


class Begun(NamedTuple):
    """A load that compiled code began, of its pieces the first ones."""

    key: ExpertKey
    spare: int
    buffer: memoryview
    num_pieces: int

    def number_of(self, piece: int) -> int:
        """Of the read, in the kernel's queue."""
        return _FIRST + self.spare * _MOST_PIECES + piece


class EarlyReads:
    """What compiled code needs to know for that, and what it says. One thread owns it."""

    def __init__(self, reads: KernelReads, keys: Collection[ExpertKey]) -> None:
        """reads: has to stay open for as long as memory is offered. keys: of all experts."""
        num_layers = 1 + max(key.layer for key in keys)
        self._num_experts = 1 + max(key.expert for key in keys)
        self._plans = np.zeros((num_layers, self._num_experts, _PLAN_WORDS), dtype=np.uint64)
        self._words = np.zeros(_SPARES + NUM_EARLY * _SPARE_WORDS, dtype=np.uint64)
        self._words[_CONTEXT] = reads.context_at
        self._words[_NUM_BEGUN] = ctypes.addressof(reads.begun_elsewhere)
        self._words[_BELL] = reads.bell
        self._words[_FIRST_NUMBER] = _FIRST
        self._spares = self._words[_SPARES:].reshape(NUM_EARLY, _SPARE_WORDS)
        self._buffers = [memoryview(b"")] * NUM_EARLY
        self._is_seen = [False] * NUM_EARLY
        self._is_over = False

    def of_layer(self, layer: int) -> tuple[int, int, int]:
        """What compiled code is told for a layer: where its experts' plans are, and all of this;
        the number of its first expert among all."""
        at = int(self._plans[layer].ctypes.data), int(self._words.ctypes.data)
        return *at, layer * self._num_experts

    def is_planned(self, key: ExpertKey) -> bool:
        return bool(self._plans[key][0])

    def plan(self, key: ExpertKey, pieces: Sequence[ReadRange], files: Sequence[int]) -> None:
        """From now on read an expert so, each piece from its file's descriptor."""
        if len(pieces) > _MOST_PIECES or self._is_over:
            return
        words = [
            word
            for piece, fd in zip(pieces, files, strict=True)
            for word in (fd, piece.file_offset, piece.num_bytes, piece.slot_offset)
        ]
        self._plans[key][1 : 1 + len(words)] = words
        self._plans[key][0] = len(pieces)

    def offer(self, spare: int, buffer: memoryview) -> None:
        """Read into this memory, in place of what was spare before, whatever was begun there."""
        place = self._spares[spare]
        place[_BUFFER] = address_of(buffer)
        self._buffers[spare] = buffer
        self._is_seen[spare] = False
        place[_IS_TAKEN] = 0

    def is_offered(self) -> bool:
        return bool(self._spares[:, _BUFFER].all())

    def is_at(self, spare: int, buffer: memoryview) -> bool:
        """Whether this memory is what the spare is now."""
        return bool(self._spares[spare, _BUFFER] == address_of(buffer))

    def is_any_begun(self) -> bool:
        """Whether there is a load that nobody has decided on yet."""
        return bool(self._spares[:, _IS_TAKEN].any())

    def unseen(self) -> list[Begun]:
        """Loads that were begun and not ``see``n yet."""
        if not self.is_any_begun():
            return []
        found = []
        for spare, place in enumerate(self._spares.tolist()):
            if place[_IS_TAKEN] and not self._is_seen[spare]:
                key = ExpertKey(*divmod(place[_KEY], self._num_experts))
                found.append(Begun(key, spare, self._buffers[spare], place[_PIECES]))
        return found

    def see(self, begun: Begun) -> None:
        self._is_seen[begun.spare] = True

    def forget(self) -> None:
        """No such read is under way: what was begun is not, and its memory is spare again."""
        self._spares[:, _IS_TAKEN] = 0
        self._is_seen = [False] * NUM_EARLY

    def end(self) -> None:
        """Nothing is begun so any more."""
        self._is_over = True
        self._plans[:, :, 0] = 0

    def close(self) -> None:
        """The same, and no such read is under way: hold on to no memory."""
        self.end()
        self._spares[:] = 0
        self._buffers = [memoryview(b"")] * NUM_EARLY
