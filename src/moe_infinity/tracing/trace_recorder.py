"""Makes a Trace of a running model: told of passes, layers and what was asked for beside them."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moe_infinity.tracing.trace import MISSING, PHASES, Trace
from moe_infinity.types import ExpertShape, Phase


@dataclass
class _Pass:
    """One forward pass while it runs; rows of padding are dropped when it ends."""

    step: int
    phase: Phase
    rows: NDArray[np.int64]  # [T] row of the batch
    real: NDArray[np.bool_]  # [T]
    token_ids: NDArray[np.int32]  # [T]
    arrays: dict[str, NDArray[Any]] = field(default_factory=dict)  # [T, L, ...]
    # Of a lone token, kept as they come: layers, and what each routed, [1, K].
    layers: list[int] = field(default_factory=list)
    ids: list[NDArray[np.int64]] = field(default_factory=list)
    weights: list[NDArray[np.float32]] = field(default_factory=list)


class TraceRecorder:
    """Collects passes in memory. T: tokens, L: layers, K: top-k, E: experts, H: hidden size."""

    def __init__(self, shape: ExpertShape, meta: dict[str, Any]) -> None:
        self.domain: str | None = None  # what the coming requests are about
        self._shape = shape
        self._meta = meta  # model, fingerprint and the like
        self._is_new = True
        self._running: _Pass | None = None
        self._parts: list[dict[str, NDArray[Any]]] = []
        self._num_requests = 0
        self._first_request = 0
        self._positions: dict[int, int] = {}
        self._domains: dict[str, str] = {}

    def begin_request(self) -> None:
        """A new ``generate`` call; each row of its batch is a request of the trace."""
        self._is_new = True

    def begin_pass(
        self,
        step: int,
        phase: Phase,
        rows: NDArray[np.int64],
        real: NDArray[np.bool_] | None,
        token_ids: NDArray[np.int64] | None,
        embeddings: NDArray[np.float32] | None = None,
    ) -> None:
        """A forward pass starts; all arrays are over its tokens, padding included."""
        count = len(rows)
        if self._is_new:
            self._number_requests(int(rows.max()) + 1 if count else 0)
        ids = np.full(count, -1) if token_ids is None else token_ids
        real = np.ones(count, dtype=bool) if real is None else real
        self._running = _Pass(step, phase, rows, real, ids.astype(np.int32))
        if embeddings is not None:
            self._running.arrays["embeddings"] = embeddings.astype(np.float16)

    def record(self, name: str, layer: int, start: int, values: NDArray[Any]) -> None:
        """What layer ``layer`` had for the tokens from ``start`` on: values [T, ...] of array
        ``name`` (ids, weights, logits, hidden, foresight.MODE)."""
        run = self._running
        if run is None or start + len(values) > len(run.rows):
            return  # a layer that sees other tokens than the text's (an image's)
        array = run.arrays.get(name)
        if array is None:
            array = run.arrays[name] = self._empty(name, len(run.rows), values.shape[1:])
        width = values.shape[-1]
        array[start : start + len(values), layer, ..., :width] = values

    def record_token(
        self, layer: int, ids: NDArray[np.int64], weights: NDArray[np.float32]
    ) -> None:
        """The routing of a pass's only token, ids and weights [1, K], which are kept."""
        run = self._running
        if run is not None and len(run.rows) == 1:
            run.layers.append(layer)
            run.ids.append(ids)
            run.weights.append(weights)

    def end_pass(self) -> None:
        if self._running is not None and self._running.layers:
            self._take_lone(self._running)
        run, self._running = self._running, None
        if run is None or "ids" not in run.arrays or not run.real.any():
            return
        keep = run.real
        requests = self._first_request + run.rows[keep]
        part = {name: array[keep] for name, array in run.arrays.items()}
        part["step"] = np.full(len(requests), run.step, dtype=np.int32)
        part["request"] = requests.astype(np.int32)
        part["position"] = self._next_positions(requests)
        part["phase"] = np.full(len(requests), PHASES.index(run.phase), dtype=np.int8)
        part["token_ids"] = run.token_ids[keep]
        self._parts.append(part)

    def _take_lone(self, run: _Pass) -> None:
        """At once what each layer said: in decode every microsecond of a layer counts."""
        if len({each.shape for each in run.ids}) > 1:
            for layer, ids, weights in zip(run.layers, run.ids, run.weights, strict=True):
                self.record("ids", layer, 0, ids)
                self.record("weights", layer, 0, weights)
            return
        found: tuple[tuple[str, list[Any]], ...] = (("ids", run.ids), ("weights", run.weights))
        for name, values in found:
            joined = np.concatenate(values)
            if name not in run.arrays:
                run.arrays[name] = self._empty(name, 1, joined.shape[1:])
            run.arrays[name][0, run.layers, : joined.shape[1]] = joined

    def trace(self) -> Trace:
        """Everything recorded so far."""
        names = sorted({name for part in self._parts for name in part})
        joined: dict[str, Any] = {name: self._join(name) for name in names}
        foresight = {
            name.partition(".")[2]: joined.pop(name)
            for name in names
            if name.startswith("foresight.")
        }
        empty = Trace(
            shape=self._shape,
            step=np.zeros(0, dtype=np.int32),
            request=np.zeros(0, dtype=np.int32),
            position=np.zeros(0, dtype=np.int32),
            phase=np.zeros(0, dtype=np.int8),
            ids=self._empty("ids", 0, (self._shape.top_k,)),
            weights=self._empty("weights", 0, (self._shape.top_k,)),
            token_ids=np.zeros(0, dtype=np.int32),
            meta={"complete": True}
            | self._meta
            | ({"domains": self._domains} if self._domains else {}),
        )
        return replace(empty, foresight=foresight, **joined)

    def _number_requests(self, num_rows: int) -> None:
        self._is_new = False
        self._first_request = self._num_requests
        self._num_requests += num_rows
        if self.domain:
            coming = range(self._first_request, self._num_requests)
            self._domains |= {str(request): self.domain for request in coming}

    def _empty(self, name: str, count: int, inner: tuple[int, ...]) -> NDArray[Any]:
        grid = (count, self._shape.num_layers)
        if name == "ids":
            return np.full((*grid, self._shape.top_k), MISSING, dtype=np.int16)
        if name == "weights":
            return np.zeros((*grid, self._shape.top_k), dtype=np.float32)
        last = inner[-1] if name == "hidden" else self._shape.num_experts
        return np.zeros((*grid, *inner[:-1], last), dtype=np.float16)

    def _join(self, name: str) -> NDArray[Any]:
        """Passes without an array (foresight of a prompt) have zeros there."""
        example = next(part[name] for part in self._parts if name in part)
        return np.concatenate(
            [
                part[name]
                if name in part
                else np.zeros((len(part["step"]), *example.shape[1:]), dtype=example.dtype)
                for part in self._parts
            ]
        )

    def _next_positions(self, requests: NDArray[np.int64]) -> NDArray[np.int32]:
        if len(requests) == 1:
            (request,) = requests.tolist()
            start = self._positions.get(request, 0)
            self._positions[request] = start + 1
            return np.array([start], dtype=np.int32)
        positions = np.zeros(len(requests), dtype=np.int32)
        for request in np.unique(requests):
            mine = requests == request
            start = self._positions.get(int(request), 0)
            positions[mine] = start + np.arange(mine.sum())
            self._positions[int(request)] = start + int(mine.sum())
        return positions
