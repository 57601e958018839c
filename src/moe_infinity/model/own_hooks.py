"""Hooks on modules: our own change nothing, and need not be heard where a module is passed over."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any

_COLLECTORS = "transformers.utils.output_capturing"


def has_foreign(hooks: Mapping[int, Callable[..., Any]]) -> bool:
    """Whether somebody else's are among a module's hooks. Those of the library that collect outputs
    stay once somebody asked; they count while they collect."""
    for hook in hooks.values():
        is_idle = getattr(hook, "__module__", "") == _COLLECTORS and not _is_collecting()
        if not is_idle and not getattr(hook, "_moe_infinity", False):
            return True
    return False


def _is_collecting() -> bool:
    active = getattr(sys.modules.get(_COLLECTORS), "_active_collector", None)
    return active is None or bool(active.get())


def own(hook: Callable[..., None]) -> Callable[..., None]:
    """A hook that changes nothing."""
    hook._moe_infinity = True  # type: ignore[attr-defined]
    return hook
