"""A decoder block that the compiled code can run, for as long as it is what it was."""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter, is_
from typing import Any

import torch
import torch.nn.modules.module as module_hooks
from torch import nn

from moe_infinity.kernels.blocks import BlockSpec
from moe_infinity.kernels.native import native
from moe_infinity.model.own_hooks import has_foreign

_ATTENTION = "_attn_implementation_internal"  # in a config: which function attends
_FORWARD = attrgetter("forward")
_SAYS_NOTHING = {"_is_hf_initialized"}


class Watch:
    """Modules whose calls somebody passes over, for as long as they are what they were.

    Their parts, weights and settings have to stay, and nobody else may watch them. holders: whose
    parts have to stay as well, though they are called. values: others that have to stay, by the
    dictionary and the name they are kept under.
    """

    def __init__(
        self,
        bypassed: Sequence[nn.Module],
        holders: Sequence[nn.Module],
        values: Sequence[tuple[dict[str, Any], str]],
    ) -> None:
        # Where parts, weights and settings are kept: what is exchanged is seen at the next call.
        registries: list[dict[str, Any]] = [
            r for m in (*holders, *bypassed) for r in (m._modules, m._parameters)
        ]
        kept = [(r, name, part) for r in registries for name, part in r.items()]
        kept += [
            (m.__dict__, name, value)
            for m in bypassed
            if type(m) is not nn.Linear  # which has nothing beside its weights
            for name, value in m.__dict__.items()
            if isinstance(value, (bool, int, float, str)) and name not in _SAYS_NOTHING
        ]
        others = [*values, *((m.__dict__, "forward") for m in bypassed)]
        kept += [(owner, name, owner.get(name)) for owner, name in others]
        self._registries, self._names, self._parts = zip(*kept, strict=True)
        self._kinds = list({type(m) for m in bypassed})
        self._functions = [kind.forward for kind in self._kinds]
        self._weights = [part for part in self._parts if isinstance(part, torch.Tensor)]
        self._addresses = [weight.data_ptr() for weight in self._weights]
        hooks = [h for m in bypassed for h in (m._forward_hooks, m._forward_pre_hooks)]
        hooks += [module_hooks._global_forward_hooks, module_hooks._global_forward_pre_hooks]
        self._hooks = tuple(hooks)

    def is_unchanged(self) -> bool:
        assert native is not None, "who has no compiled code passes over nothing"
        return bool(
            native.are_kept(self._registries, self._names, self._parts)
            and all(map(is_, map(_FORWARD, self._kinds), self._functions))
            and list(map(torch.Tensor.data_ptr, self._weights)) == self._addresses
            and not any(map(has_foreign, native.filled(self._hooks)))
        )


class Found:
    """A block of the usual kind. layer_index: of its keys and values in the cache; bypassed: its
    modules that nobody calls where the compiled code does their work; values: as Watch's."""

    def __init__(self, block: Any, mlp: Any, layer_index: int, spec: BlockSpec) -> None:
        self.block = block
        self.mlp = mlp
        self.layer_index = layer_index
        self.spec = spec
        called = set() if spec.router else set(mlp.modules())
        self.bypassed = [m for m in block.modules() if m is not block and m not in called]
        self.values = [(block.self_attn.config.__dict__, _ATTENTION)]
        self._watch = Watch(self.bypassed, [block], self.values)

    def is_unchanged(self) -> bool:
        """Whether it is what it was found to be."""
        return self._watch.is_unchanged()
