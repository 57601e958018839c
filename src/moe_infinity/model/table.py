"""Rows of an embedding of the usual kind, without the module's call."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


class Table:
    """What a model's embedding says of token ids. bypassed: modules that are not called for it."""

    def __init__(self, embed: Any) -> None:
        is_plain = type(embed) is nn.Embedding and "forward" not in vars(embed)
        is_plain = is_plain and embed.max_norm is None  # else it writes to its rows
        self._embed = embed
        self.bypassed: list[nn.Module] = [embed] if is_plain else []
        # Detached, it stays the memory that it is, whatever is put in the weight's place.
        weight = self._kept = embed.weight.detach() if is_plain else torch.empty(0, 0)
        is_read = weight.is_cpu and weight.is_contiguous()
        self._num_rows = len(weight) if is_read else 0
        self._at, self._row_bytes = weight.data_ptr(), weight.shape[1] * weight.element_size()
        self._dtype = weight.dtype

    def address_of(self, token_id: int, dtype: torch.dtype) -> int | None:
        """Where the row [H] lies, if it lies somewhere in this dtype. Whoever reads there sees to
        it that the weight is the one that it was."""
        is_there = 0 <= token_id < self._num_rows and dtype is self._dtype
        return self._at + token_id * self._row_bytes if is_there else None

    def of(self, ids: torch.Tensor) -> torch.Tensor:
        """Ids [1, 1] -> [1, 1, H]."""
        if self.bypassed:
            return torch.embedding(self._embed.weight, ids)
        said: torch.Tensor = self._embed(ids)
        return said
