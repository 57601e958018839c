"""A KV cache whose full-attention layers are allocated once and written in place."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from transformers import DynamicCache, EncoderDecoderCache
from transformers.cache_utils import Cache, DynamicLayer

from moe_infinity.checkpoint.direct_io import allocate
from moe_infinity.errors import PlanExceededError

_Memory = tuple[torch.Tensor, torch.Tensor]  # of all keys and all values


@dataclass(frozen=True)
class FixedPlace:
    """position: [1] int64, a tensor, so that work that was recorded once finds the place of later
    tokens. length: of keys and values that are attended to, those behind the position masked."""

    position: torch.Tensor
    length: int


class PreallocatedLayer(DynamicLayer):  # type: ignore[misc]
    """Keys and values [rows, heads, max_context, head_dim]; what is handed out is a view.

    transformers' own layer copies the whole cache at every token. Memory is touched, and so used,
    only as far as it is written.
    """

    _layer_type = None
    _keys: Any
    _values: Any
    _kept: int | None = None  # tokens, where views of them are not made yet

    def __init__(self, max_context: int) -> None:
        super().__init__()
        self._max_context = max_context
        self._room: tuple[torch.Tensor, torch.Tensor] | None = None
        self.fixed: FixedPlace | None = None  # where the pass that runs puts its one token

    @property
    def keys(self) -> Any:
        """[rows, heads, length, head_dim]; None before anything was written."""
        self._make_views()
        return self._keys

    @keys.setter
    def keys(self, keys: torch.Tensor | None) -> None:
        self._make_views()
        self._keys = keys

    @property
    def values(self) -> Any:
        """As keys."""
        self._make_views()
        return self._values

    @values.setter
    def values(self, values: torch.Tensor | None) -> None:
        self._make_views()
        self._values = values

    def _make_views(self) -> None:
        """Passes that write to the memory themselves need none: they only say how much is there."""
        if self._kept is None:
            return
        assert self._room is not None, "nothing was ever written"
        (keys, values), length = self._room, self._kept
        self._keys, self._values = keys.narrow(-2, 0, length), values.narrow(-2, 0, length)
        self._kept = None

    def get_seq_length(self) -> int:
        length: int = super().get_seq_length() if self._kept is None else self._kept
        return length

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if self.fixed is not None:
            return self._update_in_place(self.fixed, key_states, value_states)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        num_tokens = key_states.shape[-2]
        keys, values, start = self.extend(num_tokens, key_states, value_states)
        end = start + num_tokens
        keys[..., start:end, :] = key_states
        values[..., start:end, :] = value_states
        return self.keys, self.values

    def extend(
        self, num_tokens: int, like_keys: torch.Tensor, like_values: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, int]:
        """Make room for more tokens of the kind of ``like_keys`` [rows, heads, any, head_dim].

        Returns the memory of all keys and all values and where the new ones begin, which the
        caller has to write. Raises PlanExceededError.
        """
        start = self.get_seq_length()
        end = start + num_tokens
        if end > self._max_context:
            raise PlanExceededError(
                f"context: got {end} tokens, expected at most the planned {self._max_context}; "
                f"open the model with a larger max_context"
            )
        keys, values = self._own(like_keys, like_values)
        self.keys, self.values = keys.narrow(-2, 0, end), values.narrow(-2, 0, end)
        return keys, values, start

    @property
    def has_begun(self) -> bool:
        """Whether its memory is there, and holds one row."""
        room = self._room
        return room is not None and room[0].shape[0] == 1 and self._is_in(room)

    def keep(self, length: int) -> None:
        """The memory holds ``length`` tokens, whatever was said before: passes with a fixed place
        have filled it so far, or later ones are forgotten."""
        if self._room is not None:  # else nothing was ever written
            self._kept = length

    def _update_in_place(
        self, fixed: FixedPlace, key_states: torch.Tensor, value_states: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        assert self._room is not None, "nothing was ever written"
        keys, values = self._room
        keys.index_copy_(-2, fixed.position, key_states)
        values.index_copy_(-2, fixed.position, value_states)
        return keys.narrow(-2, 0, fixed.length), values.narrow(-2, 0, fixed.length)

    def lone_place(self, dtype: torch.dtype) -> tuple[_Memory, int] | None:
        """The memory of all keys and all values, each [1, heads, max_context, head_dim] of this
        dtype, and where the next token's go; None where something has to be moved or made for it,
        or there is no room. Changes nothing."""
        room, start = self._room, self.get_seq_length()
        if room is None or not 0 < start < self._max_context:
            return None
        return (room, start) if self.is_one_row_of(dtype) and self._is_in(room) else None

    def is_one_row_of(self, dtype: torch.dtype) -> bool:
        """Whether it holds keys [1, heads, length, head_dim] of this dtype."""
        keys = self._keys if self._kept is None or self._room is None else self._room[0]
        return bool(keys.dim() == 4 and keys.shape[0] == 1 and keys.dtype is dtype)

    def _is_in(self, room: tuple[torch.Tensor, torch.Tensor]) -> bool:
        """Whether keys and values are views of it; some put them in another order, copied."""
        if self._kept is not None:
            return True
        keys, memory = self._keys, room[0]
        is_it = keys.data_ptr() == memory.data_ptr() and keys.shape[0] == memory.shape[0]
        return bool(is_it)

    def _own(
        self, key_states: torch.Tensor, value_states: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The memory behind the views. Beam search leaves copies in other order: they go back."""
        self._make_views()  # of the memory that there is, not of what may replace it
        rows = key_states.shape[0]
        if self._room is None or self._room[0].shape[0] != rows:
            self._room = (self._allocate(key_states), self._allocate(value_states))
        length = self.get_seq_length()
        if length and not self._is_in(self._room):
            self._room[0][..., :length, :] = self.keys
            self._room[1][..., :length, :] = self.values
        return self._room

    def _allocate(self, like: torch.Tensor) -> torch.Tensor:
        *front, _, dim = like.shape
        shape = (*front, self._max_context, dim)
        # Zeros: masked places are multiplied by 0 all the same, and what memory held may be NaN.
        if like.device.type != "cpu":
            return torch.zeros(shape, dtype=like.dtype, device=like.device)
        # torch.zeros would write, and so use, all of it at once.
        memory = allocate(math.prod(shape) * like.dtype.itemsize, is_huge=False)
        return torch.frombuffer(memory, dtype=like.dtype, count=math.prod(shape)).view(shape)


def preallocated_layer(cache: Any, index: int) -> PreallocatedLayer | None:
    """Layer ``index`` of a cache, if it is one and has begun."""
    layers = getattr(cache, "layers", ())
    layer = layers[index] if index < len(layers) else None
    return layer if type(layer) is PreallocatedLayer and layer.is_initialized else None


def one_row_layer(cache: Any, index: int, dtype: torch.dtype) -> PreallocatedLayer | None:
    """Layer ``index`` of a cache if compiled code can write there: begun, of one row, in dtype."""
    layer = preallocated_layer(cache, index)
    return layer if layer is not None and layer.is_one_row_of(dtype) else None


# MiniMax takes only a cache class of its own. Jamba's pass over several tokens starts from an empty
# state: a prompt in chunks, or a conversation that goes on, would forget what came before.
_STOCK_CACHE_ONLY = frozenset({"minimax", "jamba"})


def new_cache(config: Any, max_context: int) -> Cache | None:
    """The model's cache with its plain full-attention layers preallocated.

    None for families whose cache has to be the library's, made anew for every prompt.

    Sliding-window, recurrent and other special layers stay as transformers makes them, and so does
    a decoder's view of its encoder: it is written once.
    """
    if config.get_text_config().model_type in _STOCK_CACHE_ONLY:
        return None
    if config.is_encoder_decoder:
        own = Cache(layer_class_to_replicate=partial(PreallocatedLayer, max_context))
        return EncoderDecoderCache(own, DynamicCache())
    cache = DynamicCache(config=config)
    cache.layers = [
        PreallocatedLayer(max_context) if type(layer) is DynamicLayer else layer
        for layer in cache.layers
    ]
    return cache
