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
from moe_infinity.model.experts import ExpertsLayer
from moe_infinity.model.found_block import Found
from moe_infinity.model.kv_cache import PreallocatedLayer
from moe_infinity.model.routers import block_around
from moe_infinity.types import ExpertKey


def speed_up_blocks(
    model: Any, kernel: ExpertKernel, layers: Sequence[ExpertsLayer], modules: Sequence[nn.Module]
) -> None:
    """Let a compiled kernel do the blocks around these experts that it can do."""
    if not isinstance(kernel, native.Kernel):
        return
    names = {id(module): name for name, module in model.named_modules()}
    for layer, module in zip(layers, modules, strict=True):
        block = block_around(model, names[id(module)])
        found = recognise(model, kernel, block, module)
        if found is None:
            continue
        router = found.spec.router
        if router is None or len(router.weight) == layer.num_experts:
            block.forward = CompiledBlock(kernel, found, layer).forward


class CompiledBlock:
    """One block, for as long as its parts are those it had."""

    def __init__(self, kernel: native.Kernel, found: Found, experts: ExpertsLayer) -> None:
        self._kernel = kernel
        self._found = found
        self._experts = experts
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
        self.has_router = router is not None
        self.num_calls = 0  # that the compiled code took

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """[1, 1, H] -> [1, 1, H] where the call is of the usual kind too, else as it was."""
        cache = self._cache_of(kwargs)
        if args or cache is None or not self._fits(hidden_states, kwargs):
            return self._stock(hidden_states, *args, **kwargs)
        keys, values, position = cache.extend(1, cache.keys, cache.values)
        router = self._found.spec.router
        x = hidden_states.contiguous()
        # The model's own modules may keep what they are shown.
        h, normed = self._h, self._normed if router else torch.empty_like(self._normed)
        token = pack_token(
            x,
            kwargs["position_embeddings"],
            (keys, values),
            position,
            h,
            normed,
            self._choice,
        )
        self.num_calls += 1
        self._kernel.attend(self._packed, token)
        if router is None:
            mlp: torch.Tensor = self._found.mlp(normed[None])
            return h + mlp
        outs = self._ask_experts(normed)
        out = torch.empty_like(hidden_states, memory_format=torch.contiguous_format)
        self._kernel.sum(pack_sum(outs, self._choice.weights, router.rounds, h, out))
        return out

    def _ask_experts(self, x: torch.Tensor) -> torch.Tensor:
        """What each chosen expert says to x [1, H]: [K, H]."""
        experts, kernel, outs = self._experts, self._kernel, self._outs
        ids, weights = (each.copy() for each in self._choice.seen)  # events outlive the call
        places = {expert: place for place, expert in enumerate(ids[0].tolist())}
        outs.zero_()  # a miss rule may leave some out

        def compute(keys: list[ExpertKey], views: list[Views]) -> None:
            kernel.run_token(experts.math, views, x, outs, [places[key.expert] for key in keys])

        experts.run_token(x, ids, weights, self._choice.logits, compute)
        return outs

    def _cache_of(self, kwargs: dict[str, Any]) -> PreallocatedLayer | None:
        """The layer's keys and values if the compiled code can write there."""
        layers = getattr(kwargs.get("past_key_values"), "layers", ())
        if len(layers) <= self._found.layer_index:
            return None
        layer = layers[self._found.layer_index]
        if type(layer) is not PreallocatedLayer or not layer.is_initialized:
            return None
        is_one_row = layer.keys.dim() == 4 and layer.keys.shape[0] == 1
        return layer if is_one_row and layer.keys.dtype is self._dtype else None

    def _fits(self, x: torch.Tensor, kwargs: dict[str, Any]) -> bool:
        if x.numel() != self._hidden_size or x.dtype is not self._dtype or not x.is_cpu:
            return False
        if kwargs.get("attention_mask") is not None or torch.is_grad_enabled():
            return False
        cos, sin = kwargs["position_embeddings"]
        if cos.dtype is not self._dtype or not (cos.is_contiguous() and sin.is_contiguous()):
            return False
        return self._found.is_unchanged()
