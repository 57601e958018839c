"""How the library went from block to block in a pass that was watched."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

from torch import nn

from moe_infinity.model.cache_name import CACHE

# What a block is told that is another thing at every token.
CHANGING = {"position_ids", CACHE, "position_embeddings"}
PLAIN = (type(None), bool, int, float, str)  # a mask is not among them


class Call(NamedTuple):  # of a block, as the library made it
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    out: Any


def are_alike(calls: list[Call]) -> bool:
    """Whether each block is shown what the one before returned, and all are told the same."""
    first = calls[0].kwargs
    if not first.keys() >= CHANGING or first["position_ids"] is None:
        return False
    if first.get("attention_mask") is not None or not isinstance(
        first["position_embeddings"], tuple
    ):
        return False
    if not all(isinstance(first[name], PLAIN) for name in first.keys() - CHANGING):
        return False
    is_one_thing = all(len(call.args) == 1 for call in calls) and all(
        call.kwargs.keys() == first.keys() and all(call.kwargs[n] is first[n] for n in first)
        for call in calls
    )
    return is_one_thing and all(one.out is other.args[0] for one, other in pairwise(calls))


@contextlib.contextmanager
def watched(blocks: Sequence[nn.Module]) -> Iterator[list[Call]]:
    """Calls of blocks, in their order."""
    calls: list[Call] = []

    def note(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        calls.append(Call(args, kwargs, out))

    handles = [block.register_forward_hook(note, with_kwargs=True) for block in blocks]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()
