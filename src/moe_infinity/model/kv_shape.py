"""What a model's KV cache takes, before there is one: as its layers are after one token."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache, EncoderDecoderCache

from moe_infinity.model.cache_name import CACHE
from moe_infinity.model.config_values import first_number
from moe_infinity.model.skeleton import find_experts

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class KvShape:
    """What a row of context costs, per kind of attention layer, in elements.

    Of an encoder-decoder model: a row of as many encoder tokens and as many decoder tokens.
    """

    per_token: int  # grows with every token: full-attention layers
    windows: tuple[tuple[int, int], ...]  # (window, elements per token) of sliding layers
    fixed: int  # recurrent and convolution states

    @classmethod
    def of(cls, meta: Any) -> KvShape:
        """Read off the cache after one token went through the model on the meta device."""
        layers = layers_after_one_token(meta)
        if layers is None:
            return cls(_elements_by_config(meta.config.get_text_config()), (), 0)
        per_token, windows, fixed = 0, [], 0
        for layer in layers:
            elements = _kv_elements(layer)
            window = getattr(layer, "sliding_window", None)
            if window:
                windows.append((int(window), elements))
            else:
                per_token += elements
            fixed += _state_elements(layer)
        return cls(per_token, tuple(windows), fixed)

    def bytes_per_token(self, item_bytes: int) -> int:
        return (self.per_token + sum(n for _, n in self.windows)) * item_bytes

    def num_bytes(self, context: int, item_bytes: int) -> int:
        """Bytes of one row of ``context`` tokens."""
        sliding = sum(min(window, context) * n for window, n in self.windows)
        return (self.per_token * context + sliding + self.fixed) * item_bytes


def layers_after_one_token(meta: Any) -> list[Any] | None:
    """The cache's layers of a model on the meta device; None if it does not run there."""
    experts: list[nn.Module] = [found.module for found in find_experts(meta)]
    norms = [module for module in meta.modules() if _is_norm(module)]
    # Norms change no shape and take half of the time; a few families want more of theirs.
    layers = _layers_without(meta, experts + norms)
    return _layers_without(meta, experts) if layers is None else layers


def _layers_without(meta: Any, modules: list[nn.Module]) -> list[Any] | None:
    token = torch.zeros((1, 1), dtype=torch.long, device="meta")
    if meta.config.is_encoder_decoder:
        caches = [DynamicCache(), DynamicCache()]
        inputs = {"decoder_input_ids": token, CACHE: EncoderDecoderCache(*caches)}
    else:
        caches = [DynamicCache(config=meta.config)]
        inputs = {CACHE: caches[0], "use_cache": True}
    try:
        with torch.no_grad(), _passed_over(modules):
            meta(input_ids=token, **inputs)
    except Exception:  # some families read values; their cache is taken from the config instead
        _log.debug("no forward pass on the meta device", exc_info=True)
        return None
    return [layer for part in caches for layer in part.layers]


@contextlib.contextmanager
def _passed_over(modules: list[nn.Module]) -> Iterator[None]:
    """Let modules pass their input on: experts may not look at values there are not."""
    own = [module.__dict__.get("forward") for module in modules]
    for module in modules:
        module.forward = lambda hidden_states, *args, **kwargs: hidden_states
    try:
        yield
    finally:
        for module, forward in zip(modules, own, strict=True):
            del module.forward
            if forward is not None:
                module.forward = forward


def _is_norm(module: nn.Module) -> bool:
    return "Norm" in type(module).__name__ and not any(True for _ in module.children())


def _kv_elements(layer: Any) -> int:
    tensors = [layer.keys, layer.values] if getattr(layer, "keys", None) is not None else []
    tensors.append(getattr(layer, "indexer_keys", None))
    return sum(t.numel() for t in tensors if isinstance(t, torch.Tensor))


def _state_elements(layer: Any) -> int:
    states = [getattr(layer, name, None) for name in ("conv_states", "recurrent_states")]
    flat = [s for state in states for s in (state.values() if isinstance(state, dict) else [state])]
    return sum(s.numel() for s in flat if isinstance(s, torch.Tensor))


def _elements_by_config(text: Any) -> int:
    heads = first_number(text, "num_key_value_heads", "num_attention_heads", "num_heads") or 1
    hidden = first_number(text, "hidden_size", "d_model") or 1
    head_dim = first_number(text, "head_dim", "d_kv") or hidden // heads
    return 2 * (first_number(text, "num_hidden_layers", "num_layers") or 1) * heads * head_dim
