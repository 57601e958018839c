"""Makes a Trace of a running model: told of passes, layers and what was asked for beside them."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moe_infinity.tracing.trace import MISSING, PHASES, Trace
from moe_infinity.types import ExpertShape, Phase

_MOST_LONE = 256


@dataclass
class _Pass:
    """One forward pass while it runs; rows of padding are dropped when it ends."""

    step: int
    phase: Phase
    first_request: int  # of row 0
    rows: NDArray[np.int64]  # [T] row of the batch
    real: NDArray[np.bool_] | None  # [T]; None: all
    token_ids: NDArray[np.int64] | None  # [T]
    arrays: dict[str, NDArray[Any]] = field(default_factory=dict)  # [T, L, ...]
    # Of a lone token, kept as they come: layers, and what each routed, [1, K].
    layers: list[int] = field(default_factory=list)
    ids: list[NDArray[np.int64]] = field(default_factory=list)
    weights: list[NDArray[np.float32]] = field(default_factory=list)

    @property
    def is_lone(self) -> bool:
        """Whether nothing was recorded but a lone token's routing."""
        return bool(self.layers) and not self.arrays and self.real is None


class TraceRecorder:
    """Collects passes in memory. T: tokens, L: layers, K: top-k, E: experts, H: hidden size."""

    def __init__(self, shape: ExpertShape, meta: dict[str, Any]) -> None:
        self.domain: str | None = None  # what the coming requests are about
        self._shape = shape
        self._meta = meta  # model, fingerprint and the like
        self._is_new = True
        self._running: _Pass | None = None
        self._parts: list[dict[str, NDArray[Any]]] = []
        # Passes of a lone token, to be made a part together: in decode every microsecond counts.
        self._lone: list[_Pass] = []
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
        self._running = _Pass(step, phase, self._first_request, rows, real, token_ids)
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
        if run is None or len(run.rows) != 1:
            return
        if ids.shape[1] != self._shape.top_k:  # a layer that chooses fewer
            self.record("ids", layer, 0, ids)
            self.record("weights", layer, 0, weights)
            return
        run.layers.append(layer)
        run.ids.append(ids)
        run.weights.append(weights)

    def end_pass(self) -> None:
        run = self._running
        if run is None:
            return
        if run.is_lone:
            self._running = None
            self._lone.append(run)
            if len(self._lone) == _MOST_LONE:
                self._join_lone()
            return
        self._join_lone()
        self._spread(run)
        self._running = None
        real = np.ones(len(run.rows), dtype=bool) if run.real is None else run.real
        if "ids" in run.arrays and real.any():
            ids = np.full(len(run.rows), -1) if run.token_ids is None else run.token_ids
            arrays = {name: array[real] for name, array in run.arrays.items()}
            steps = np.full(int(real.sum()), run.step)
            self._add(run, arrays, run.rows[real], steps, ids[real])

    def _add(
        self,
        run: _Pass,
        arrays: dict[str, NDArray[Any]],
        rows: NDArray[np.int64],
        steps: NDArray[np.int64],
        token_ids: NDArray[np.int64],
    ) -> None:
        requests = run.first_request + rows
        self._parts.append(
            {
                **arrays,
                "step": steps.astype(np.int32),
                "request": requests.astype(np.int32),
                "position": self._next_positions(requests),
                "phase": np.full(len(rows), PHASES.index(run.phase), dtype=np.int8),
                "token_ids": token_ids.astype(np.int32),
            }
        )

    def _join_lone(self) -> None:
        """Make parts of the passes that wait, of as many at a time as are alike."""
        runs, self._lone = self._lone, []
        for _, group in itertools.groupby(runs, _likeness):
            alike = list(group)
            count, first = len(alike), alike[0]
            arrays = {}
            for name in ("ids", "weights"):
                joined = np.concatenate([x for run in alike for x in getattr(run, name)])
                arrays[name] = self._empty(name, count, joined.shape[1:])
                arrays[name][:, first.layers] = joined.reshape(count, -1, self._shape.top_k)
            known = [-1 if run.token_ids is None else int(run.token_ids[0]) for run in alike]
            rows = np.concatenate([run.rows for run in alike])
            self._add(first, arrays, rows, np.array([run.step for run in alike]), np.array(known))

    def _spread(self, run: _Pass) -> None:
        """Put a lone token's routing where that of other tokens is."""
        for layer, ids, weights in zip(run.layers, run.ids, run.weights, strict=True):
            self.record("ids", layer, 0, ids)
            self.record("weights", layer, 0, weights)

    def trace(self) -> Trace:
        """Everything recorded so far."""
        self._join_lone()
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
        positions = np.zeros(len(requests), dtype=np.int32)
        for request in np.unique(requests):
            mine = requests == request
            start = self._positions.get(int(request), 0)
            positions[mine] = start + np.arange(mine.sum())
            self._positions[int(request)] = start + int(mine.sum())
        return positions


def _likeness(run: _Pass) -> tuple[int, Phase, list[int]]:
    """Passes of a lone token can be joined where this is equal."""
    return run.first_request, run.phase, run.layers
