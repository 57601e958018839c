"""Decoder blocks of the usual kind, for one token, by the compiled kernels.

torch takes about forty calls, each of several microseconds, for what such a block does beside its
experts; here it is one. Which blocks are of the usual kind: block_kind.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from moe_infinity.kernels import native
from moe_infinity.kernels.base import ExpertKernel, Views
from moe_infinity.kernels.blocks import Choice, pack_sum, pack_token
from moe_infinity.model.block_kind import recognise
from moe_infinity.model.chain import Chain, Member, Reached
from moe_infinity.model.experts import ExpertsLayer
from moe_infinity.model.found_block import Found
from moe_infinity.model.kv_cache import one_row_layer
from moe_infinity.model.routers import block_around
from moe_infinity.types import ExpertKey


def speed_up_blocks(
    model: Any, kernel: ExpertKernel, layers: Sequence[ExpertsLayer], modules: Sequence[nn.Module]
) -> Chain | None:
    """Let a compiled kernel do the blocks around these experts that it can do. Returns the chain
    of those that can be run ahead."""
    if not isinstance(kernel, native.Kernel):
        return None
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
    return _chain_of(kernel, [block for block in compiled if block.has_router])


def _chain_of(kernel: native.Kernel, blocks: Sequence[CompiledBlock]) -> Chain | None:
    if len(blocks) < 2:
        return None
    hierarchy = blocks[0].experts.hierarchy
    if hierarchy.known is None:
        return None
    chain = Chain(kernel, [block.as_member() for block in blocks], hierarchy, hierarchy.known)
    for place, block in enumerate(blocks):
        block.join(chain, place)
    return chain


class CompiledBlock:
    """One block, for as long as its parts are those it had."""

    def __init__(self, kernel: native.Kernel, found: Found, experts: ExpertsLayer) -> None:
        self.experts = experts
        self._kernel = kernel
        self._found = found
        self._stock: Callable[..., torch.Tensor] = found.block.forward
        self._packed = found.spec.pack()
        norm = found.spec.before.weight
        self._dtype, self._hidden_size = norm.dtype, norm.numel()
        self._h = torch.empty(1, self._hidden_size, dtype=self._dtype)
        self._normed = torch.empty_like(self._h)
        router = found.spec.router
        top_k = router.top_k if router else 0
        self._choice = Choice(experts.num_experts, top_k)
        self._outs = torch.empty(top_k, self._hidden_size, dtype=self._dtype)
        self._chain: Chain | None = None
        self._place = 0  # in the chain
        self.has_router = router is not None
        self.num_calls = 0  # that the compiled code took

    def as_member(self) -> Member:
        router = self._found.spec.router
        return Member(
            self.experts.layer,
            self._found.layer_index,
            self.experts.num_experts,
            self._packed,
            self._choice,
            (self._h, self._normed, self._outs),
            router is not None and router.rounds,
        )

    def join(self, chain: Chain, place: int) -> None:
        self._chain, self._place = chain, place

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """[1, 1, H] -> [1, 1, H] where the call is of the usual kind too, else as it was."""
        index, caches = self._found.layer_index, kwargs.get("past_key_values")
        cache = one_row_layer(caches, index, self._dtype)
        if args or cache is None or not self._fits(hidden_states, kwargs):
            if self._chain is not None and hidden_states.numel() == self._hidden_size:
                self._chain.left(self._place)
            return self._stock(hidden_states, *args, **kwargs)
        reached = Reached.NOTHING
        if self._chain is not None:
            reached = self._chain.reach(self._place, hidden_states, kwargs)
        place = cache.extend(1, cache.keys, cache.values)
        self.num_calls += 1
        if self._found.spec.router is None:
            return self._around(hidden_states, kwargs, place)
        if reached is Reached.NOTHING:
            self._attend(hidden_states, kwargs, place, self._normed)
        out = self._finish(hidden_states, reached is Reached.WHOLE)
        if self._chain is not None:
            self._chain.returned(self._place, out, kwargs)
        return out

    def _around(
        self, x: torch.Tensor, kwargs: dict[str, Any], place: tuple[torch.Tensor, torch.Tensor, int]
    ) -> torch.Tensor:
        """A block whose experts the model's own module asks. It may keep what it is shown."""
        normed = torch.empty_like(self._normed)
        self._attend(x, kwargs, place, normed)
        mlp: torch.Tensor = self._found.mlp(normed[None])
        return self._h + mlp

    def _attend(
        self,
        x: torch.Tensor,
        kwargs: dict[str, Any],
        place: tuple[torch.Tensor, torch.Tensor, int],
        normed: torch.Tensor,
    ) -> None:
        """Up to the choice of experts: self._h, normed and self._choice."""
        keys, values, position = place
        x = x.contiguous()
        positions = kwargs["position_embeddings"]
        token = pack_token(x, positions, (keys, values), position, self._h, normed, self._choice)
        self._kernel.attend(self._packed, token)

    def _finish(self, x: torch.Tensor, is_done: bool) -> torch.Tensor:
        """Tell the cache which experts were chosen; ask them, unless that is done, and add up."""
        router, chain = self._found.spec.router, self._chain
        assert router is not None, "who has no router is asked otherwise"
        if is_done and chain is not None:
            event = self.experts.told_later(*(each.copy() for each in self._choice.seen))
            if event is None:
                self._ask_experts(self._normed, chain.experts_s(self._place))
            else:
                chain.tell_later(self._place, event)
            return chain.output(self._place)
        self._ask_experts(self._normed)
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
        weights = self._choice.weights
        self._kernel.sum(pack_sum(self._outs, weights, router.rounds, self._h, out))
        return out

    def _ask_experts(self, x: torch.Tensor, spent_s: float | None = None) -> None:
        """What each chosen expert says to x [1, H], to self._outs. spent_s: it is there already,
        and took so long."""
        experts, kernel, outs = self.experts, self._kernel, self._outs
        ids, weights = (each.copy() for each in self._choice.seen)  # events outlive the call
        places = {expert: place for place, expert in enumerate(ids[0].tolist())}
        spent = None if spent_s is None else iter((spent_s,))  # told once, however often asked
        if spent is None:
            outs.zero_()  # a miss rule may leave some out

        def compute(keys: list[ExpertKey], views: list[Views]) -> float | None:
            if spent is not None:
                return next(spent, 0.0)
            kernel.run_token(experts.math, views, x, outs, [places[k.expert] for k in keys])
            self._note(keys, views, x)
            return None

        experts.run_token(x, ids, weights, self._choice.logits, compute, outs)

    def _note(self, keys: list[ExpertKey], views: list[Views], x: torch.Tensor) -> None:
        for key, each in zip(keys, views, strict=True):
            if self._chain is None or self._chain.is_noted(self._place, key.expert):
                continue
            call = self._kernel.call_on_token(self.experts.math, each, x)
            if call is not None:
                self._chain.note(self._place, key.expert, call)

    def _fits(self, x: torch.Tensor, kwargs: dict[str, Any]) -> bool:
        if x.numel() != self._hidden_size or x.dtype is not self._dtype or not x.is_cpu:
            return False
        if kwargs.get("attention_mask") is not None or torch.is_grad_enabled():
            return False
        cos, sin = kwargs["position_embeddings"]
        if cos.dtype is not self._dtype or not (cos.is_contiguous() and sin.is_contiguous()):
            return False
        return self._found.is_unchanged()
