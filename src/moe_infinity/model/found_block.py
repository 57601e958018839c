"""A decoder block that the compiled code can run, for as long as it is what it was."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.modules.module as module_hooks

from moe_infinity.kernels.blocks import BlockSpec
from moe_infinity.model.routers import has_foreign

_ATTENTION = "_attn_implementation_internal"  # in a config: which function attends


class Found:
    """A block of the usual kind. layer_index: of its keys and values in the cache."""

    def __init__(self, block: Any, mlp: Any, layer_index: int, spec: BlockSpec) -> None:
        self.block = block
        self.mlp = mlp
        self.layer_index = layer_index
        self.spec = spec
        kept = set() if spec.router else set(mlp.modules())  # the compiled code calls it
        bypassed = [m for m in block.modules() if m is not block and m not in kept]
        # Where parts, weights and settings are kept: what is exchanged is seen at the next call.
        registries = [r for m in (block, *bypassed) for r in (m._modules, m._parameters)]
        self._kept = [(r, name, part) for r in registries for name, part in r.items()]
        self._kept += [
            (m.__dict__, name, value)
            for m in bypassed
            for name, value in m.__dict__.items()
            if isinstance(value, (bool, int, float, str))
        ]
        self._kept += [(m.__dict__, "forward", m.__dict__.get("forward")) for m in bypassed]
        settings = block.self_attn.config.__dict__
        self._kept.append((settings, _ATTENTION, settings.get(_ATTENTION)))
        self._functions = [(type(m), type(m).forward) for m in bypassed]
        weights = (part for _, _, part in self._kept if isinstance(part, torch.Tensor))
        self._addresses = [(weight, weight.data_ptr()) for weight in weights]
        self._hooks = [h for m in bypassed for h in (m._forward_hooks, m._forward_pre_hooks)]
        self._hooks += [module_hooks._global_forward_hooks, module_hooks._global_forward_pre_hooks]

    def is_unchanged(self) -> bool:
        """Whether its parts, weights and settings are those it was found with, and nobody else
        watches its modules."""
        for registry, name, part in self._kept:
            if registry.get(name) is not part:
                return False
        for kind, forward in self._functions:
            if kind.forward is not forward:
                return False
        for weight, address in self._addresses:
            if weight.data_ptr() != address:
                return False
        return not any(hooks and has_foreign(hooks) for hooks in self._hooks)
