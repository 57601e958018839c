"""Slots in size classes: layers whose experts have about the same size share slots."""

from __future__ import annotations

from dataclasses import dataclass

from moe_infinity.checkpoint.direct_io import align_up
from moe_infinity.model.loading import Anatomy


@dataclass(frozen=True)
class SizeClass:
    """Slots of one size, and the layers that use them."""

    slot_bytes: int
    num_layers: int
    num_experts: int


def size_classes(anatomy: Anatomy) -> tuple[list[SizeClass], tuple[int, ...]]:
    """Layers whose experts have about the same size share slots."""
    weight = [0] * anatomy.shape.num_layers
    slot = [0] * anatomy.shape.num_layers
    for key, spec in anatomy.specs.items():
        weight[key.layer] = max(weight[key.layer], spec.weight_bytes)
        slot[key.layer] = max(slot[key.layer], align_up(spec.slot_bytes))
    bounds = _class_bounds(sorted(set(weight)))
    class_of_layer = tuple(next(i for i, b in enumerate(bounds) if w <= b) for w in weight)
    classes = []
    for number in range(len(bounds)):
        layers = [layer for layer, c in enumerate(class_of_layer) if c == number]
        experts = sum(anatomy.shape.experts_per_layer[layer] for layer in layers)
        classes.append(SizeClass(max(slot[layer] for layer in layers), len(layers), experts))
    return classes, class_of_layer


def _class_bounds(sizes: list[int]) -> list[int]:
    """Upper bounds of classes within which sizes differ by less than an eighth."""
    kept: list[int] = []
    for size in reversed(sizes):
        if not kept or size < kept[-1] * 7 // 8:
            kept.append(size)
    return kept[::-1]


def smallest_cache(anatomy: Anatomy, classes: list[SizeClass]) -> list[tuple[int, SizeClass]]:
    return [(min(anatomy.shape.top_k, c.num_experts), c) for c in classes]


def divide(
    room: int, smallest: list[tuple[int, SizeClass]], ram_slots: int | None
) -> tuple[int, ...]:
    """Slots per class, bounded by bytes and, with ``ram_slots``, by number."""
    needed = [n for n, _ in smallest]
    counts = [c.num_experts for _, c in smallest]
    by_bytes = _portion(room, [c.slot_bytes for _, c in smallest], needed, counts)
    if ram_slots is None:
        return by_bytes
    by_number = _portion(ram_slots, [1] * len(counts), needed, counts)
    return tuple(map(min, by_bytes, by_number))


def _portion(room: int, prices: list[int], needed: list[int], counts: list[int]) -> tuple[int, ...]:
    """What each class needs, then the same share of its other experts for every class."""
    price = sum(n * p for n, p in zip(needed, prices, strict=True))
    if room < price:  # will be refused; this is what there is room for
        return tuple(n * max(0, room) // price for n in needed)
    others = [count - n for count, n in zip(counts, needed, strict=True)]
    total = sum(n * p for n, p in zip(others, prices, strict=True))
    rest = min(room - price, total)
    return tuple(n + (o * rest // total if o else 0) for n, o in zip(needed, others, strict=True))
