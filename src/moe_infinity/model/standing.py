"""Stands something before a model's own ``forward``, looking just like it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any


def stand_before(model: Any, call: Callable[..., Any]) -> Callable[..., Any]:
    """Let ``call`` take what ``model.forward`` was given. Returns what stood there before.

    The library reads the signature to know what it may pass: it must stay what it was.
    """
    stock: Callable[..., Any] = model.forward

    @functools.wraps(stock)
    def forward(*args: Any, **kwargs: Any) -> Any:
        return call(*args, **kwargs)

    model.forward = forward
    return stock


def stand_aside(model: Any) -> None:
    """Undo every ``stand_before``."""
    model.__dict__.pop("forward", None)
