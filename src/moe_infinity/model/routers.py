"""The model's own routers: what they say, and what later ones would say to an earlier input."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.utils.hooks import RemovableHandle

from moe_infinity.errors import ConfigError
from moe_infinity.kernels.base import ExpertKernel
from moe_infinity.model.linears import product_of
from moe_infinity.model.own_hooks import own
from moe_infinity.predictors.base import Foresight, ForesightMode

_FURTHEST = 8  # layers that a residual look-ahead may reach
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
        return self.in_events or bool(self.foresight)

    @property
    def in_events(self) -> bool:
        """Whether an event is to hold more than experts and their weights."""
        return self.router_logits or self.router_input

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

    def __init__(
        self, model: nn.Module, names: list[str], num_experts: list[int], kernel: ExpertKernel
    ) -> None:
        self._routers = [
            _router_beside(model, name, count)
            for name, count in zip(names, num_experts, strict=True)
        ]
        self._products = [product_of(kernel, router) for router in self._routers]
        self._blocks = [block_around(model, name) for name in names]
        self._widest = max(num_experts)
        self._is_linear: list[bool | None] = [None] * len(names)  # None: it has not run yet
        self._shown_to = -1  # the layer whose router ran last, what it saw [T, H] and said [T, E]
        self._input: torch.Tensor | None = None
        self._logits: torch.Tensor | None = None
        self._norms: list[nn.Module | None] = [None] * len(names)
        # By layer: mean change from its router's input to those of the D next layers, [D, H].
        self._changes: dict[int, NDArray[np.float32]] = {}
        self._inputs: list[NDArray[np.float32] | None] = [None] * len(names)
        self._handles: list[RemovableHandle] = [
            router.register_forward_hook(own(self._keep(layer)), with_kwargs=True)
            for layer, router in enumerate(self._routers)
        ]

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()

    def show(self, layer: int, x: torch.Tensor, logits: torch.Tensor) -> None:
        """Of a router that ran without its module: what it saw [T, H] and said [T, E]."""
        self._shown_to, self._input, self._logits = layer, x, logits
        self._is_linear[layer] = True

    def last(self, layer: int, start: int, count: int) -> tuple[torch.Tensor, torch.Tensor] | None:
        """What the layer's router last saw [T, H] and said before softmax [T, E], of ``count``
        tokens from ``start`` on. Experts may be shown something else: a projection, say.

        None if that router did not run on these tokens.
        """
        if self._shown_to != layer or self._input is None or self._logits is None:
            return None
        if len(self._input) < start + count or len(self._logits) < start + count:
            return None
        return self._input[start : start + count], self._logits[start : start + count]

    def forget(self) -> None:
        """A prompt's router input is large: it must not outlive its layer."""
        self._shown_to, self._input, self._logits = -1, None, None

    def begin_step(self) -> None:
        """What routers see from now on is compared with nothing that they saw before."""
        self._inputs = [None] * len(self._inputs)

    def see_input(self, layer: int, x: torch.Tensor) -> None:
        """The router's input [T, H] of a decode step: learn the mean change between layers."""
        rows: NDArray[np.float32] = x.float().numpy(force=True)
        mean = rows[0] if len(rows) == 1 else rows.mean(axis=0)
        self._inputs[layer] = mean
        for before in range(max(0, layer - _FURTHEST), layer):
            changes, source = self._changes.get(before), self._inputs[before]
            if changes is not None and source is not None and layer - before <= len(changes):
                change = changes[layer - before - 1]
                change += _MEMORY * (mean - source - change)

    def foresee(
        self, mode: ForesightMode, layer: int, x: torch.Tensor, depth: int
    ) -> NDArray[np.float32]:
        """[T, D, E] what the routers of the next ``depth`` layers say to x [T, H].

        x: the layer's router input, or for next_norm its output. Layers that do not exist say
        nothing: -inf.
        """
        said = torch.full((len(x), depth, self._widest), -math.inf)
        reach = min(depth, len(self._routers) - layer - 1)
        for distance, shown in enumerate(self._shown(mode, layer, x, reach, depth)):
            scores = self._ask(layer + 1 + distance, shown)
            said[:, distance, : scores.shape[-1]] = scores
        return as_recorded(said)

    def changes(self, layer: int, depth: int) -> NDArray[np.float32]:
        """From the layer's router input to those of the next ``depth``, the mean so far: [depth, H]
        or more rows, which go on changing."""
        known = self._changes.get(layer)
        if known is not None and len(known) >= depth:
            return known
        router: Any = self._routers[layer]
        changes = np.zeros((depth, router.weight.shape[1]), dtype=np.float32)
        if known is not None:
            changes[: len(known)] = known
        self._changes[layer] = changes
        return changes

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

    def _ask(self, layer: int, x: torch.Tensor) -> torch.Tensor:
        """[T, E] the layer's router on x [T, H]; most are one product and more that only picks."""
        router: Any = self._routers[layer]
        if self._is_linear[layer] is False:
            return _logits_of(router.forward(x), router)
        return self._products[layer](x)

    def _shown(
        self, mode: ForesightMode, layer: int, x: torch.Tensor, reach: int, depth: int
    ) -> Iterable[torch.Tensor]:
        """What to show the routers of the next ``reach`` layers: [T, H] each."""
        if mode == "raw":
            return [x] * reach
        if mode == "next_norm":
            return (self._normed(layer + 1 + distance, x) for distance in range(reach))
        return x[None] + torch.from_numpy(self.changes(layer, depth)[:reach, None]).to(x)

    def _normed(self, layer: int, x: torch.Tensor) -> torch.Tensor:
        norm = self._norms[layer]
        if norm is None:
            raise ConfigError(
                f"prefetch: the norm before the router of MoE layer {layer} was not found, "
                f"expected one in {type(self._blocks[layer]).__name__}; use gate_lookahead"
            )
        normed: torch.Tensor = norm.forward(x)
        return normed

    def _keep(self, layer: int) -> Callable[..., None]:
        def keep(router: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
            shown = next(v for v in (*args, *kwargs.values()) if isinstance(v, torch.Tensor))
            self._shown_to = layer
            self._input = shown.reshape(-1, shown.shape[-1])
            self._logits = _logits_of(output, router)
            if self._is_linear[layer] is None:  # is one product all there is to its logits?
                difference = self._products[layer](self._input).float() - self._logits.float()
                sane = torch.nan_to_num(difference, 0.0, 0.0, 0.0).abs().max()
                size = torch.nan_to_num(self._logits.float(), 0.0, 0.0, 0.0).abs().max()
                self._is_linear[layer] = bool(sane <= 0.02 * (1 + size))

        return keep

    @property
    def blocks(self) -> list[nn.Module]:
        """The decoder block around each MoE layer."""
        return self._blocks


def has_routers(model: nn.Module, names: Iterable[str], num_experts: Iterable[int]) -> bool:
    """Whether ``RouterTaps`` would find a router beside each of these modules of experts."""
    try:
        for name, count in zip(names, num_experts, strict=True):
            _router_beside(model, name, count)
    except ConfigError:
        return False
    return True


def as_recorded(values: torch.Tensor) -> NDArray[np.float32]:
    """Rounded to the half precision of traces: what predictors see live they see in a replay.

    Beyond 65504 that is infinite, here as there.
    """
    half = values.to(torch.float16)
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


def is_router(name: str, module: Any, num_experts: Collection[int]) -> bool:
    """Whether a module chooses experts, by its name and the rows of its weight."""
    is_named = name.rpartition(".")[2] in ("gate", "router", "classifier")
    return is_named or module.weight.shape[0] in num_experts


def block_around(model: nn.Module, name: str) -> nn.Module:
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
