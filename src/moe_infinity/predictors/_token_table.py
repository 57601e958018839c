"""Which experts of the first layers a token was routed to before: known before the pass begins.

The nearer a layer is to the embeddings, the more the token alone decides. T: tokens, E: experts.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moe_infinity.predictors._pair_table import PairTable
from moe_infinity.tracing.event import Event
from moe_infinity.tracing.state_tensors import Dims
from moe_infinity.types import ExpertShape

TABLE_BYTES = 8 * 1024**2  # at most, and about as much again for finding rows
_ROW_BYTES = 128  # that finding a row takes
_MOST_TOKENS = 256  # of a prompt, its end: about 10 us a token and layer
_SMOOTHING = 1.0  # uses of a token that the layer's own habits are worth


class TokenTable:
    """Counts by token and layer, for the first ``depth`` layers and as many tokens as fit."""

    def __init__(self, shape: ExpertShape, depth: int) -> None:
        self.depth = min(depth, shape.num_layers)
        self._top_k = shape.top_k
        row_bytes = max(2 * shape.num_experts, _ROW_BYTES)
        self._table = PairTable(shape.num_experts, TABLE_BYTES // row_bytes)
        self._habits = np.ones((self.depth, shape.num_experts))  # uses of each expert, faded
        self._ids: NDArray[np.int64] | None = None

    def begin_pass(self, token_ids: NDArray[np.int64] | None) -> None:
        self._ids = token_ids

    def chances(self) -> NDArray[np.float64] | None:
        """[depth, E] chance that the pass's only token uses an expert; None for more tokens."""
        if self._ids is None or len(self._ids) != 1:
            return None
        uses, counts = self._table.look_up(self._keys(self._ids[:1]))
        habit = self._habits / self._habits.sum(axis=1, keepdims=True)
        usual = np.minimum(1.0, habit * self._top_k)
        chances: NDArray[np.float64] = (counts + _SMOOTHING * usual) / (uses[:, None] + _SMOOTHING)
        return chances

    def observe(self, event: Event) -> None:
        """Learn from one layer of the pass, where its tokens are known one by one."""
        if event.layer >= self.depth or self._ids is None:
            return
        if len(event.top_k_index) != len(self._ids):
            return  # a part of a long prompt
        for token, experts in zip(
            self._ids[-_MOST_TOKENS:].tolist(), event.top_k_index[-_MOST_TOKENS:], strict=True
        ):
            routed = experts[experts >= 0]
            self._table.learn([token * self.depth + event.layer], routed)
            self._habits[event.layer] *= 0.999
            self._habits[event.layer, routed] += 1

    def arrays(self) -> dict[str, NDArray[Any]]:
        return {"habits": self._habits, **self._table.arrays()}

    def dims(self) -> dict[str, Dims]:
        """Of ``arrays``, for ``load_state``."""
        return {"habits": self._habits.shape, **self._table.dims()}

    def restore(self, arrays: Mapping[str, NDArray[Any]]) -> None:
        self._habits[:] = arrays["habits"]
        self._table.restore(arrays)

    def _keys(self, ids: NDArray[np.int64]) -> list[int]:
        keys: list[int] = (ids[:, None] * self.depth + np.arange(self.depth)).ravel().tolist()
        return keys
