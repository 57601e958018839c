"""Small learned arrays on disk, bound to the model they were learned from. Written atomically."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save

from moe_infinity.durable import write_atomically
from moe_infinity.errors import TraceError
from moe_infinity.tracing.trace_file import read_tensors
from moe_infinity.types import ExpertShape

# Sizes of an array's axes; a name stands for one size in all arrays of a file.
Dims = tuple[int | str, ...]


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
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, save(tensors, header))


def load_state(
    path: Path,
    form: str,
    shape: ExpertShape,
    fingerprint: str,
    expected: Mapping[str, Dims],
    version: int = 1,
) -> dict[str, NDArray[Any]]:
    """Read what ``save_state`` wrote: the arrays named in ``expected``, of these dimensions.

    Raises TraceError for a spoiled file, another form, a later version, another model or arrays
    that are missing, not finite or of other dimensions. An empty fingerprint on either side (a
    trace from elsewhere) leaves the shape to tell models apart.
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
    sizes: dict[str, int] = {}
    for name, dims in expected.items():
        if name not in arrays or not _fits(arrays[name], dims, sizes):
            got = "nothing" if name not in arrays else f"{arrays[name].shape}, finite or not"
            raise TraceError(f"{path}: {name} is {got}, expected finite {dims}; delete the file")
    return {name: arrays[name] for name in expected}


def _fits(array: NDArray[Any], dims: Dims, sizes: dict[str, int]) -> bool:
    """Whether the array has these dimensions; a name stands for the same size everywhere."""
    if array.ndim != len(dims) or not np.isfinite(array).all():
        return False
    wanted = [
        sizes.setdefault(dim, size) if isinstance(dim, str) else dim
        for dim, size in zip(dims, array.shape, strict=True)
    ]
    return wanted == list(array.shape)


def _experts(shape: ExpertShape) -> str:
    return f"{list(shape.experts_per_layer)}, {shape.top_k}"
