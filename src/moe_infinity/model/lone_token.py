"""Which calls of a model are a token of decode: one, behind those that a cache holds."""

from __future__ import annotations

from typing import Any

import torch

from moe_infinity.model.cache_name import CACHE

_KNOWN = {"input_ids", "attention_mask", "position_ids", CACHE, "cache_position"}
_HARMLESS = {"use_cache", "logits_to_keep", "return_dict"}


def is_lone_token(kwargs: dict[str, Any]) -> bool:
    """Whether a call is for one token, and says no more of it than the library's own loop does.
    Masks are looked at by their shape alone."""
    ids, cache = kwargs.get("input_ids"), kwargs.get(CACHE)
    if ids is None or ids.shape != (1, 1) or cache is None:
        return False
    if any(kwargs[name] is not None for name in kwargs.keys() - _KNOWN - _HARMLESS):
        return False
    position, mask = kwargs.get("position_ids"), kwargs.get("attention_mask")
    if position is not None and position.shape != (1, 1):
        return False
    if mask is None:
        return True
    is_plain = isinstance(mask, torch.Tensor) and mask.dim() == 2
    return is_plain and mask.shape[1] == cache.get_seq_length() + 1


def by_name(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
    """Token ids may come first without a name: put them into kwargs; returns what is left."""
    if args and "input_ids" not in kwargs:
        kwargs["input_ids"], args = args[0], args[1:]
    return args
