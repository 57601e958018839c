"""Small learned arrays on disk, bound to the model they were learned from. Written atomically."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save

from moe_infinity.errors import TraceError
from moe_infinity.tracing.trace_file import read_tensors, write_atomically
from moe_infinity.types import ExpertShape


def save_state(
    path: Path,
    form: str,
    arrays: Mapping[str, NDArray[Any]],
    shape: ExpertShape,
    fingerprint: str,
    version: int = 1,
) -> None:
    """Write ``arrays`` as a ``form`` file of the model with this shape and fingerprint."""
    header = {
        "format": f"moe-infinity-{form}",
        "version": str(version),
        "experts": _experts(shape),
        "fingerprint": fingerprint,
    }
    tensors = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    write_atomically(path, save(tensors, header))


def load_state(
    path: Path, form: str, shape: ExpertShape, fingerprint: str, version: int = 1
) -> dict[str, NDArray[Any]]:
    """Read what ``save_state`` wrote.

    Raises TraceError for a spoiled file, another form, a later version or another model. An empty
    fingerprint on either side (a trace from elsewhere) leaves the shape to tell models apart.
    """
    arrays, header = read_tensors(path, f"moe-infinity-{form}", version)
    if header.get("experts") != _experts(shape):
        raise TraceError(
            f"{path}: learned from a model with {header.get('experts')} (layers x experts, top-k), "
            f"this one has {_experts(shape)}; use each model's own"
        )
    theirs = header.get("fingerprint", "")
    if theirs and fingerprint and theirs != fingerprint:
        raise TraceError(
            f"{path}: learned from the checkpoint {theirs}, this one is {fingerprint}; "
            f"use each model's own"
        )
    return arrays


def _experts(shape: ExpertShape) -> str:
    return f"{list(shape.experts_per_layer)}, {shape.top_k}"
