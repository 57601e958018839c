"""Latent attention (DeepSeek-V2, arXiv 2405.04434) of one token without expanding the whole cache.

The library caches what keys and values are made of, and makes all of them again for each token: at
a depth of thousands of tokens that is most of the work. Here the lone token of a decode pass meets
the latents as they are. Passes of several tokens, and rows with padding, go the library's way.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from moe_infinity.kernels import native
from moe_infinity.kernels.base import ExpertKernel
from moe_infinity.kernels.described import TYPES
from moe_infinity.model.packed_linears import packed_of

_NAME = "moe_infinity_latents"
_LATENTS = "_moe_infinity_latents"
_STOCK = "sdpa"
# What such attention is made of. Whoever has more (an index of tokens to attend to) asks its config
# what function attends, and goes by it.
_PARTS = {"q_proj", "q_a_proj", "q_a_layernorm", "q_b_proj", "o_proj"}
_PARTS |= {"kv_a_proj_with_mqa", "kv_a_layernorm", "kv_b_proj"}


def is_latent(module: nn.Module) -> bool:
    """Whether a module is attention that keeps latents in its cache, as the library's is."""
    linear = getattr(module, "kv_b_proj", None)
    is_known = {name for name, _ in module.named_children()} <= _PARTS
    return (
        is_known and callable(getattr(module, "expand_kv", None)) and isinstance(linear, nn.Linear)
    )


def absorbed_weights(model: nn.Module) -> set[str]:
    """Names of weights that are computed with here: they have to be numbers."""
    found = (name for name, module in model.named_modules() if is_latent(module))
    return {f"{name}.kv_b_proj.weight" for name in found}


def speed_up_latents(model: nn.Module, kernel: ExpertKernel) -> None:
    """Let a compiled ``kernel`` do this attention where it can."""
    if not isinstance(kernel, native.Kernel):
        return
    ALL_ATTENTION_FUNCTIONS.register(_NAME, _attend)
    for module in model.modules():
        if is_latent(module) and _can(module):
            _Absorbed(module, kernel)


def _can(module: Any) -> bool:
    """One weight of all heads, of the sizes the module says, for the library's usual function."""
    linear, config = module.kv_b_proj, module.config
    sizes = (getattr(module, n, None) for n in ("num_heads", "qk_nope_head_dim", "v_head_dim"))
    heads, plain, values = (int(each or 0) for each in sizes)
    fits = linear.weight.shape[0] == heads * (plain + values) > 0 and linear.bias is None
    is_plain = packed_of(linear) is None and linear.weight.dtype in TYPES
    return fits and is_plain and config._attn_implementation == _STOCK


class _Absorbed:
    """Stands between one attention module and the library's attention function."""

    def __init__(self, module: Any, kernel: native.Kernel) -> None:
        self._module, self._kernel = module, kernel
        self._expand = module.expand_kv
        self._heads, self._size = module.num_heads, module.qk_nope_head_dim + module.v_head_dim
        self._is_lone = False
        module.config = copy.copy(module.config)  # this module alone asks for another function
        module.config.__dict__["_attn_implementation_internal"] = _NAME
        module.expand_kv = self.expand
        module.register_forward_pre_hook(self._begin, with_kwargs=True)
        setattr(module, _LATENTS, self)

    def _begin(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        self._is_lone = hidden.shape[:2] == (1, 1) and hidden.dtype in TYPES
        self._is_lone = self._is_lone and not torch.is_grad_enabled()

    def expand(
        self, latents: torch.Tensor, rotary: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What the module takes for keys and values."""
        if self._is_lone:
            return latents, rotary
        expanded: tuple[torch.Tensor, torch.Tensor] = self._expand(latents, rotary)
        return expanded

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        **options: Any,
    ) -> Any:
        stock = ALL_ATTENTION_FUNCTIONS[_STOCK]
        if not self._is_lone:
            return stock(self._module, query, key, value, mask, **options)
        weight = self._module.kv_b_proj.weight
        same = all(x.dtype is weight.dtype for x in (query, key, value))
        if mask is not None or not same:
            return stock(self._module, query, *self._expand(key, value), mask, **options)
        scaling = options.get("scaling") or query.shape[-1] ** -0.5
        found = self._kernel.attend_latents(
            query[0, :, 0].contiguous(),
            weight.view(self._heads, self._size, -1),
            key[0, 0].contiguous(),
            value[0, 0].contiguous(),
            scaling,
        )
        return found[None, None], None


def _attend(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any, **kw: Any
) -> Any:
    absorbed: _Absorbed = getattr(module, _LATENTS)
    return absorbed.attend(query, key, value, mask, **kw)
