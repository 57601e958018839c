"""Decode passes of one token over tensors that stay where they are, so that they can be recorded.

The library attends to as many keys as there are, a new shape at every token; here to a power of two
of them, those that are not there yet masked. A device's decode goes this way whoever directs its
experts: the same products in the same order, and so the same bits.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from typing import Any

import torch
from transformers.modeling_outputs import CausalLMOutputWithPast

from moe_infinity.devices.base import Device
from moe_infinity.model.cache_name import CACHE
from moe_infinity.model.directed import DirectedExperts
from moe_infinity.model.kv_cache import FixedPlace, PreallocatedLayer
from moe_infinity.model.lone_token import by_name, is_lone_token
from moe_infinity.model.standing import stand_before
from moe_infinity.model.turns import has_moving_rope

_log = logging.getLogger(__name__)
_SHORTEST = 256  # keys attended to at least
_ATTENTION = "sdpa"


class StaticDecode:
    """Stands before a model's ``forward``; what it does not know goes the library's way.

    fault: why passes are no longer recorded, if they were to be.
    """

    def __init__(self, model: Any, device: Device, max_context: int) -> None:
        self.directed: DirectedExperts | None = None
        self.fault: str | None = None
        self._model, self._device = model, device
        self._max_context = max_context
        where = device.torch_device
        self._token = torch.zeros((1, 1), dtype=torch.int64, device=where)
        self._position = torch.zeros(1, dtype=torch.int64, device=where)  # in the cache
        self._turn = torch.zeros((1, 1), dtype=torch.int64, device=where)  # as the model counts
        self._places = torch.arange(max_context, device=where)
        self._logits: dict[int, torch.Tensor] = {}  # by length
        self._recorded: dict[int, Callable[[], None]] = {}
        self._warm: set[int] = set()  # lengths whose kernels are compiled
        self._cache: Any = None
        self._stock = stand_before(model, self.forward)

    def forget(self) -> None:
        """Let go of the cache that was used last and of what was recorded over its memory."""
        self._recorded.clear()
        self._logits.clear()
        self._cache = None

    def can(self, kwargs: dict[str, Any]) -> bool:
        """Whether a call is a pass of one token that can go this way."""
        if not is_lone_token(kwargs):
            return False
        cache = kwargs[CACHE]
        layers = getattr(cache, "layers", ())
        begun = all(type(each) is PreallocatedLayer and each.has_begun for each in layers)
        return bool(layers) and begun and 0 < cache.get_seq_length() < self._max_context

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        args = by_name(args, kwargs)
        if args or not self.can(kwargs) or self._is_masked(kwargs):
            return self._stock(*args, **kwargs)
        cache = kwargs[CACHE]
        if cache is not self._cache:
            self.forget()
            self._cache = cache
        position, turn = cache.get_seq_length(), kwargs.get("position_ids")
        self._token.copy_(kwargs["input_ids"])
        self._position.fill_(position)
        self._turn.copy_(self._position[None] if turn is None else turn)
        length = min(self._max_context, max(_SHORTEST, 1 << position.bit_length()))
        self._run(length)
        for layer in cache.layers:
            layer.keep(position + 1)
        if kwargs.get("return_dict") is False:
            return (self._logits[length].clone(), cache)
        return CausalLMOutputWithPast(logits=self._logits[length].clone(), **{CACHE: cache})

    def _run(self, length: int) -> None:
        """Without the device's own direction there is a host in a pass: nothing to record. With it
        the first pass of a length compiles what it needs, which must not happen in a recording."""
        if self.directed is None or not self.directed.is_on or self.fault:
            self._pass(length)
        elif length in self._recorded:
            self._recorded[length]()
        elif length in self._warm and length in self._logits:
            self._record(length)
        else:
            self._pass(length)
            self._warm.add(length)

    def _record(self, length: int) -> None:
        try:
            self._recorded[length] = self._device.capture(lambda: self._pass(length))
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            self.fault = (
                f"decode was not recorded as a graph ({error}); it is launched piece by piece"
            )
            _log.warning("%s", self.fault)
            self._pass(length)
            return
        self._recorded[length]()

    def _pass(self, length: int) -> None:
        """All of a pass, from the token in its place to the logits in theirs."""
        seen = (self._places[:length] <= self._position)[None, None, None]  # [1, 1, 1, length]
        with self._in_place(length):
            said = self._stock(
                input_ids=self._token,
                position_ids=self._turn,
                attention_mask=seen,
                use_cache=True,
                **{CACHE: self._cache},
            )
        if length not in self._logits:
            self._logits[length] = torch.empty_like(said.logits)
        self._logits[length].copy_(said.logits)

    @contextlib.contextmanager
    def _in_place(self, length: int) -> Iterator[None]:
        fixed = FixedPlace(self._position, length)
        for layer in self._cache.layers:
            layer.fixed = fixed
        try:
            yield
        finally:
            for layer in self._cache.layers:
                layer.fixed = None

    def _is_masked(self, kwargs: dict[str, Any]) -> bool:
        """Whether padding is in the way. Asked of every new cache, for padding comes first."""
        mask = kwargs.get("attention_mask")
        if mask is None or kwargs[CACHE] is self._cache:
            return False
        return not bool(mask.all())


def is_static(config: Any) -> bool:
    """Whether a model's decode of one token can go this way: attention to everything before, by
    torch's own function, with positions that mean the same in every context."""
    is_sdpa = config._attn_implementation == _ATTENTION
    is_moving = has_moving_rope(config.get_text_config())
    return not config.is_encoder_decoder and is_sdpa and not is_moving
