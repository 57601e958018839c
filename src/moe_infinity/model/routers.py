"""The model's own routers: what they say, and what later ones would say to an earlier input."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.utils.hooks import RemovableHandle

from moe_infinity.errors import ConfigError
from moe_infinity.predictors.base import Foresight, ForesightMode

_MEMORY = 0.02  # weight of the newest token in the mean change between two layers' router inputs


@dataclass(frozen=True)
class Wishes:
    """What someone asked to be shown beside the routing."""

    router_logits: bool = False
    router_input: bool = False
    embeddings: bool = False
    foresight: tuple[Foresight, ...] = ()

    @property
    def needs_routers(self) -> bool:
        return self.router_logits or bool(self.foresight)

    def __or__(self, other: Wishes) -> Wishes:
        return Wishes(
            self.router_logits or other.router_logits,
            self.router_input or other.router_input,
            self.embeddings or other.embeddings,
            tuple(dict.fromkeys(self.foresight + other.foresight)),
        )


class RouterTaps:
    """Listens to the routers of a model's MoE layers and asks later ones early.

    A router is what lies beside a layer's experts and has one row of weights per expert. T: tokens,
    D: depth, E: experts.
    """

    def __init__(self, model: nn.Module, names: list[str], num_experts: list[int]) -> None:
        self._routers = [
            _router_beside(model, name, count)
            for name, count in zip(names, num_experts, strict=True)
        ]
        self._blocks = [_block_around(model, name) for name in names]
        self._widest = max(num_experts)
        self._logits: list[torch.Tensor | None] = [None] * len(names)
        self._norms: list[nn.Module | None] = [None] * len(names)
        self._changes: dict[tuple[int, int], torch.Tensor] = {}  # (layer, later layer): mean
        self._inputs: list[torch.Tensor | None] = [None] * len(names)
        self._handles: list[RemovableHandle] = [
            router.register_forward_hook(self._keep(layer))
            for layer, router in enumerate(self._routers)
        ]

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()

    def logits(self, layer: int) -> torch.Tensor:
        """[T, E] what the layer's router last said, before softmax."""
        kept = self._logits[layer]
        assert kept is not None, f"the router of MoE layer {layer} did not run"
        return kept

    def see_input(self, layer: int, x: torch.Tensor) -> None:
        """The router's input [T, H] of one decode token: learn the mean change between layers."""
        self._inputs[layer] = x
        for (before, later), mean in list(self._changes.items()):
            source = self._inputs[before]
            if later == layer and source is not None and source.shape == x.shape:
                mean += _MEMORY * ((x - source).float().mean(dim=0) - mean)

    def foresee(
        self, mode: ForesightMode, layer: int, x: torch.Tensor, depth: int
    ) -> NDArray[np.float32]:
        """[T, D, E] what the routers of the next ``depth`` layers say to x [T, H].

        x: the layer's router input, or for next_norm its output. Layers that do not exist say
        nothing: -inf.
        """
        said = np.full((len(x), depth, self._widest), -np.inf, dtype=np.float32)
        for distance in range(min(depth, len(self._routers) - layer - 1)):
            later = layer + 1 + distance
            shown = self._shown(mode, layer, later, x)
            scores = _logits_of(self._routers[later].forward(shown), self._routers[later])
            said[:, distance, : scores.shape[-1]] = as_recorded(scores)
        return said

    def learn_norms(self, layer: int, x: torch.Tensor) -> None:
        """Find which norm of the layer's block made the router's input ``x``, once."""
        if self._norms[layer] is not None:
            return
        for module in self._blocks[layer].modules():
            if getattr(module, "_moe_infinity_made", None) == x.data_ptr():
                self._norms[layer] = module

    def watch_norms(self) -> list[RemovableHandle]:
        """Until the handles are removed, norms note where they put their output."""

        def note(module: Any, args: Any, output: Any) -> None:
            if isinstance(output, torch.Tensor):
                module._moe_infinity_made = output.data_ptr()

        return [
            module.register_forward_hook(note)
            for block in self._blocks
            for module in block.children()
            if "norm" in type(module).__name__.lower()
        ]

    def _shown(self, mode: ForesightMode, layer: int, later: int, x: torch.Tensor) -> torch.Tensor:
        if mode == "raw":
            return x
        if mode == "residual":
            start = torch.zeros(x.shape[-1], dtype=torch.float32)
            change = self._changes.setdefault((layer, later), start)
            return x + change.to(x.dtype)
        norm = self._norms[later]
        if norm is None:
            raise ConfigError(
                f"prefetch: the norm before the router of MoE layer {later} was not found, "
                f"expected one in {type(self._blocks[later]).__name__}; use gate_lookahead"
            )
        shown: torch.Tensor = norm.forward(x)
        return shown

    def _keep(self, layer: int) -> Any:
        def keep(module: nn.Module, args: Any, output: Any) -> None:
            self._logits[layer] = _logits_of(output, module)

        return keep

    @property
    def blocks(self) -> list[nn.Module]:
        """The decoder block around each MoE layer."""
        return self._blocks


def as_recorded(values: torch.Tensor) -> NDArray[np.float32]:
    """Rounded to the half precision of traces: what predictors see live they see in a replay."""
    limit = float(np.finfo(np.float16).max)
    half = values.float().clamp(-limit, limit).to(torch.float16)
    return half.float().numpy(force=True)


def _router_beside(model: nn.Module, name: str, num_experts: int) -> nn.Module:
    """The module next to the experts that has a row of weights for each of them."""
    parent = model.get_submodule(name.rpartition(".")[0])
    for child_name, child in parent.named_children():
        weight = getattr(child, "weight", None)
        is_router = isinstance(weight, torch.Tensor) and weight.dim() == 2
        if name.endswith(child_name) or not is_router:
            continue
        if weight.shape[0] == num_experts:  # type: ignore[union-attr]
            return child
    raise ConfigError(
        f"{name}: found no router beside these experts, expected a module with weights "
        f"[{num_experts}, hidden]; choose what needs neither router logits nor look-ahead"
    )


def _block_around(model: nn.Module, name: str) -> nn.Module:
    """The nearest ancestor that stands in a list of modules: a decoder block."""
    while name:
        parent, _, _ = name.rpartition(".")
        if isinstance(model.get_submodule(parent), nn.ModuleList):
            return model.get_submodule(name)
        name = parent
    return model


def _logits_of(output: Any, router: Any) -> torch.Tensor:
    """Routers give logits, or (logits, weights, indices)."""
    tensors = output if isinstance(output, (tuple, list)) else (output,)
    for tensor in tensors:
        if tensor.is_floating_point() and tensor.shape[-1] == router.weight.shape[0]:
            logits: torch.Tensor = tensor.reshape(-1, tensor.shape[-1])
            return logits
    raise ConfigError(f"{type(router).__name__}: its output holds no logits over the experts")
