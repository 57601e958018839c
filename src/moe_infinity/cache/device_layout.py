"""How an expert lies in device memory: as in its host slot, without what reading left between.

Where an expert begins in a host slot depends on where it begins in its file. On a device those of a
layer lie alike, so that a kernel which knows a slot's address knows where everything is.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

from moe_infinity.kernels.formats import SIDE_DTYPES, span_bytes
from moe_infinity.kernels.packed import PACKED
from moe_infinity.types import Block, ExpertKey, ExpertSpec, Part, Plane

ALIGNMENT_BYTES = 16  # what one thread copies at once; below it places stay as they are


class Segment(NamedTuple):
    """Bytes that are copied together: ``start`` in the host slot, ``target`` on the device."""

    start: int
    num_bytes: int
    target: int


@dataclass(frozen=True, slots=True)
class DeviceLayout:
    """spec: with the places that parts have on the device. Segments are multiples of 16 bytes and
    in ascending order."""

    spec: ExpertSpec
    segments: tuple[Segment, ...]


def device_layouts(specs: Mapping[ExpertKey, ExpertSpec]) -> dict[ExpertKey, DeviceLayout]:
    """Of every expert; devices of one model share them."""
    return {key: device_layout(spec) for key, spec in specs.items()}


def device_layout(spec: ExpertSpec) -> DeviceLayout:
    """Of one expert, from how it lies in its host slot."""
    segments: list[Segment] = []
    target = 0
    for start, end in _merged(sorted(_extents(spec))):
        segments.append(Segment(start, end - start, target))
        target += end - start
    parts = tuple(_moved(part, segments) for part in spec.parts)
    return DeviceLayout(replace(spec, parts=parts), tuple(segments))


def _merged(extents: list[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Widened to multiples of 16 bytes; what touches then goes together."""
    begun: tuple[int, int] | None = None
    for start, end in extents:
        start = start // ALIGNMENT_BYTES * ALIGNMENT_BYTES
        end = -(-end // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
        if begun is not None and start <= begun[1]:
            begun = (begun[0], max(begun[1], end))
            continue
        if begun is not None:
            yield begun
        begun = (start, end)
    if begun is not None:
        yield begun


def _extents(spec: ExpertSpec) -> Iterator[tuple[int, int]]:
    """Bytes of every block and plane. Codes that say themselves how long they are end where the
    next block begins, or the slot."""
    blocks = [(part, block) for part in spec.parts for block in part.blocks]
    starts = sorted({start for _, block in blocks for start in _starts(block)} | {spec.slot_bytes})
    for part, block in blocks:
        start = block.offset_bytes
        if part.format in PACKED:
            yield start, next(each for each in starts if each > start)
        else:
            yield start, start + span_bytes(block.shape, block.strides, SIDE_DTYPES[part.format])
        for plane in (block.scales, block.zeros):
            if plane is not None:
                size = span_bytes(plane.shape, plane.strides, SIDE_DTYPES[plane.format])
                yield plane.offset_bytes, plane.offset_bytes + size


def _starts(block: Block) -> Iterator[int]:
    yield block.offset_bytes
    for plane in (block.scales, block.zeros):
        if plane is not None:
            yield plane.offset_bytes


def _moved(part: Part, segments: list[Segment]) -> Part:
    def moved(offset: int) -> int:
        here = next(s for s in segments if s.start <= offset < s.start + s.num_bytes)
        return offset - here.start + here.target

    def plane(old: Plane | None) -> Plane | None:
        return None if old is None else replace(old, offset_bytes=moved(old.offset_bytes))

    blocks = tuple(
        replace(
            block,
            offset_bytes=moved(block.offset_bytes),
            scales=plane(block.scales),
            zeros=plane(block.zeros),
        )
        for block in part.blocks
    )
    return replace(part, blocks=blocks)
