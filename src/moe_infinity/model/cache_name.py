"""What the library calls a pass's keys and values: ``past_key_values``, from 5.24 on ``cache``."""

from __future__ import annotations

import re
from typing import Any

import transformers

_RENAMED_IN = (5, 24)


def _name_in(version: str) -> str:
    numbers = re.match(r"(\d+)\.(\d+)", version)
    is_renamed = numbers is None or (int(numbers[1]), int(numbers[2])) >= _RENAMED_IN
    return "cache" if is_renamed else "past_key_values"


CACHE = _name_in(transformers.__version__)


def name_cache(kwargs: dict[str, Any]) -> None:
    """Give a cache that came by either name the library's own, in place. Raises TypeError where it
    came by both."""
    for name in {"cache", "past_key_values"} - {CACHE}:
        if name in kwargs:
            if CACHE in kwargs:
                raise TypeError(f"got both {name} and {CACHE}, expected one of them")
            kwargs[CACHE] = kwargs.pop(name)
