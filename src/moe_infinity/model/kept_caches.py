"""KV caches of conversations that may go on, all of them within the memory planned for one context.

Knows token ids and caches, neither text nor who is talking.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import EncoderDecoderCache

from moe_infinity.model.kv_cache import PreallocatedLayer

# A cache's memory is used by the page: of a head's keys one of 4 KiB holds 32 tokens or fewer.
_PAGE_TOKENS = 32


@dataclass
class _Kept:
    cache: Any
    ids: list[int]  # of the tokens it holds
    touched: int  # tokens its memory was ever used for; to crop it gives nothing back


class KeptCaches:
    """Lends one cache at a time, filled with as much of a prompt as any kept one has.

    capacity: tokens of all caches together, the lent one included. Where a cache has other layers
    than preallocated ones in RAM (sliding windows, recurrent states, device memory), a second one
    would cost more than its tokens: then only the last is kept.
    """

    def __init__(self, new_cache: Callable[[], Any], capacity: int) -> None:
        """new_cache: an empty one; None for families whose prompts all begin anew."""
        self._new_cache = new_cache
        self._capacity = capacity
        self._kept: list[_Kept] = []  # the one used last is last
        self._lent: _Kept | None = None

    @property
    def num_tokens(self) -> int:
        """That are kept, the lent cache aside."""
        return sum(len(kept.ids) for kept in self._kept)

    def take(self, prompt: Sequence[int], anew: bool = False) -> tuple[Any, int]:
        """A cache for the prompt, and how many of its tokens it holds, all but the last one at
        most; none of them if it is to begin anew. ``give_back`` it."""
        kept = [] if anew else self._kept
        found = max(kept, key=lambda kept: _shared(kept.ids, prompt), default=None)
        shared = 0 if found is None else _shared(found.ids, prompt)
        lent = self._continued(found, shared, len(prompt)) if found and shared else None
        if lent is None:
            if self._kept and not _is_plain(self._kept[-1].cache):
                self._kept.clear()
            lent, shared = _Kept(self._new_cache(), [], 0), 0
        self._lent = lent
        self.grow(len(prompt))
        return lent.cache, shared

    def grow(self, num_tokens: int) -> None:
        """The lent cache is about to hold so many: others go, those unused longest first."""
        assert self._lent is not None, "no cache is lent"
        self._lent.touched = max(self._lent.touched, num_tokens)
        while self._kept and self._used() > self._capacity:
            del self._kept[0]

    def give_back(self, ids: Sequence[int], is_cut: bool = False) -> None:
        """The lent cache was given these tokens. is_cut: a pass broke off, so that some layers may
        hold tokens that others do not."""
        lent, self._lent = self._lent, None
        if lent is None or lent.cache is None or (is_cut and not _is_plain(lent.cache)):
            return
        if isinstance(lent.cache, EncoderDecoderCache):
            return  # it holds what was answered, and all of one prompt: no other begins with that
        lent.ids = list(ids[: _sound_length(lent.cache)])
        if lent.ids:
            self._kept.append(lent)

    def clear(self) -> None:
        self._kept.clear()

    def _continued(self, found: _Kept, shared: int, length: int) -> _Kept | None:
        """The first ``shared`` tokens of a kept cache, for a prompt of ``length``: a copy, if both
        have room once others have gone, unless most of the kept one goes on anyway."""
        if shared < len(found.ids) and self._should_copy(found, shared, length):
            self._kept.remove(found)
            self._kept.append(found)
            self._lent = copy = _Kept(self._new_cache(), [], length)
            self.grow(length)  # those unused longest go before anything is written
            _copy(found.cache, copy.cache, shared)
            return copy
        self._kept.remove(found)
        if shared < len(found.ids) and not _crop(found.cache, shared - len(found.ids)):
            return None
        return found

    def _should_copy(self, found: _Kept, shared: int, length: int) -> bool:
        if not _is_plain(found.cache):
            return False
        copy = _Kept(None, [], length)
        if self._used(copy) <= self._capacity:
            return True
        both = found.touched + _PAGE_TOKENS + length
        return both <= self._capacity and 2 * shared < len(found.ids)

    def _used(self, lent: _Kept | None = None) -> int:
        caches = [*self._kept, *filter(None, [lent or self._lent])]
        return sum(kept.touched + _PAGE_TOKENS for kept in caches[:-1]) + caches[-1].touched


def _shared(ids: Sequence[int], prompt: Sequence[int]) -> int:
    """Tokens both begin with; the prompt's last one has to be computed anyway."""
    most = min(len(ids), len(prompt) - 1)
    return next((at for at in range(most) if ids[at] != prompt[at]), most)


def _is_plain(cache: Any) -> bool:
    """Whether all of it lies in RAM, in memory used as far as it is written."""
    layers = getattr(cache, "layers", ())
    return all(
        type(layer) is PreallocatedLayer and (layer.keys is None or layer.keys.device.type == "cpu")
        for layer in layers
    ) and bool(layers)


def _sound_length(cache: Any) -> int:
    """Tokens that every layer holds: of a pass that was cut short some layers hold more."""
    if not _is_plain(cache):
        return int(cache.get_seq_length())
    length = min(layer.get_seq_length() for layer in cache.layers)
    for layer in cache.layers:
        layer.keep(length)
    return int(length)


def _copy(source: Any, target: Any, length: int) -> None:
    for there, here in zip(target.layers, source.layers, strict=True):
        there.update(here.keys[..., :length, :], here.values[..., :length, :])


def _crop(cache: Any, by: int) -> bool:
    """Forget the last tokens; False where that cannot be done."""
    if not cache.is_croppable:
        return False
    try:
        cache.crop(by)
    except RuntimeError:  # a sliding window has let go of what would be needed again
        return False
    return True
