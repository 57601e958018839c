"""Builds the transformers model without its routed experts' weights, by structure, not by name."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import torch
import transformers
from torch import nn

from moe_infinity.errors import NotAnMoEError, UnsupportedModelError
from moe_infinity.model.adapters import find_adapter
from moe_infinity.model.adapters.base import Adapter, ExpertsModule

# Loading patches classes of the library for a moment; two loads must not do so at once.
_PATCHING = threading.Lock()


def build_meta(config: Any) -> nn.Module:
    """The model of ``config`` on the meta device: shapes and names, no memory.

    Raises UnsupportedModelError if the installed transformers has no model for it.
    """
    with torch.device("meta"):
        model: nn.Module = model_class(config)(config)
    return model


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
    """Modules of routed experts, in the order they are run, by the family's adapter.

    Raises NotAnMoEError if there is none, UnsupportedModelError if there is no way to run them.
    """
    found = find_adapter(model.config.model_type).find(model)  # type: ignore[union-attr, arg-type]
    seen: set[int] = set()
    for experts in found:
        first = id(next(experts.module.parameters(recurse=False)))
        if first in seen:
            raise UnsupportedModelError(
                f"{experts.name} shares its experts with another module; models whose encoder and "
                f"decoder share experts cannot be run by this version"
            )
        seen.add(first)
    if not found:
        raise _no_experts(model)
    return found


def _no_experts(model: nn.Module) -> Exception:
    config: Any = model.config
    moe_words = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
    counts = (getattr(config.get_text_config(), word, 0) or 0 for word in moe_words)
    if any(n > 1 for n in counts) or any(".experts." in name for name, _ in model.named_modules()):
        return UnsupportedModelError(
            f"model type {config.model_type!r} has experts, but not behind transformers' experts "
            f"interface, and this version has no adapter for it"
        )
    return NotAnMoEError(
        f"model type {config.model_type!r} has no routed experts, expected a Mixture-of-Experts "
        f"model such as Qwen3-MoE, Mixtral, OLMoE or DeepSeek; run a dense model with transformers"
    )


@contextlib.contextmanager
def without_expert_weights(adapter: Adapter, experts: list[ExpertsModule]) -> Iterator[None]:
    """While active, models are built with these classes' expert parameters left out."""
    classes = {type(e.module) for e in experts}
    with _PATCHING:
        originals = {cls: cls.__init__ for cls in classes}
        try:
            for cls in classes:
                cls.__init__ = _init_without(originals[cls], adapter)  # type: ignore[method-assign]
            yield
        finally:
            for cls, original in originals.items():
                cls.__init__ = original  # type: ignore[method-assign]


def _init_without(original: Any, adapter: Adapter) -> Any:
    def __init__(self: nn.Module, *args: Any, **kwargs: Any) -> None:
        with torch.device("meta"):
            original(self, *args, **kwargs)
        adapter.strip(self)

    return __init__
