"""The contract of an adapter: how one kind of model carries its routed experts and calls them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from moe_infinity.kernels.base import ExpertMath

# (hidden [T, H], top_k_index [T, K], top_k_weights [T, K]) -> [T, H]; see ExpertsLayer.forward.
ExpertsForward = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class ExpertsModule:
    """One module of routed experts of the model as built on the meta device."""

    name: str
    module: nn.Module
    params: Mapping[str, tuple[int, ...]]  # its own parameters' shapes, [num_experts, ...] each

    @classmethod
    def of(cls, name: str, module: nn.Module) -> ExpertsModule:
        own = module.named_parameters(recurse=False)
        return cls(name, module, {n: tuple(p.shape) for n, p in own})

    @property
    def num_experts(self) -> int:
        return next(iter(self.params.values()))[0]


class Adapter(ABC):
    """Everything a model family may do its own way about routed experts. Holds no state.

    The default is ``_interface.py``, for all families of transformers' experts interface. A family
    outside it is one file, named after its model type, that holds a class ``Adapter``. An adapter
    wraps what the library built; it never replaces or patches a modelling file.

    converters: the library's WeightConverters from checkpoint names to the parameters that ``find``
    reports, where the library itself has none. top_k: experts per token, if no config says it.
    routes_padding: whether padding takes part in routing (it fills an expert's capacity, say), so
    that leaving it out would change real tokens' results.
    """

    converters: tuple[Any, ...] = ()
    top_k: int | None = None
    routes_padding = False

    @abstractmethod
    def find(self, model: nn.Module) -> list[ExpertsModule]:
        """Modules of routed experts of a model on the meta device, in the order they are run.

        May give a module stacked parameters of its own in place of its experts' single ones;
        finding again changes nothing.
        """

    @abstractmethod
    def strip(self, module: nn.Module) -> None:
        """Take the experts' parameters from a freshly built module, so that none is loaded."""

    @abstractmethod
    def math(self, module: nn.Module) -> ExpertMath:
        """How the experts of a stripped module compute."""

    @abstractmethod
    def attach(self, module: nn.Module, forward: ExpertsForward) -> None:
        """Make the model call ``forward`` where it would have called this module's experts."""


def leave_out(module: nn.Module, names: Iterable[str]) -> None:
    """Replace parameters of ``module`` by empty tensors that nothing loads or initialises."""
    for name in names:
        delattr(module, name)
        # Some families' initialisation reaches for the attribute; an empty tensor suits it.
        empty = torch.empty(0, device="cpu")
        empty._is_hf_initialized = True  # type: ignore[attr-defined]
        setattr(module, name, empty)
    module._is_hf_initialized = True  # type: ignore[assignment]
