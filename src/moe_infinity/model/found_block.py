"""A decoder block that the compiled code can run, for as long as it is what it was."""

from __future__ import annotations

from operator import attrgetter, is_
from typing import Any

import torch
import torch.nn.modules.module as module_hooks

from moe_infinity.kernels.blocks import BlockSpec
from moe_infinity.model.routers import has_foreign

_ATTENTION = "_attn_implementation_internal"  # in a config: which function attends
_FORWARD = attrgetter("forward")
_SAYS_NOTHING = {"in_features", "out_features"}  # beside the weights


class Found:
    """A block of the usual kind. layer_index: of its keys and values in the cache."""

    def __init__(self, block: Any, mlp: Any, layer_index: int, spec: BlockSpec) -> None:
        self.block = block
        self.mlp = mlp
        self.layer_index = layer_index
        self.spec = spec
        called = set() if spec.router else set(mlp.modules())  # by the compiled code
        bypassed = [m for m in block.modules() if m is not block and m not in called]
        # Where parts, weights and settings are kept: what is exchanged is seen at the next call.
        registries = [r for m in (block, *bypassed) for r in (m._modules, m._parameters)]
        kept = [(r, name, part) for r in registries for name, part in r.items()]
        kept += [
            (m.__dict__, name, value)
            for m in bypassed
            for name, value in m.__dict__.items()
            if isinstance(value, (bool, int, float, str)) and name not in _SAYS_NOTHING
        ]
        kept += [(m.__dict__, "forward", m.__dict__.get("forward")) for m in bypassed]
        settings = block.self_attn.config.__dict__
        kept.append((settings, _ATTENTION, settings.get(_ATTENTION)))
        self._registries, self._names, self._parts = zip(*kept, strict=True)
        self._kinds = list({type(m) for m in bypassed})
        self._functions = [kind.forward for kind in self._kinds]
        self._weights = [part for part in self._parts if isinstance(part, torch.Tensor)]
        self._addresses = [weight.data_ptr() for weight in self._weights]
        self._hooks = [h for m in bypassed for h in (m._forward_hooks, m._forward_pre_hooks)]
        self._hooks += [module_hooks._global_forward_hooks, module_hooks._global_forward_pre_hooks]

    def is_unchanged(self) -> bool:
        """Whether its parts, weights and settings are those it was found with, and nobody else
        watches its modules."""
        now = map(dict.get, self._registries, self._names)  # in C: this is asked at every call
        return (
            all(map(is_, now, self._parts))
            and all(map(is_, map(_FORWARD, self._kinds), self._functions))
            and list(map(torch.Tensor.data_ptr, self._weights)) == self._addresses
            and not any(hooks and has_foreign(hooks) for hooks in self._hooks)
        )
