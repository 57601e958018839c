"""Several traces of one model as one. Knows nothing of what they are for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moe_infinity.errors import TraceError
from moe_infinity.tracing.trace import Trace

_ALWAYS = ("position", "phase", "ids", "weights", "token_ids")
_SOMETIMES = ("logits", "hidden", "embeddings")


def concatenate(traces: Sequence[Trace]) -> Trace:
    """One after the other, requests and steps numbered anew where they would clash.

    What not every trace holds is left out. Raises TraceError unless all are of one model.
    """
    first = traces[0]
    if len(traces) == 1:
        return first
    _require_one_model(traces)
    steps = _offsets([trace.step for trace in traces])
    requests = _offsets([trace.request for trace in traces])
    arrays: dict[str, Any] = {name: _joined(traces, name) for name in (*_ALWAYS, *_SOMETIMES)}
    arrays["step"] = _shifted([trace.step for trace in traces], steps)
    arrays["request"] = _shifted([trace.request for trace in traces], requests)
    meta = dict(first.meta)
    meta["name"] = " + ".join(trace.name for trace in traces)
    meta["fingerprint"] = next((t.fingerprint for t in traces if t.fingerprint), None)
    meta["domains"] = {
        str(int(request) + shift): name
        for trace, shift in zip(traces, requests, strict=True)
        for request, name in (trace.meta.get("domains") or {}).items()
    }
    return replace(first, **arrays, foresight=_foresight(traces), meta=meta)


def _require_one_model(traces: Sequence[Trace]) -> None:
    first = traces[0]
    known = [trace for trace in traces if trace.fingerprint]
    for trace in traces:
        if trace.shape != first.shape:
            raise TraceError(
                f"{trace.name}: of a model with {_size(trace)}, {first.name} has {_size(first)}; "
                f"expected traces of one model"
            )
        if trace.fingerprint and trace.fingerprint != known[0].fingerprint:
            raise TraceError(
                f"{trace.name}: of the checkpoint {trace.fingerprint}, {known[0].name} is of "
                f"{known[0].fingerprint}; expected traces of one model"
            )


def _size(trace: Trace) -> str:
    return f"{trace.shape.num_layers} x {trace.shape.num_experts} experts, top-{trace.shape.top_k}"


def _joined(traces: Sequence[Trace], name: str) -> NDArray[Any] | None:
    arrays = [getattr(trace, name) for trace in traces]
    if any(array is None for array in arrays):
        return None
    if len({array.shape[1:] for array in arrays}) > 1:
        shapes = ", ".join(f"{t.name}: {a.shape}" for t, a in zip(traces, arrays, strict=True))
        raise TraceError(f"{name} differs ({shapes}); expected traces of one model")
    return np.concatenate(arrays)


def _foresight(traces: Sequence[Trace]) -> dict[str, NDArray[np.float16]]:
    """Modes that all traces hold, as deep as the shallowest."""
    found = {}
    for mode in sorted(set.intersection(*(set(trace.foresight) for trace in traces))):
        depth = min(trace.foresight[mode].shape[2] for trace in traces)
        found[mode] = np.concatenate([trace.foresight[mode][:, :, :depth] for trace in traces])
    return found


def _offsets(numbers: Sequence[NDArray[np.int32]]) -> list[int]:
    """What to add to each array so that none has a number of an earlier one."""
    offsets, free = [], None
    for array in numbers:
        low, high = (int(array.min()), int(array.max())) if len(array) else (0, -1)
        offset = 0 if free is None else free - low
        offsets.append(offset)
        free = max(free or 0, high + offset + 1)
    return offsets


def _shifted(numbers: Sequence[NDArray[np.int32]], offsets: Sequence[int]) -> NDArray[np.int32]:
    moved = [array + np.int32(offset) for array, offset in zip(numbers, offsets, strict=True)]
    return np.concatenate(moved).astype(np.int32)
