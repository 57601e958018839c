"""Small expert grids, events and traces for tests."""

from collections.abc import Iterable, Sequence

import numpy as np

from moe_infinity.policies import find_policy
from moe_infinity.residency.directory import Directory, State
from moe_infinity.residency.residency import Residency
from moe_infinity.residency.running import Load, Lookup
from moe_infinity.stats import Counters
from moe_infinity.tracing.event import Event
from moe_infinity.types import ExpertKey, ExpertShape, Phase


def grid(
    num_layers: int, num_experts: int, top_k: int = 2, per_layer: Sequence[int] = ()
) -> ExpertShape:
    counts = tuple(per_layer) or (num_experts,) * num_layers
    return ExpertShape(num_layers, num_experts, top_k, counts)


def event(
    layer: int,
    experts: Iterable[int],
    num_experts: int,
    phase: Phase = "decode",
    step: int = 0,
    counts: Sequence[int] = (),
) -> Event:
    """An event that touches ``experts``; counts: tokens of each of them, one if not given."""
    chosen = list(experts)
    tokens = np.repeat(chosen, list(counts) or [1] * len(chosen)).astype(np.int64)
    index = tokens[None, :] if phase == "decode" else tokens[:, None]  # [T, K]
    return Event(
        step=step,
        phase=phase,
        layer=layer,
        request_rows=np.zeros(len(index), dtype=np.int64),
        top_k_index=index,
        top_k_weights=np.full(index.shape, 0.5, dtype=np.float32),
        num_experts=num_experts,
    )


def random_decode(shape: ExpertShape, num_passes: int, seed: int) -> list[Event]:
    """Decode passes over all layers with the locality of real routing: some experts are popular,
    and neighbouring tokens share about half of theirs."""
    rng = np.random.default_rng(seed)
    weights = rng.random((shape.num_layers, shape.num_experts)) ** 3
    last: list[set[int]] = [set() for _ in range(shape.num_layers)]
    events = []
    for step in range(num_passes):
        for layer in range(shape.num_layers):
            count = shape.experts_per_layer[layer]
            chance = weights[layer, :count] / weights[layer, :count].sum()
            fresh = rng.choice(count, size=shape.top_k, replace=False, p=chance)
            kept = [e for e in sorted(last[layer]) if rng.random() < 0.5]
            chosen = (kept + [int(e) for e in fresh if e not in kept])[: shape.top_k]
            last[layer] = set(chosen)
            events.append(event(layer, sorted(chosen), shape.num_experts, step=step))
    return events


def new_residency(
    shape: ExpertShape,
    slots_per_class: Sequence[int],
    policy: str = "lru",
    class_of_layer: Sequence[int] = (),
) -> Residency:
    """A residency whose layer i loads 100 + i bytes per expert, so that bytes can be checked."""
    layers = tuple(class_of_layer) or (0,) * shape.num_layers
    directory = Directory(shape, tuple(slots_per_class), layers)
    chosen = find_policy(policy)(shape, directory.num_slots)
    counters = Counters([100 + layer for layer in range(shape.num_layers)])
    return Residency(directory, chosen, counters)


class Driver:
    """Serves events like the live tier, with a disk that completes loads in an order of its own.

    rng None: loads are complete as soon as they begin. log: every decision, in order.
    """

    def __init__(self, residency: Residency, rng: np.random.Generator | None = None) -> None:
        self.residency = residency
        self.rng = rng
        self.in_flight: list[ExpertKey] = []
        self.log: list[Load] = []
        self.lookups: list[Lookup] = []

    def run(self, event: Event, prefetch: Iterable[ExpertKey] = ()) -> Lookup:
        """One event from look-up to end; members are computed in the order the tier would."""
        residency = self.residency
        found = residency.begin_event(event)
        self.lookups.append(found)
        for key in found.disproved:
            self.in_flight.remove(key)
            residency.fail(key)
        pending = sorted(found.hits + found.late)
        pending += self._admit()
        self.begin(residency.prefetch(prefetch, event.layer))
        computed = []
        while not residency.is_done:
            pending += self._admit()
            key = self._next_ready(pending, event.phase)
            if key is None:
                assert self.in_flight, "no progress: nothing to compute and nothing in flight"
                self._complete_some(at_least=1)
                continue
            pending.remove(key)
            residency.finish(key)
            computed.append(key)
            self._complete_some()
            residency.directory.check_integrity()
        residency.end_event()
        assert sorted(computed) == event.keys, "a member was computed twice or never"
        return found

    def _admit(self) -> list[ExpertKey]:
        members = self.residency.admit()
        self.begin(members)
        self.begin(self.residency.stream_ahead())
        return [load.key for load in members]

    def begin(self, loads: list[Load]) -> None:
        self.log += loads
        self.in_flight += [load.key for load in loads]
        if self.rng is None:
            self._complete_some(at_least=len(self.in_flight))

    def _complete_some(self, at_least: int = 0) -> None:
        count = at_least
        if self.rng is not None:
            self.rng.shuffle(self.in_flight)  # type: ignore[arg-type]
            count = max(at_least, int(self.rng.integers(len(self.in_flight) + 1)))
        done, self.in_flight = self.in_flight[:count], self.in_flight[count:]
        for key in done:
            self.residency.complete(ExpertKey(*key))

    def _next_ready(self, pending: list[ExpertKey], phase: Phase) -> ExpertKey | None:
        state = self.residency.directory.state
        ready = [k for k in pending if state(k) is State.RESIDENT]
        if phase == "prefill":
            return pending[0] if pending and pending[0] in ready else None
        if not ready:
            return None
        return ready[0 if self.rng is None else int(self.rng.integers(len(ready)))]
