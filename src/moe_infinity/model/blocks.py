"""Decoder blocks of the usual kind, for one token, by the compiled kernels.

torch takes about forty calls, each of several microseconds, for what such a block does beside its
experts; here it is one. Which blocks are of the usual kind: block_kind.py.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from moe_infinity.cache.base import NOTED, Compute
from moe_infinity.kernels import native
from moe_infinity.kernels.base import ExpertKernel, Views
from moe_infinity.kernels.blocks import Choice, pack_sum, pack_token
from moe_infinity.kernels.stages import Stages
from moe_infinity.model.block_kind import recognise
from moe_infinity.model.cache_name import CACHE
from moe_infinity.model.experts import ExpertsLayer
from moe_infinity.model.found_block import Found
from moe_infinity.model.kv_cache import one_row_layer
from moe_infinity.model.routers import block_around
from moe_infinity.tracing.event import Event
from moe_infinity.types import ExpertKey


def speed_up_blocks(
    model: Any, kernel: ExpertKernel, layers: Sequence[ExpertsLayer], modules: Sequence[nn.Module]
) -> list[CompiledBlock]:
    """Let a compiled kernel do the blocks around these experts that it can do; returns those."""
    if not isinstance(kernel, native.Kernel):
        return []
    names = {id(module): name for name, module in model.named_modules()}
    compiled = []
    for layer, module in zip(layers, modules, strict=True):
        block = block_around(model, names[id(module)])
        found = recognise(model, kernel, block, module)
        if found is None:
            continue
        router = found.spec.router
        if router is None or len(router.weight) == layer.num_experts:
            compiled.append(CompiledBlock(kernel, found, layer))
            block.forward = compiled[-1].forward
    return compiled


class CompiledBlock:
    """One block, for as long as its parts are those it had.

    Of the token that was computed last: h and normed [1, H], what its router chose, and what the
    chosen experts said, outs [K, H].
    """

    def __init__(self, kernel: native.Kernel, found: Found, experts: ExpertsLayer) -> None:
        self.found = found
        self.experts = experts
        self._kernel = kernel
        self._stock: Callable[..., torch.Tensor] = found.block.forward
        self.packed = found.spec.pack()
        norm = found.spec.before.weight
        self._dtype, self._hidden_size = norm.dtype, norm.numel()
        self.h = torch.empty(1, self._hidden_size, dtype=self._dtype)
        self.normed = torch.empty_like(self.h)
        router = found.spec.router
        top_k = router.top_k if router else 0
        self.choice = Choice(experts.num_experts, top_k)
        self.outs = torch.empty(top_k, self._hidden_size, dtype=self._dtype)
        self.has_router = router is not None
        self.rounds = router is not None and router.rounds
        # Who wants to know how experts are computed: [E] of whom that is known, and where to.
        self._notes: tuple[NDArray[np.uint8], Stages, int] | None = None
        self.num_calls = 0  # that the compiled code took

    def note_to(self, stages: Stages, stage: int, known: NDArray[np.uint8]) -> None:
        """Tell from now on how experts are computed that are not NOTED in ``known`` [E]."""
        self._notes = (known, stages, stage)

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """[1, 1, H] -> [1, 1, H] where the call is of the usual kind too, else as it was."""
        index, caches = self.found.layer_index, kwargs.get(CACHE)
        cache = one_row_layer(caches, index, self._dtype)
        if args or cache is None or not self._fits(hidden_states, kwargs):
            return self._stock(hidden_states, *args, **kwargs)
        place = cache.extend(1, cache.keys, cache.values)
        self.num_calls += 1
        turns = kwargs["position_embeddings"]
        if not self.has_router:
            return self._around(hidden_states, turns, place)
        self.attend(hidden_states, turns, place, self.normed)
        out = torch.empty_like(hidden_states, memory_format=torch.contiguous_format)
        self.finish(out)
        return out

    def _around(
        self,
        x: torch.Tensor,
        turns: tuple[torch.Tensor, torch.Tensor],
        place: tuple[torch.Tensor, torch.Tensor, int],
    ) -> torch.Tensor:
        """A block whose experts the model's own module asks. It may keep what it is shown."""
        normed = torch.empty_like(self.normed)
        self.attend(x, turns, place, normed)
        mlp: torch.Tensor = self.found.mlp(normed[None])
        return self.h + mlp

    def attend(
        self,
        x: torch.Tensor,
        turns: tuple[torch.Tensor, torch.Tensor],
        place: tuple[torch.Tensor, torch.Tensor, int],
        normed: torch.Tensor,
    ) -> None:
        """Up to the choice of experts for x [1, 1, H]: h, normed and the choice. turns: cosines
        and sines; place: the memory of all keys and all values, and where the token's own go."""
        keys, values, position = place
        x = x.contiguous()
        token = pack_token(x, turns, (keys, values), position, self.h, normed, self.choice)
        self._kernel.attend(self.packed, token)

    def finish(self, out: torch.Tensor) -> None:
        """Ask the chosen experts, and put the block's result into out [1, 1, H]."""
        ids, weights = self._chosen()
        self.outs.zero_()  # a miss rule may leave some out
        compute = self._compute_for(ids, frozenset())
        self.experts.run_token(self.normed, ids, weights, self.choice.logits, compute, self.outs)
        self._sum(out)

    def finish_part(self, out: torch.Tensor, foreseen: NDArray[np.float32] | None) -> None:
        """The same where other threads compute those that are NOTED already, each into its row of
        self.outs. foreseen: [1, D, E] what later routers say to the input of this one's."""
        assert self._notes is not None, "nobody has noted any"
        ids, weights = self._chosen()
        begun = frozenset(e for e in ids[0].tolist() if self._notes[0][e] == NOTED)
        self.experts.learn_input(self.normed)
        compute = self._compute_for(ids, begun)
        self.experts.run_chosen(self.normed, ids, weights, foreseen, compute, self.outs)
        self._sum(out)

    def _sum(self, out: torch.Tensor) -> None:
        self._kernel.sum(pack_sum(self.outs, self.choice.weights, self.rounds, self.h, out))

    def told(self) -> Event:
        """The event of a token whose experts were asked already."""
        self.experts.learn_input(self.normed)
        return self.experts.told(*self._chosen())

    def _chosen(self) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Events outlive the call."""
        ids, weights = self.choice.seen
        return ids.copy(), weights.copy()

    def _compute_for(self, ids: NDArray[np.int64], begun: Collection[int]) -> Compute:
        """Computes experts of ids [1, K] for the token, each into its row of self.outs; begun:
        those that other threads compute."""
        kernel, places = self._kernel, {expert: k for k, expert in enumerate(ids[0].tolist())}

        def compute(keys: list[ExpertKey], views: list[Views]) -> float:
            spent_s = kernel.settle()
            start = time.perf_counter()
            left = [
                (key, each)
                for key, each in zip(keys, views, strict=True)
                if key.expert not in begun
            ]
            if left:
                own = [each for _, each in left], self.normed, self.outs
                kernel.run_token(self.experts.math, *own, [places[key.expert] for key, _ in left])
            spent_s += time.perf_counter() - start
            if self._notes is not None:
                self._note(keys, views, self.normed, *self._notes)
            return spent_s

        return compute

    @property
    def chosen_keys(self) -> list[ExpertKey]:
        """The experts that the router chose last, the likeliest first."""
        ids = self.choice.seen[0][0].tolist()
        return [ExpertKey(self.experts.layer, expert) for expert in ids]

    def note_chosen(self) -> None:
        """Tell how the experts are computed that the router chose last, as far as they are here."""
        assert self._notes is not None, "nobody wants to know"
        keys, views = self.experts.hierarchy.views_here(self.chosen_keys)
        self._note(keys, views, self.normed, *self._notes)

    def _note(
        self,
        keys: list[ExpertKey],
        views: list[Views],
        x: torch.Tensor,
        known: NDArray[np.uint8],
        stages: Stages,
        stage: int,
    ) -> None:
        for key, each in zip(keys, views, strict=True):
            if known[key.expert] == NOTED:
                continue
            call = self._kernel.call_on_token(self.experts.math, each, x)
            if call is not None:
                stages.note(stage, key.expert, call)
                known[key.expert] = NOTED

    def _fits(self, x: torch.Tensor, kwargs: dict[str, Any]) -> bool:
        if kwargs.get("attention_mask") is not None or torch.is_grad_enabled():
            return False
        turns: Any = kwargs.get("position_embeddings")  # asked for behind the number of tokens
        return self.takes(x, turns) and self.found.is_unchanged()

    def takes(self, x: torch.Tensor, turns: tuple[torch.Tensor, torch.Tensor]) -> bool:
        """Whether a token [1, 1, H], cosines and sines are as the compiled code reads them."""
        if x.numel() != self._hidden_size or x.dtype is not self._dtype or not x.is_cpu:
            return False
        cos, sin = turns
        return cos.dtype is self._dtype and cos.is_contiguous() and sin.is_contiguous()
