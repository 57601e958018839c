"""Which weights a model computes with by itself, past the function of the layer they belong to."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from moe_infinity.model.kv_shape import layers_after_one_token


def weights_read_directly(meta: Any) -> set[str] | None:
    """Names of such weights, of linear layers and embeddings, of a model on the meta device: they
    have to be there as numbers. None: the model does not run there, and it cannot be told."""
    touched: set[str] = set()
    with _watched(meta, touched.add):
        layers = layers_after_one_token(meta)
    return None if layers is None else touched


# What is asked of a tensor without computing with it; but for these attributes, which are numbers.
_ASKED = ("__get__", "size", "dim", "stride", "numel")
_NUMBERS = ("T", "H", "mT", "mH", "data", "real", "imag")


class _Watched(torch.Tensor):
    """A weight that tells who computes with it."""

    note: Callable[[], None]

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name, of = getattr(func, "__name__", ""), getattr(func, "__self__", None)
        if name not in _ASKED or getattr(of, "__name__", "") in _NUMBERS:
            for each in (*args, *(kwargs or {}).values()):
                if isinstance(each, _Watched):
                    each.note()
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))


@contextmanager
def _watched(meta: nn.Module, note: Callable[[str], None]) -> Iterator[None]:
    """Layers of ``meta`` compute without their weights, which call ``note`` when used."""
    modules: list[tuple[str, Any]] = [
        (f"{name}.weight", m)
        for name, m in meta.named_modules()
        if type(m) in (nn.Linear, nn.Embedding)
    ]
    kept = [(module, module._parameters.pop("weight")) for _, module in modules]
    try:
        for (name, module), (_, weight) in zip(modules, kept, strict=True):
            watched = weight.detach().as_subclass(_Watched)
            watched.note = lambda name=name: note(name)
            module.__dict__["weight"] = watched
            module.forward = _shaped(module)
        yield
    finally:
        for module, weight in kept:
            module.__dict__.pop("weight", None)
            module.__dict__.pop("forward", None)
            module._parameters["weight"] = weight


def _shaped(module: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    if type(module) is nn.Linear:
        return lambda x: x.new_empty(*x.shape[:-1], module.out_features)
    dtype = module.weight.dtype
    return lambda ids: ids.new_empty(*ids.shape, module.embedding_dim, dtype=dtype)
