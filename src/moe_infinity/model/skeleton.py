"""Builds the transformers model without its routed experts' weights, by structure, not by name."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import nn

from moe_infinity.errors import NotAnMoEError, UnsupportedModelError

# What transformers' experts decorator sets on every module it wraps.
_INTERFACE_FLAGS = ("has_gate", "has_bias", "is_transposed", "is_concatenated")
# Loading patches classes of the library for a moment; two loads must not do so at once.
_PATCHING = threading.Lock()


@dataclass(frozen=True)
class ExpertsModule:
    """One module of routed experts of the model as built on the meta device."""

    name: str
    module: nn.Module
    params: Mapping[str, tuple[int, ...]]  # its own parameters' shapes, [num_experts, ...] each

    @property
    def num_experts(self) -> int:
        return next(iter(self.params.values()))[0]


def build_meta(config: Any) -> nn.Module:
    """The model of ``config`` on the meta device: shapes and names, no memory.

    Raises UnsupportedModelError if the installed transformers has no model for it.
    """
    with torch.device("meta"):
        return model_class(config)(config)


def model_class(config: Any) -> Any:
    """The class named in the config's architectures, else the causal language model of its type."""
    for name in getattr(config, "architectures", None) or ():
        found = getattr(transformers, name, None)
        if found is not None:
            return found
    for auto in (
        transformers.AutoModelForCausalLM,
        transformers.AutoModelForSeq2SeqLM,
        transformers.AutoModelForImageTextToText,
    ):
        if type(config) in auto._model_mapping:
            return auto._model_mapping[type(config)]
    raise UnsupportedModelError(
        f"model type {config.model_type!r} has no generating model in transformers "
        f"{transformers.__version__}; a newer transformers may have one"
    )


def find_experts(model: nn.Module) -> list[ExpertsModule]:
    """Modules of routed experts, in the order they are run; raises NotAnMoEError if there is none.

    A module counts if transformers' experts interface dispatches it and its parameters are stacked
    along a first dimension of ``num_experts``.
    """
    found = []
    for name, module in model.named_modules():
        if not all(hasattr(module, flag) for flag in _INTERFACE_FLAGS):
            continue
        shapes = {n: tuple(p.shape) for n, p in module.named_parameters(recurse=False)}
        if not shapes or len({shape[0] for shape in shapes.values()}) != 1:
            raise UnsupportedModelError(
                f"{name}: got expert parameters {shapes}, expected all stacked by expert"
            )
        found.append(ExpertsModule(name, module, shapes))
        if len({id(next(f.module.parameters(recurse=False))) for f in found}) != len(found):
            raise UnsupportedModelError(
                f"{name} shares its experts with another module; models whose encoder and decoder "
                f"share experts cannot be run by this version"
            )
    if not found:
        raise _no_experts(model)
    return found


def _no_experts(model: nn.Module) -> Exception:
    config: Any = model.config
    moe_words = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
    if any((getattr(config.get_text_config(), word, 0) or 0) > 1 for word in moe_words):
        return UnsupportedModelError(
            f"model type {config.model_type!r} has experts, but not behind transformers' experts "
            f"interface, and this version has no adapter for it"
        )
    return NotAnMoEError(
        f"model type {config.model_type!r} has no routed experts, expected a Mixture-of-Experts "
        f"model such as Qwen3-MoE, Mixtral, OLMoE or DeepSeek; run a dense model with transformers"
    )


@contextlib.contextmanager
def without_expert_weights(experts: list[ExpertsModule]) -> Iterator[None]:
    """While active, models are built with these classes' expert parameters left out."""
    classes = {type(e.module) for e in experts}
    names = {cls: {n for e in experts if type(e.module) is cls for n in e.params} for cls in classes}
    with _PATCHING:
        originals = {cls: cls.__init__ for cls in classes}
        try:
            for cls in classes:
                cls.__init__ = _init_without(originals[cls], names[cls])  # type: ignore[method-assign]
            yield
        finally:
            for cls, original in originals.items():
                cls.__init__ = original  # type: ignore[method-assign]


def _init_without(original: Any, names: set[str]) -> Any:
    def __init__(self: nn.Module, *args: Any, **kwargs: Any) -> None:
        with torch.device("meta"):
            original(self, *args, **kwargs)
        for name in names:
            delattr(self, name)
            # Some families' initialisation reaches for the attribute; an empty tensor suits it.
            empty = torch.empty(0, device="cpu")
            empty._is_hf_initialized = True  # type: ignore[attr-defined]
            setattr(self, name, empty)
        self._is_hf_initialized = True  # nothing left for the library to initialise

    return __init__
