"""Small expert grids, events and traces for tests."""

from collections.abc import Iterable, Sequence

import numpy as np

from moe_infinity.policies import find_policy
from moe_infinity.residency.directory import Directory
from moe_infinity.residency.residency import Load, Lookup, Residency
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


def serve(residency: Residency, event: Event) -> tuple[Lookup, list[Load]]:
    """Run one event with a disk that is infinitely fast. Returns the look-up and all its loads."""
    found = residency.begin_event(event)
    loads: list[Load] = []
    pending: list[ExpertKey] = found.hits + found.late
    for key in found.late:
        residency.complete(key)
    while not residency.is_done:
        begun = residency.admit()
        assert begun or pending, "no progress: nothing to compute and nothing admitted"
        for load in begun:
            residency.complete(load.key)
        loads += begun
        pending += [load.key for load in begun]
        residency.finish(pending.pop(0))
        residency.directory.check_integrity()
    residency.end_event()
    return found, loads
