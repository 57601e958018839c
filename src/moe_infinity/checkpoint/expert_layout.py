"""Finds every routed expert's bytes in a checkpoint, by the library's own conversion mapping."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Protocol

from moe_infinity.checkpoint.base import Sides, TensorEntry
from moe_infinity.checkpoint.coded_place import CodedPlace
from moe_infinity.checkpoint.spans import Span, join, read_ranges, slot_offset
from moe_infinity.checkpoint.virtual import Collected, Piece, Virtual, run_operations
from moe_infinity.errors import CorruptCheckpointError, UnsupportedModelError
from moe_infinity.kernels.planes import PLANES
from moe_infinity.types import Block, ExpertKey, ExpertSpec, Part, ReadRange

# An expert whose bytes lie scattered over more than this many times its size cannot be streamed.
_MAX_READ_AMPLIFICATION = 2.0

ItemBytes = Mapping[str, int]


@dataclass(slots=True)
class ExpertTensors:
    """What the checkpoint's names turned out to be."""

    dense: list[str] = field(default_factory=list)  # names of tensors that stay resident
    params: dict[str, Virtual] = field(default_factory=dict)  # by the model's parameter name


@dataclass(frozen=True, slots=True)
class NameRule:
    """Where one checkpoint tensor goes: a parameter, through a converter or as it is."""

    parameter: str
    pattern: str | None
    converter: Any


def sort_tensors(
    entries: Iterable[TensorEntry],
    rule: Callable[[str], NameRule],
    expert_params: Mapping[str, tuple[int, ...]],
    known: Container[str],
    transposed: Container[str] = (),
) -> ExpertTensors:
    """Tell expert tensors from dense ones and assemble the former into virtual parameters.

    entries: in natural order of their names, as loading takes them. rule: the library's renaming.
    expert_params: shapes of the routed experts' parameters by name. known: all of the model's
    parameters and buffers; what goes to none of them (extra prediction heads) is left out.
    transposed: expert parameters that the model holds [in, out]; coded matrices are [out, in].
    """
    found = ExpertTensors()
    groups: dict[str, Collected] = defaultdict(lambda: defaultdict(list))
    converters: dict[str, Any] = {}
    for entry in entries:
        named = rule(entry.name)
        if named.parameter not in expert_params:
            if named.parameter in known:
                found.dense.append(entry.name)
            continue
        groups[named.parameter][named.pattern or entry.name].append(Virtual.of(entry))
        converters[named.parameter] = named.converter
    for parameter, collected in groups.items():
        for name, virtual in _convert(parameter, collected, converters[parameter], expert_params):
            found.params[name] = virtual
    _refuse_incomplete(found.params, expert_params, transposed)
    return found


def _convert(
    parameter: str,
    collected: Collected,
    converter: Any,
    expected: Mapping[str, tuple[int, ...]],
) -> list[tuple[str, Virtual]]:
    if converter is None:
        parts = [part for found in collected.values() for part in found]
        if len(parts) > 1:
            raise CorruptCheckpointError(
                f"expert parameter {parameter!r} is in the checkpoint {len(parts)} times "
                f"({', '.join(sorted(collected)[:3])}); expected it once"
            )
        return [(parameter, parts[0])]
    results = run_operations(
        converter.operations,
        dict(collected),
        converter.source_patterns,
        converter.target_patterns,
        expected[parameter],
    )
    first = next(name for name in results if name in parameter)
    return [(parameter.replace(first, name), virtual) for name, virtual in results.items()]


def _refuse_incomplete(
    params: Mapping[str, Virtual],
    expected: Mapping[str, tuple[int, ...]],
    transposed: Container[str],
) -> None:
    missing = [name for name in expected if name not in params]
    if missing:
        raise CorruptCheckpointError(
            f"got no tensors for {len(missing)} expert parameters (first: {missing[0]!r}), "
            f"expected all {len(expected)}; is a shard missing, or is this not the checkpoint of "
            f"its config?"
        )
    for name, shape in expected.items():
        is_coded = any(piece.entry.format in PLANES for piece in params[name].pieces)
        if is_coded and name in transposed:
            shape = (*shape[:-2], *reversed(shape[-2:]))
        if params[name].shape != shape:
            raise CorruptCheckpointError(
                f"expert parameter {name!r} has shape {list(params[name].shape)} in the "
                f"checkpoint, expected {list(shape)} from its config"
            )


def build_specs(
    layer: int,
    params: Mapping[str, Virtual],
    item_bytes: ItemBytes,
    sides: Mapping[str, Sides] = MappingProxyType({}),
) -> list[ExpertSpec]:
    """One spec per expert of a layer; params: its parameters by short name ([E, ...] each).
    sides: of coded tensors, by name."""
    rows = {name: virtual.unstack() for name, virtual in params.items()}
    num_experts = len(next(iter(rows.values())))
    return [
        _spec(ExpertKey(layer, e), {name: row[e] for name, row in rows.items()}, item_bytes, sides)
        for e in range(num_experts)
    ]


def _spec(
    key: ExpertKey, parts: Mapping[str, Virtual], item_bytes: ItemBytes, sides: Mapping[str, Sides]
) -> ExpertSpec:
    places = {
        name: [_place(piece, item_bytes, sides) for piece in virtual.pieces]
        for name, virtual in parts.items()
    }
    spans = [span for found in places.values() for place in found for span in place.spans]
    needed = join(spans, max_gap=0)
    needed_bytes = sum(span.end - span.start for span in needed)
    weight_bytes = sum(place.num_bytes for found in places.values() for place in found)
    if needed_bytes > _MAX_READ_AMPLIFICATION * weight_bytes:
        raise UnsupportedModelError(
            f"{key}: its {weight_bytes} bytes lie scattered over {needed_bytes}; experts that are "
            f"interleaved with one another cannot be streamed in place"
        )
    ranges = read_ranges(needed)
    built = tuple(_part(name, v, places[name], ranges, item_bytes) for name, v in parts.items())
    return ExpertSpec(key, built, tuple(ranges), weight_bytes)


def _part(
    name: str,
    virtual: Virtual,
    places: list[Place],
    ranges: list[ReadRange],
    item_bytes: ItemBytes,
) -> Part:
    moving = [
        d for d in range(len(virtual.shape)) if len({p.origin[d] for p in virtual.pieces}) > 1
    ]
    formats = {p.entry.format for p in virtual.pieces}
    if len(moving) > 1 or len(formats) > 1:
        raise UnsupportedModelError(
            f"expert tensor {name!r} is put together along dimensions {moving} from formats "
            f"{sorted(formats)}; expected pieces of one format that follow one another"
        )
    dim = moving[0] if moving else 0
    placed = sorted(zip(virtual.pieces, places, strict=True), key=lambda each: each[0].origin[dim])
    blocks = [place.block(piece.origin[dim], ranges) for piece, place in placed]
    number_format = formats.pop()
    if number_format in PLANES:
        shape = (sum(block.shape[0] for block in blocks), blocks[0].shape[1])
        return Part(name, number_format, shape, 0, tuple(blocks))
    merged = _merge_blocks(blocks, dim, item_bytes[number_format])
    return Part(name, number_format, virtual.shape, dim, tuple(merged))


class Place(Protocol):
    """A piece's bytes: where they are, and how they lie in a slot."""

    @property
    def spans(self) -> Sequence[Span]: ...

    @property
    def num_bytes(self) -> int:
        """That the computation uses."""

    def block(self, origin: int, ranges: list[ReadRange]) -> Block: ...


def _place(piece: Piece, item_bytes: ItemBytes, sides: Mapping[str, Sides]) -> Place:
    if piece.entry.format in PLANES:
        return CodedPlace.of(piece, sides)
    return _PlainPlace(piece, item_bytes[piece.entry.format])


@dataclass(frozen=True, slots=True)
class _PlainPlace:
    piece: Piece
    item: int

    @property
    def spans(self) -> Sequence[Span]:
        piece = self.piece
        start = piece.entry.offset + piece.offset * self.item
        extent = 1 + sum((n - 1) * s for n, s in zip(piece.shape, piece.strides, strict=True))
        return (Span(piece.entry.file, start, start + extent * self.item),)

    @property
    def num_bytes(self) -> int:
        return math.prod(self.piece.shape) * self.item

    def block(self, origin: int, ranges: list[ReadRange]) -> Block:
        (span,) = self.spans
        at = slot_offset(ranges, span.file, span.start)
        return Block(at, self.piece.shape, self.piece.strides, origin)


def _merge_blocks(blocks: list[Block], dim: int, item: int) -> list[Block]:
    """Join blocks that continue one another in the slot, so that one product covers them."""
    merged = blocks[:1]
    for block in blocks[1:]:
        last = merged[-1]
        follows = last.offset_bytes + last.shape[dim] * last.strides[dim] * item
        if block.strides == last.strides and block.offset_bytes == follows:
            shape = list(last.shape)
            shape[dim] += block.shape[dim]
            merged[-1] = Block(last.offset_bytes, tuple(shape), last.strides, last.origin)
        else:
            merged.append(block)
    return merged
