"""The experts function registered with transformers: routing in, weighted sum of experts out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from moe_infinity.cache.base import Compute, Hierarchy
from moe_infinity.config import PREFILL_CHUNK_TOKENS
from moe_infinity.heap import Heap
from moe_infinity.kernels.base import ExpertKernel, ExpertMath, Views
from moe_infinity.model.directed import DirectedExperts
from moe_infinity.model.elsewhere import Elsewhere, Trip
from moe_infinity.model.observer import LONE, Observer, Seen
from moe_infinity.model.rules import RoutingRule
from moe_infinity.model.taps import Step
from moe_infinity.predictors.base import Foresight
from moe_infinity.tracing.event import Event
from moe_infinity.tracing.recorder import Recorder
from moe_infinity.types import ExpertKey

# Tokens whose weighted outputs are held at once beside the outputs themselves.
_COMBINE_TOKENS = 256
_FIRST_ROW = np.zeros(1, dtype=np.int64)  # of a lone token


@dataclass
class Runtime:
    """What the layers of one opened model share."""

    hierarchy: Hierarchy
    kernel: ExpertKernel
    routing: RoutingRule
    recorder: Recorder
    step: Step
    heap: Heap
    host_kernel: ExpertKernel | None = None  # of misses that are computed in RAM beside a device
    directed: DirectedExperts | None = None  # None: the device cannot direct its experts itself
    elsewhere: Elsewhere | None = None  # None: experts lie on no other device than the model's
    observer: Observer | None = None  # None: nobody asked to see more than the routing


class ExpertsLayer:
    """Computes one MoE layer through the cache; an adapter makes the model call ``forward``.

    T: tokens, K: top-k, H: hidden size. Each expert's output goes to its own (token, slot) place
    and the sum over slots is taken in their order, so the result does not depend on which expert
    arrived first.
    """

    def __init__(
        self,
        layer: int,
        num_experts: int,
        math: ExpertMath,
        runtime: Runtime,
        routes_padding: bool = False,
    ) -> None:
        self.layer = layer
        self.num_experts = num_experts
        self.math = math
        self._runtime = runtime
        self._routes_padding = routes_padding

    @property
    def hierarchy(self) -> Hierarchy:
        return self._runtime.hierarchy

    def forward(
        self, x: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """x [T, H], top_k_index (no expert: outside 0..E-1) and top_k_weights [T, K] -> [T, H]."""
        top_k_index, top_k_weights = self._runtime.routing.select(
            self.layer, top_k_index, top_k_weights
        )
        directed = self._runtime.directed
        if directed is not None and directed.is_on:
            return directed.run(self.layer, x, top_k_index, top_k_weights)
        x = x.contiguous()
        num_tokens = x.shape[0]
        step = self._runtime.step
        ids = top_k_index.numpy(force=True).astype(np.int64)
        real = None if self._routes_padding else step.real_tokens(num_tokens)
        if real is not None:
            ids = np.where(real[:, None], ids, -1)
        rows = step.request_rows(num_tokens)
        chunks = [
            self._chunk(s.start, x[s], ids[s], top_k_weights[s], rows[s])
            for s in _slices(num_tokens, PREFILL_CHUNK_TOKENS)
        ]
        return chunks[0] if len(chunks) == 1 else torch.cat(chunks)

    def run_token(
        self,
        x: torch.Tensor,
        ids: NDArray[np.int64],
        weights: NDArray[np.float32],
        logits: torch.Tensor,
        compute: Compute,
        out: torch.Tensor,
    ) -> None:
        """Bring the experts of one token x [1, H] to ``compute``, which puts each one's result into
        its row of out [K, H]; its router, which said logits [1, E], chose ids and weights [1, K],
        all different."""
        observer = self._runtime.observer
        seen = Seen()
        if observer is not None:
            seen = observer.see_token(self.layer, x, logits, ids, weights)
        event = self._event(ids, weights, _FIRST_ROW, LONE, seen)
        self._run(event, compute, seen, (x, out), lambda: _places_by_expert(ids, ids >= 0))
        self._runtime.recorder.record(event)

    def run_chosen(
        self,
        x: torch.Tensor,
        ids: NDArray[np.int64],
        weights: NDArray[np.float32],
        foreseen: NDArray[np.float32] | None,
        compute: Compute,
        out: torch.Tensor,
    ) -> None:
        """The same where nobody ``is_observed``. foreseen: [1, D, E] what the next layers' routers
        say, if they were asked."""
        event, seen = self._chosen_event(ids, weights), Seen(foreseen=foreseen)
        self._run(event, compute, seen, (x, out), lambda: _places_by_expert(ids, ids >= 0))
        self._runtime.recorder.record(event)

    @property
    def is_observed(self) -> bool:
        """Whether somebody wants to see more of this pass's events than ``told`` is given, and a
        predictor than is foreseen for it."""
        observer = self._runtime.observer
        return observer is not None and observer.records_routers

    def changes(self, outlook: Foresight) -> NDArray[np.float32] | None:
        """What is added to the router's input [H] before later ones are shown it, [depth, H]; None:
        nothing."""
        observer = self._runtime.observer
        if observer is None or outlook.mode != "residual":
            return None
        return observer.changes(self.layer, outlook.depth)

    def learn_input(self, x: torch.Tensor) -> None:
        """What the layer's router was shown [1, H], for whoever learns from that in this pass."""
        observer = self._runtime.observer
        if observer is not None and observer.is_learning:
            observer.learn_input(self.layer, x)

    def told(self, ids: NDArray[np.int64], weights: NDArray[np.float32]) -> Event:
        """The event of one token whose experts were asked already; its router chose ids and weights
        [1, K]."""
        event = self._chosen_event(ids, weights)
        self._runtime.recorder.record(event)
        return event

    def _chosen_event(self, ids: NDArray[np.int64], weights: NDArray[np.float32]) -> Event:
        if self._runtime.observer is not None:
            self._runtime.observer.note_token(self.layer, ids, weights)
        return self._event(ids, weights, _FIRST_ROW, LONE, Seen())

    def _chunk(
        self,
        start: int,
        x: torch.Tensor,
        ids: NDArray[np.int64],
        weights: torch.Tensor,
        rows: NDArray[np.int64],
    ) -> torch.Tensor:
        num_tokens, top_k = ids.shape
        if self._runtime.step.phase == "prefill":
            self._runtime.heap.make_room()
        routed = (ids >= 0) & (ids < self.num_experts)
        places = _places_by_expert(ids, routed)
        allocate = torch.empty if routed.all() else torch.zeros
        out = allocate((num_tokens * top_k, x.shape[-1]), dtype=x.dtype, device=x.device)

        # Before anything is launched: later the host would wait for that too.
        on_host = None if self._runtime.host_kernel is None else x.cpu()

        def compute(keys: list[ExpertKey], views: list[Views]) -> None:
            if views[0].on_host:
                assert on_host is not None, "misses are copied: nobody computes in RAM"
                self._compute_beside(on_host, out, views, [places[key.expert] for key in keys])
                return
            where = [places[key.expert] for key in keys]  # positions in [T * K]
            tokens = [place // top_k for place in where]
            self._runtime.kernel.run_placed(self.math, views, x, out, tokens, where)

        observer = self._runtime.observer
        real: NDArray[np.bool_] = np.any(routed, axis=1)
        values = weights.float().numpy(force=True)
        seen = observer.see(self.layer, start, ids, values, real) if observer else Seen()
        event = self._event(ids, values, rows, real, seen)
        self._run(event, compute, seen, (x, out), lambda: places)
        self._runtime.recorder.record(event)
        out = out.view(num_tokens, top_k, -1)
        sums = [_combine(out[s], weights[s], x.dtype) for s in _slices(num_tokens, _COMBINE_TOKENS)]
        return sums[0] if len(sums) == 1 else torch.cat(sums)

    def _run(
        self,
        event: Event,
        compute: Compute,
        seen: Seen,
        rows: tuple[torch.Tensor, torch.Tensor],
        places: Callable[[], dict[int, NDArray[np.int64]]],
    ) -> None:
        """rows: the event's tokens and its results; places: those that are each expert's own."""
        if self._runtime.elsewhere is None:
            self._runtime.hierarchy.run_event(event, compute, seen.foreseen)
            return
        trip = Trip(self._runtime.elsewhere, self.layer, *rows, places())
        self._runtime.hierarchy.run_event(event, trip.around(compute), seen.foreseen)
        trip.bring_back()

    def _compute_beside(
        self,
        x: torch.Tensor,
        out: torch.Tensor,
        views: list[Views],
        where: list[NDArray[np.int64]],
    ) -> None:
        """On the processor what lies in RAM, for a model on a device: x is in RAM too, results are
        brought over. where: of each expert, its positions in out [T * K, H]."""
        assert self._runtime.host_kernel is not None, "misses are copied: nobody computes in RAM"
        top_k = len(out) // len(x)
        places = torch.from_numpy(np.concatenate(where))
        results = torch.empty((len(places), out.shape[-1]), dtype=out.dtype)
        ends = np.cumsum([len(each) for each in where])
        rows = np.split(np.arange(len(places)), ends[:-1])
        tokens = [each // top_k for each in where]
        self._runtime.host_kernel.run_placed(self.math, views, x, results, tokens, rows)
        out[places.to(out.device)] = results.to(out.device)

    def _event(
        self,
        ids: NDArray[np.int64],
        values: NDArray[np.float32],
        rows: NDArray[np.int64],
        real: NDArray[np.bool_],
        seen: Seen,
    ) -> Event:
        if not real.all():
            ids, values, rows = ids[real], values[real], rows[real]
        step = self._runtime.step
        return Event(
            step.number,
            step.phase,
            self.layer,
            rows,
            ids,
            values,
            self.num_experts,
            seen.router_logits,
            seen.router_input,
        )


def _places_by_expert(
    ids: NDArray[np.int64], routed: NDArray[np.bool_]
) -> dict[int, NDArray[np.int64]]:
    """For each expert, the ascending flat (token, slot) places that chose it."""
    flat = ids.ravel()
    if len(ids) == 1 and len(set(flat.tolist())) == len(flat):  # decode: no need to sort
        return {int(flat[at]): np.array([at]) for at in np.flatnonzero(routed.ravel())}
    order = np.argsort(flat, kind="stable")
    experts, starts = np.unique(flat[order], return_index=True)
    groups = np.split(order, starts[1:])
    return {
        int(expert): group
        for expert, group in zip(experts, groups, strict=True)
        if routed.ravel()[group[0]]
    }


def _combine(out: torch.Tensor, weights: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """out [T, K, H], weights [T, K] -> [T, H]: the sum over slots, in their order."""
    return (out * weights[..., None]).sum(dim=1).to(dtype)


def _slices(total: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, total)) for start in range(0, total, size)]
