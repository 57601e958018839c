"""Traces on disk: our own safetensors form, version 1 (docs/traces.md), and the .npz interchange.

Written whole or not at all.
"""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from moe_infinity.durable import write_atomically
from moe_infinity.errors import TraceError
from moe_infinity.tracing.trace import Trace
from moe_infinity.types import ExpertShape

FORMAT = "moe-infinity-trace"
VERSION = 1
_ARRAYS = {
    "step": np.int32,
    "request": np.int32,
    "position": np.int32,
    "phase": np.int8,
    "ids": np.int16,
    "weights": np.float32,
    "token_ids": np.int32,
    "logits": np.float16,
    "hidden": np.float16,
    "embeddings": np.float16,
}
_OPTIONAL = {"logits", "hidden", "embeddings"}
_FORESIGHT = "foresight."


def save_trace(trace: Trace, path: Path) -> None:
    """Write ``trace``; a file already there is replaced only once the new one is complete."""
    arrays = {name: getattr(trace, name) for name in _ARRAYS}
    arrays |= {_FORESIGHT + mode: scores for mode, scores in trace.foresight.items()}
    tensors = {
        name: np.ascontiguousarray(array) for name, array in arrays.items() if array is not None
    }
    shape = trace.shape
    header = {
        "format": FORMAT,
        "version": str(VERSION),
        "shape": json.dumps([shape.num_experts, shape.top_k, *shape.experts_per_layer]),
        "meta": json.dumps(trace.meta),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, save(tensors, header))


def load_trace(path: Path) -> Trace:
    """Read a trace of either form, told apart by the suffix. Raises TraceError."""
    if not path.is_file():
        raise TraceError(f"{path}: no such file; expected a trace (.safetensors or .npz)")
    try:
        trace = _import_npz(path) if path.suffix == ".npz" else _load(path)
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
        if isinstance(error, TraceError):
            raise
        raise TraceError(f"{path}: not a readable trace ({error}); record it anew") from error
    trace.meta.setdefault("name", path.stem)
    return trace


def read_tensors(path: Path, form: str, version: int) -> tuple[dict[str, Any], dict[str, str]]:
    """Arrays and metadata of a safetensors file that says it is ``form``. Raises TraceError."""
    try:
        with safe_open(path, framework="numpy") as file:
            meta = file.metadata() or {}
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise TraceError(f"{path}: spoiled or truncated ({error}); make it anew") from error
    if meta.get("format") != form:
        raise TraceError(f"{path}: got a {meta.get('format')!r} file, expected a {form!r} one")
    if not meta.get("version", "").isdecimal() or int(meta["version"]) > version:
        raise TraceError(
            f"{path}: {form} version {meta.get('version')!r}, this program reads up to {version}; "
            f"update it"
        )
    return arrays, meta


def _load(path: Path) -> Trace:
    arrays, meta = read_tensors(path, FORMAT, VERSION)
    lost = _ARRAYS.keys() - _OPTIONAL - arrays.keys()
    if lost:
        raise TraceError(f"{path}: {', '.join(sorted(lost))} missing; record the trace anew")
    num_experts, top_k, *per_layer = json.loads(meta["shape"])
    return Trace(
        shape=ExpertShape(len(per_layer), num_experts, top_k, tuple(per_layer)),
        foresight={
            name.removeprefix(_FORESIGHT): array
            for name, array in arrays.items()
            if name.startswith(_FORESIGHT)
        },
        meta=json.loads(meta["meta"]),
        **{name: _typed(arrays[name], kind) for name, kind in _ARRAYS.items() if name in arrays},
    )


def _typed(array: NDArray[Any], kind: type) -> NDArray[Any]:
    return array.astype(kind, copy=False)


def _import_npz(path: Path) -> Trace:
    """The interchange form: one row per token; a request's prefill rows are one pass."""
    with np.load(path, allow_pickle=False) as file:
        arrays = {name: file[name] for name in file}
    meta = json.loads(str(arrays["meta"]))
    ids, request, phase = arrays["ids"], arrays["req"], arrays["phase"]
    tokens, num_layers, top_k = ids.shape
    is_new = np.ones(tokens, dtype=bool)
    is_new[1:] = (phase[1:] != 0) | (phase[:-1] != 0) | (request[1:] != request[:-1])
    per_layer = (int(meta["n_experts"]),) * num_layers
    return Trace(
        shape=ExpertShape(num_layers, int(meta["n_experts"]), top_k, per_layer),
        step=np.cumsum(is_new).astype(np.int32),
        request=_typed(request, np.int32),
        position=_typed(arrays["pos"], np.int32),
        phase=_typed(phase, np.int8),
        ids=_typed(ids, np.int16),
        weights=_typed(arrays["w"], np.float32),
        token_ids=np.full(tokens, -1, dtype=np.int32),
        meta=meta,
    )
