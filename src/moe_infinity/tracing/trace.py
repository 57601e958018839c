"""A recorded routing: per token and layer the chosen experts, and what was asked for beside them.

Replayed as the passes and events that it was recorded from. Knows nothing of files or caches.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moe_infinity.errors import TraceError
from moe_infinity.tracing.event import Event
from moe_infinity.types import ExpertShape, Phase

PHASES: tuple[Phase, ...] = ("prefill", "decode")  # by their number in a trace
_NUMBER: dict[str, int] = {name: number for number, name in enumerate(PHASES)}
MISSING = -1  # an expert id that was not recorded, or no expert


@dataclass(frozen=True)
class TracePass:
    """One forward pass: its events in the order of layers.

    starts_request: the first pass of a ``generate`` call, of one row or several.
    token_ids: [T], None where unknown. embeddings: [T, H]. foresight: [T, L, D, E], by mode; see
    Trace.
    """

    step: int
    phase: Phase
    starts_request: bool
    events: list[Event]
    token_ids: NDArray[np.int64] | None
    embeddings: NDArray[np.float16] | None
    foresight: dict[str, NDArray[np.float16]]


@dataclass(frozen=True)
class Trace:
    """Routing of many tokens. T: tokens, L: MoE layers, K: top-k, E: experts, H: hidden size.

    Tokens of one forward pass share a ``step``; rows are in order of steps. ``foresight`` holds
    what the routers of the D next layers say to an input seen at a layer, by the mode of that
    input (see predictors/base.py), as scores before softmax.
    """

    shape: ExpertShape
    step: NDArray[np.int32]  # [T]
    request: NDArray[np.int32]  # [T]
    position: NDArray[np.int32]  # [T] in its request
    phase: NDArray[np.int8]  # [T] index into PHASES, -1 unknown
    ids: NDArray[np.int16]  # [T, L, K]
    weights: NDArray[np.float32]  # [T, L, K]
    token_ids: NDArray[np.int32]  # [T] -1 unknown
    logits: NDArray[np.float16] | None = None  # [T, L, E]
    hidden: NDArray[np.float16] | None = None  # [T, L, H] the router's input
    embeddings: NDArray[np.float16] | None = None  # [T, H]
    foresight: dict[str, NDArray[np.float16]] = field(default_factory=dict)  # [T, L, D, E]
    meta: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check(self)

    @property
    def num_tokens(self) -> int:
        return len(self.step)

    @property
    def name(self) -> str:
        return str(self.meta.get("name") or self.meta.get("model") or "trace")

    @property
    def fingerprint(self) -> str | None:
        """Of the checkpoint it was recorded from, where that is known."""
        value = self.meta.get("fingerprint")
        return str(value) if value else None

    def domain(self, request: int) -> str:
        """What the request's prompt is about, where the recording says so."""
        names = self.meta.get("domains") or {}
        return str(names.get(str(request), "unknown"))

    def select(self, rows: NDArray[np.bool_]) -> Trace:
        """The tokens of ``rows`` [T] only."""

        def cut(array: NDArray[Any] | None) -> Any:
            return None if array is None else array[rows]

        return replace(
            self,
            **{name: cut(getattr(self, name)) for name in _PER_TOKEN},
            foresight={mode: cut(scores) for mode, scores in self.foresight.items()},
        )

    def of_phase(self, phase: str) -> Trace:
        """Tokens of "prefill", "decode" or "all"; raises TraceError where rows are incomplete."""
        chosen = self if phase == "all" else self.select(np.equal(self.phase, _NUMBER[phase]))
        chosen.require_complete(phase)
        return chosen

    def split(self, history_requests: int) -> tuple[Trace, Trace]:
        """The first requests, and the others."""
        early = np.isin(self.request, np.unique(self.request)[:history_requests])
        return self.select(early), self.select(~early)

    def require_complete(self, phase: str = "all") -> None:
        """Raise TraceError if a layer that ran has tokens without any expert recorded."""
        if self.num_tokens == 0:
            raise TraceError(f"{self.name}: got no tokens of phase {phase!r}; expected some")
        if self.meta.get("complete"):  # -1 is no expert then: a dropped token
            return
        absent = (self.ids < 0).all(axis=2)  # [T, L]
        starts = np.flatnonzero(np.diff(self.step, prepend=self.step[0] - 1))
        missing = np.add.reduceat(absent, starts, axis=0)
        tokens = np.diff(np.append(starts, self.num_tokens))[:, None]
        partial = (missing > 0) & (missing < tokens)
        if partial.any():
            at, layer = np.argwhere(partial)[0]
            raise TraceError(
                f"{self.name}: step {self.step[starts[at]]}, layer {layer}: "
                f"{missing[at, layer]} of {tokens[at, 0]} tokens have no experts recorded (-1), "
                f"expected all of them; choose another phase (these are phase {phase!r})"
            )

    def passes(self) -> Iterator[TracePass]:
        """Forward passes in order."""
        starts = np.flatnonzero(np.diff(self.step, prepend=-1))
        bounds = [*starts.tolist(), self.num_tokens]
        running: set[int] = set()
        for first, end in pairwise(bounds):
            requests = self.request[first:end]
            members = set(requests.tolist())
            starts_request = not members & running
            running = members if starts_request else running | members
            yield self._pass(slice(first, end), starts_request)

    def _pass(self, rows: slice, starts_request: bool) -> TracePass:
        phase = PHASES[max(0, int(self.phase[rows.start]))]
        if self.phase[rows.start] < 0:
            phase = "decode" if rows.stop - rows.start == 1 else "prefill"
        return TracePass(
            step=int(self.step[rows.start]),
            phase=phase,
            starts_request=starts_request,
            events=self._events(rows, phase),
            token_ids=self._known_ids(rows),
            embeddings=None if self.embeddings is None else self.embeddings[rows],
            foresight={mode: scores[rows] for mode, scores in self.foresight.items()},
        )

    def _known_ids(self, rows: slice) -> NDArray[np.int64] | None:
        ids = self.token_ids[rows].astype(np.int64)
        return None if (ids < 0).any() else ids

    def _events(self, rows: slice, phase: Phase) -> list[Event]:
        ids = self.ids[rows].astype(np.int64)
        request_rows = np.unique(self.request[rows], return_inverse=True)[1]
        events = []
        for layer in range(self.shape.num_layers):
            if (ids[:, layer] < 0).all():
                continue  # the layer did not run: the other half of an encoder-decoder model
            events.append(
                Event(
                    step=int(self.step[rows.start]),
                    phase=phase,
                    layer=layer,
                    request_rows=request_rows,
                    top_k_index=ids[:, layer],
                    top_k_weights=self.weights[rows, layer],
                    num_experts=self.shape.num_experts,
                    router_logits=_layer(self.logits, rows, layer),
                    router_input=_layer(self.hidden, rows, layer),
                )
            )
        return events


_PER_TOKEN = (
    *("step", "request", "position", "phase", "ids", "weights", "token_ids"),
    *("logits", "hidden", "embeddings"),
)


def _layer(
    array: NDArray[np.float16] | None, rows: slice, layer: int
) -> NDArray[np.float32] | None:
    return None if array is None else array[rows, layer].astype(np.float32)


def _check(trace: Trace) -> None:
    """Raise TraceError unless every array fits the shape and every id names an expert."""
    shape, tokens = trace.shape, trace.num_tokens
    grid = (tokens, shape.num_layers)
    expected = {name: (tokens,) for name in _PER_TOKEN} | {
        "ids": (*grid, shape.top_k),
        "weights": (*grid, shape.top_k),
        "logits": (*grid, shape.num_experts),
        "hidden": (*grid, None),
        "embeddings": (tokens, None),
    }
    arrays = {name: getattr(trace, name) for name in _PER_TOKEN}
    expected |= {f"foresight.{mode}": (*grid, None, shape.num_experts) for mode in trace.foresight}
    arrays |= {f"foresight.{mode}": scores for mode, scores in trace.foresight.items()}
    for name, array in arrays.items():
        if array is not None and not _fits(array.shape, expected[name]):
            raise TraceError(f"{trace.name}: {name} is {array.shape}, expected {expected[name]}")
    limits = np.array(shape.experts_per_layer)[None, :, None]
    wrong = (trace.ids < MISSING) | (trace.ids >= limits)
    if wrong.any():
        token, layer, slot = np.argwhere(wrong)[0]
        raise TraceError(
            f"{trace.name}: token {token}, layer {layer} has expert {trace.ids[token, layer, slot]}"
            f", expected 0 to {shape.experts_per_layer[layer] - 1} or -1"
        )
    if (np.diff(trace.step) < 0).any():
        raise TraceError(f"{trace.name}: steps run backwards, expected rows in order of steps")


def _fits(got: tuple[int, ...], expected: tuple[int | None, ...]) -> bool:
    return len(got) == len(expected) and all(
        want is None or have == want for have, want in zip(got, expected, strict=True)
    )
