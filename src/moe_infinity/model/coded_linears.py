"""Which linear layers beside the experts are computed as their weights are stored."""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from moe_infinity.checkpoint.base import Checkpoint, PackedShape, TensorEntry
from moe_infinity.checkpoint.expert_layout import NameRule
from moe_infinity.errors import CorruptCheckpointError
from moe_infinity.model.direct_use import weights_read_directly
from moe_infinity.model.latent_attention import absorbed_weights
from moe_infinity.model.lazy_tensors import Placeholder, read_packed
from moe_infinity.model.packed_linears import attach_packed


class CodedLinear(NamedTuple):
    """entry: its codes; num_bytes: of them and what lies beside them."""

    entry: TensorEntry
    shape: PackedShape
    num_bytes: int


def coded_linears(
    checkpoint: Checkpoint,
    meta: Any,
    rule: Callable[[str], NameRule],
    dense: Sequence[TensorEntry],
) -> dict[str, CodedLinear]:
    """By the model's name of their weight. Of quantised tensors those that are a linear layer's
    whole weight, unless the model computes with it by itself: these become numbers."""
    found = {}
    for name, shape in checkpoint.packed_dense.items():
        entry = checkpoint.tensors[name]
        found[name] = CodedLinear(entry, shape, entry.num_bytes)
    quantised = [entry for entry in dense if entry.name in checkpoint.sides]
    touched = weights_read_directly(meta) if quantised else None
    if touched is None:
        return found
    touched |= absorbed_weights(meta)
    linears = {f"{n}.weight": m for n, m in meta.named_modules() if type(m) is nn.Linear}
    for entry in quantised:
        named = rule(entry.name)
        name, linear = named.parameter, linears.get(named.parameter)
        if named.converter is not None or linear is None or name in touched:
            continue
        if tuple(linear.weight.shape) == entry.shape:
            shape = PackedShape(entry.format, *entry.shape)
            found[name] = CodedLinear(entry, shape, _num_bytes(checkpoint, entry))
    return found


def attach_coded(
    model: nn.Module,
    checkpoint: Checkpoint,
    coded: Mapping[str, CodedLinear],
    dtype: torch.dtype,
    own: Container[str],
) -> None:
    """Read them into their layers. own: names of parameters that are not another one's.

    Raises CorruptCheckpointError for one that has no layer of its size.
    """
    modules: dict[str, Any] = dict(model.named_modules())
    for name, (entry, shape, _) in coded.items():
        matrix = read_packed(checkpoint, entry, shape)
        module = modules.get(name.removesuffix(".weight"))
        if type(module) is not nn.Linear or module.weight.shape != (shape.rows, shape.cols):
            raise CorruptCheckpointError(
                f"{checkpoint.path}: tensor {name!r} is a packed matrix of {shape.rows} rows and "
                f"{shape.cols} columns, expected a linear layer of this size in the model; pack "
                f"the model again"
            )
        if name in own:  # the library may have made room for it
            placeholder = Placeholder(shape, dtype)[...]
            module.weight = nn.Parameter(placeholder, requires_grad=False)
        attach_packed(module, matrix)


def _num_bytes(checkpoint: Checkpoint, entry: TensorEntry) -> int:
    planes = (plane for plane in checkpoint.sides[entry.name] if plane is not None)
    return entry.num_bytes + sum(plane.entry.num_bytes for plane in planes)
