"""A token of decode before the first block: its embedding, its position, and the turns of that.

A tensor that torch makes takes 50 us where the weights that stream by have pushed its code out of
the processor's caches. So compiled blocks are told where rows of tables lie, and tensors are made
for whoever asks.
"""

from __future__ import annotations

from functools import cached_property

import torch

from moe_infinity.model.table import Table
from moe_infinity.model.turns import Turns


class Beginning:
    """x_at: where the embedding lies; None where it has to be made."""

    def __init__(
        self,
        table: Table,
        turns: Turns,
        ids: torch.Tensor,
        position: torch.Tensor | None,
        length: int,
        dtype: torch.dtype,
    ) -> None:
        """ids, position: [1, 1]. length: of what comes before it, its position where none is
        given. dtype: of the blocks."""
        self._table, self._turns = table, turns
        self._ids, self._given = ids, position
        self._position = length if position is None else int(position)
        x_at = table.address_of(int(ids), dtype)
        turns_at = turns.addresses_of(self._position, dtype)
        self.are_in_tables = x_at is not None and turns_at is not None
        self.x_at = x_at if self.are_in_tables else None
        if turns_at is None:
            cos, sin = self.turns
            turns_at = (cos.data_ptr(), sin.data_ptr())
        self.turns_at = turns_at

    @cached_property
    def x(self) -> torch.Tensor:
        """[1, 1, H]"""
        return self._table.of(self._ids)

    @cached_property
    def position(self) -> torch.Tensor:
        """[1, 1]"""
        return torch.tensor([[self._position]]) if self._given is None else self._given

    @cached_property
    def turns(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines, [1, 1, rotary_dim] each."""
        return self._turns.of(self.x, self.position)
