"""What a model's weights beside its experts take in memory."""

from __future__ import annotations

from typing import Any

from moe_infinity.model.loading import Anatomy


def dense_bytes(anatomy: Anatomy) -> int:
    """Dense weights in the computation's dtype or as they were packed, tied ones once."""
    owned = {id(p) for module in anatomy.experts for p in module.module.parameters(recurse=False)}
    plain = (
        p.numel() * anatomy.dtype.itemsize
        for name, p in anatomy.meta.named_parameters()
        if id(p) not in owned and name not in anatomy.coded
    )
    total: int = sum(plain) + sum(linear.num_bytes for linear in anatomy.coded.values())
    return total


def embedding_bytes(anatomy: Anatomy) -> int:
    """The input embedding, unless it is the output's matrix as well. A packed copy may be that."""
    meta: Any = anatomy.meta
    table, head = meta.get_input_embeddings(), meta.get_output_embeddings()
    weight = getattr(table, "weight", None)
    has_copy = bool(anatomy.coded.keys() - dict(meta.named_parameters()).keys())
    if weight is None or (getattr(head, "weight", None) is weight and not has_copy):
        return 0
    return int(weight.numel() * anatomy.dtype.itemsize)
