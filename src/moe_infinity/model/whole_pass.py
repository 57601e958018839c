"""A token's pass from its embedding to its logits, without the library's own way through the model.

What most models do around their blocks is this: embed a token, make cosines and sines of its
position, run the blocks one after the other, norm, and multiply by the head. The library takes as
long for it as small blocks take themselves. So one pass that goes its way is watched: where each
block was shown what the one before returned, and all bits around them are those that embedding,
rotary positions, norm and head give when they are asked alone, later passes ask them alone. They
stay the model's own modules, or say what those say (tail.py); what calls them is passed over, as
long as nothing about it is exchanged.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from enum import Enum
from itertools import groupby
from typing import Any, NamedTuple

import torch
import torch.nn.modules.module as module_hooks
from torch import nn

from moe_infinity.cache.base import Hierarchy
from moe_infinity.kernels.base import ExpertKernel
from moe_infinity.kernels.blocks import TailCall
from moe_infinity.kernels.native import Kernel
from moe_infinity.model.beginning import Beginning
from moe_infinity.model.blocks import CompiledBlock
from moe_infinity.model.cache_name import CACHE
from moe_infinity.model.float_scores import note_scores
from moe_infinity.model.found_block import Watch
from moe_infinity.model.kv_cache import PreallocatedLayer
from moe_infinity.model.lone_token import by_name, is_lone_token
from moe_infinity.model.own_hooks import has_foreign
from moe_infinity.model.standing import stand_before
from moe_infinity.model.stretch import Place, Stretch
from moe_infinity.model.table import Table
from moe_infinity.model.tail import Tail, speed_up_tail
from moe_infinity.model.turns import Turns, has_moving_rope
from moe_infinity.model.watched_calls import CHANGING, PLAIN, Call, are_alike, watched

_log = logging.getLogger(__name__)


class _Trust(Enum):
    """What is known of the way the library goes through the model."""

    UNKNOWN = 0
    SAME = 1  # as here
    OTHER = 2


class _Around(NamedTuple):
    """A model's parts beside its blocks."""

    decoder: Any
    embed: Any
    rotary: Any
    norm: Any
    head: Any


def speed_up_passes(
    model: Any, kernel: ExpertKernel, compiled: Sequence[CompiledBlock], hierarchy: Hierarchy
) -> WholePass | None:
    """Let passes of one token go from block to block without the library, where they can."""
    around = _around_in(model)
    blocks = list(getattr(around.decoder, "layers", ())) if around else []
    known = hierarchy.known
    if around is None or known is None or not isinstance(kernel, Kernel):
        return None
    by_block = {id(each.found.block): each for each in compiled if each.has_router}
    if not any(id(block) in by_block for block in blocks):
        return None
    tail = None
    if id(blocks[-1]) in by_block:
        tail = speed_up_tail(kernel, around.norm, around.head)
    steps: list[nn.Module | Stretch] = []
    for is_compiled, found in groupby(blocks, lambda block: id(block) in by_block):
        row = list(found)
        if is_compiled:
            end = tail if row[-1] is blocks[-1] else None
            row = [Stretch(kernel, [by_block[id(block)] for block in row], hierarchy, known, end)]
        steps += row
    return WholePass(model, around, blocks, steps, tail)


def _around_in(model: Any) -> _Around | None:
    if model.config.is_encoder_decoder:
        return None
    decoder = model.get_decoder()
    parts = (
        model.get_input_embeddings(),
        getattr(decoder, "rotary_emb", None),
        getattr(decoder, "norm", None),
        model.get_output_embeddings(),
    )
    are_modules = all(isinstance(part, nn.Module) for part in parts)
    # Whatever stands between the two has a part in it: multimodal models count positions there.
    is_child = any(child is decoder for child in model.children())
    return _Around(decoder, *parts) if are_modules and is_child else None


class _ChangedError(Exception):
    """Somebody exchanged a part."""


class _Look:
    """At what a pass passes over, once. Asked while compiled code is at work, for it takes long:
    what that found is only told and kept behind it."""

    def __init__(self, watch: Watch) -> None:
        self._watch = watch
        self._is_done = False

    def __call__(self) -> None:
        if not self._is_done and not self._watch.is_unchanged():
            raise _ChangedError
        self._is_done = True


class WholePass:
    """Stands before a model's ``forward``; what it does not know goes the library's way."""

    def __init__(
        self,
        model: Any,
        around: _Around,
        blocks: Sequence[nn.Module],
        steps: Sequence[nn.Module | Stretch],
        tail: Tail | None,
    ) -> None:
        """steps: the blocks in their order, or stretches of them."""
        self.num_passes = 0  # that went this way
        self._model = model
        self._around = around
        self._table = Table(around.embed)
        self._turns = Turns(around.rotary, has_moving_rope(model.config.get_text_config()))
        self._blocks = blocks
        self._steps = steps
        self._stretches = [step for step in steps if isinstance(step, Stretch)]
        self._tail = tail
        # By whether the library finds positions itself.
        self._trust = {True: _Trust.UNKNOWN, False: _Trust.UNKNOWN}
        self._watch = self._new_watch()
        self._was_changed = False  # in the last one: the next look is before anything is computed
        self._settings: dict[str, Any] = {}  # what blocks are told, the same for every token
        self._kind: type = dict
        self._stock = stand_before(model, self.forward)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        args = by_name(args, kwargs)
        trust = self._trust[kwargs.get("position_ids") is None]
        if args or trust is _Trust.OTHER or not self._can(kwargs):
            return self._stock(*args, **kwargs)
        places = [stretch.place_in(kwargs[CACHE]) for stretch in self._stretches]
        is_early = self._was_changed or trust is _Trust.UNKNOWN
        if None in places or (is_early and not self._watch.is_unchanged()):
            return self._stock(**kwargs)
        if trust is _Trust.UNKNOWN:
            return self._compare(kwargs)
        said = self._run(kwargs, places)
        return self._stock(**kwargs) if said is None else said

    def _can(self, kwargs: dict[str, Any]) -> bool:
        if not is_lone_token(kwargs) or kwargs.get("return_dict") is False:
            return False
        if kwargs.get("use_cache") is False or torch.is_grad_enabled():
            return False
        layers = getattr(kwargs[CACHE], "layers", ())
        if not all(type(layer) is PreallocatedLayer for layer in layers):
            return False  # a window's mask changes as it fills
        mask = kwargs.get("attention_mask")
        return mask is None or bool(mask.all())  # padding is the library's to mask

    def _run(self, kwargs: dict[str, Any], places: list[Place | None]) -> Any:
        """The model's output; None, and nothing was done, where a token cannot go this way."""
        cache = kwargs[CACHE]
        token = self._begin(kwargs, cache.get_seq_length())
        if not self._stretches[0].fits(token):
            return None
        self._was_changed = False
        try:
            x, tail = self._through(token, cache, iter(places), _Look(self._watch))
            self.num_passes += 1
            logits = x if tail else self._end(x)
            said = self._kind(logits=logits, **{CACHE: cache})
            if tail is not None and tail.scores is not None and not self._is_overheard():
                note_scores(said, logits, tail.scores)
            return said
        except _ChangedError:
            self._was_changed = True
            return None
        finally:
            self._stretches[-1].settle(is_told=not self._was_changed)

    def _is_overheard(self) -> bool:
        """Whether somebody is shown what the model says, and may change it unseen."""
        hooks = (self._model._forward_hooks, module_hooks._global_forward_hooks)
        return any(map(has_foreign, hooks))

    def _begin(self, kwargs: dict[str, Any], length: int) -> Beginning:
        """The token of a call, behind ``length`` others."""
        ids, position = kwargs["input_ids"], kwargs.get("position_ids")
        dtype = self._stretches[0].dtype
        return Beginning(self._table, self._turns, ids, position, length, dtype)

    def _through(
        self, token: Beginning, cache: Any, places: Iterator[Place | None], look: _Look
    ) -> tuple[torch.Tensor, TailCall | None]:
        """What the last block says; or with a call of the tail, which is under way, its logits."""
        x: torch.Tensor | None = None
        tail = None
        for step in self._steps:
            if isinstance(step, Stretch):
                place = next(places)
                assert place is not None, "asked for before"
                x, tail = step.run(x, token, cache, place, look)
            else:
                look()
                told = {CACHE: cache, "position_embeddings": token.turns}
                told["position_ids"] = token.position
                x, tail = step(token.x if x is None else x, **self._settings, **told), None
        assert x is not None, "a model has blocks"
        return x, tail

    def _end(self, x: torch.Tensor) -> torch.Tensor:
        """Logits [1, 1, vocabulary] of the last block's [1, 1, H]."""
        logits: torch.Tensor = self._around.head(self._around.norm(x))
        return logits

    def _compare(self, kwargs: dict[str, Any]) -> Any:
        """A pass that goes the library's way, and whether it does what this one would."""
        with watched(self._blocks) as calls:
            said = self._stock(**kwargs)
        try:
            is_same = self._would_say(said, calls, kwargs)
        except Exception:  # parts of other kinds may want anything
            _log.debug("%s: not of the usual kind", type(self._model).__name__, exc_info=True)
            is_same = False
        self._trust[kwargs.get("position_ids") is None] = _Trust.SAME if is_same else _Trust.OTHER
        if is_same:
            first = calls[0].kwargs
            self._settings = {name: first[name] for name in first.keys() - CHANGING}
            self._kind = type(said)
        return said

    def _would_say(self, said: Any, calls: list[Call], kwargs: dict[str, Any]) -> bool:
        if len(calls) != len(self._blocks) or not are_alike(calls):
            return False
        values = dict(said) if isinstance(said, dict) else {}
        if values.keys() != {"logits", CACHE}:
            return False
        cache, first = kwargs[CACHE], calls[0]
        length = cache.get_seq_length() - 1  # as it was
        token = self._begin(kwargs, length)
        asked, last = self._end(calls[-1].out), calls[-1].out.contiguous()
        return (
            values[CACHE] is first.kwargs[CACHE] is cache
            and _are_same_bits(token.x, first.args[0])
            and _are_same_bits(token.position, first.kwargs["position_ids"])
            and all(map(_are_same_bits, token.turns, first.kwargs["position_embeddings"]))
            and _are_same_bits(asked, values["logits"])
            and (self._tail is None or _are_same_bits(asked, self._tail.of(last)))
        )

    def _new_watch(self) -> Watch:
        """Over everything that is passed over, and the values that say how the library goes."""
        compiled = [block for stretch in self._stretches for block in stretch.blocks]
        rotary, table = self._turns.bypassed, self._table.bypassed
        ends = [] if self._tail is None else [self._around.norm, self._around.head]
        bypassed = [self._around.decoder, self._around.decoder.layers, *table, *rotary, *ends]
        for block in compiled:
            bypassed += [block.found.block, *block.found.bypassed]
        configs = (self._model.config, self._model.config.get_text_config())
        settings = {id(each): each.__dict__ for each in configs}
        values = [
            (each, name)
            for each in settings.values()
            for name, value in each.items()
            if isinstance(value, PLAIN)
        ]
        values += [(each._buffers, name) for each in rotary for name in each._buffers]
        values += [value for block in compiled for value in block.found.values]
        return Watch(bypassed, [self._model], values)


def _are_same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    """NaN is what it is."""
    if one.dtype is not other.dtype or one.shape != other.shape:
        return False
    return torch.equal(*(each.contiguous().view(torch.uint8) for each in (one, other)))
