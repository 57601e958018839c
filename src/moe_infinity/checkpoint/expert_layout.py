"""Finds every routed expert's bytes in a checkpoint, by the library's own conversion mapping."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Container, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from moe_infinity.checkpoint.base import TensorEntry
from moe_infinity.checkpoint.direct_io import align_down, align_up
from moe_infinity.checkpoint.virtual import Collected, Piece, Virtual, run_operations
from moe_infinity.errors import CorruptCheckpointError, UnsupportedModelError
from moe_infinity.types import Block, ExpertKey, ExpertSpec, Part, ReadRange

# Reading this much for nothing costs less than a second request to the SSD.
_JOIN_GAP_BYTES = 64 * 1024
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
) -> ExpertTensors:
    """Tell expert tensors from dense ones and assemble the former into virtual parameters.

    entries: in natural order of their names, as loading takes them. rule: the library's renaming.
    expert_params: shapes of the routed experts' parameters by name. known: all of the model's
    parameters and buffers; what goes to none of them (extra prediction heads) is left out.
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
    _refuse_incomplete(found.params, expert_params)
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
    params: Mapping[str, Virtual], expected: Mapping[str, tuple[int, ...]]
) -> None:
    missing = [name for name in expected if name not in params]
    if missing:
        raise CorruptCheckpointError(
            f"got no tensors for {len(missing)} expert parameters (first: {missing[0]!r}), "
            f"expected all {len(expected)}; is a shard missing, or is this not the checkpoint of "
            f"its config?"
        )
    for name, shape in expected.items():
        if params[name].shape != shape:
            raise CorruptCheckpointError(
                f"expert parameter {name!r} has shape {list(params[name].shape)} in the "
                f"checkpoint, expected {list(shape)} from its config"
            )


def build_specs(
    layer: int, params: Mapping[str, Virtual], item_bytes: ItemBytes
) -> list[ExpertSpec]:
    """One spec per expert of a layer; params: its parameters by short name ([E, ...] each)."""
    rows = {name: virtual.unstack() for name, virtual in params.items()}
    num_experts = len(next(iter(rows.values())))
    return [
        _spec(ExpertKey(layer, e), {name: row[e] for name, row in rows.items()}, item_bytes)
        for e in range(num_experts)
    ]


@dataclass(frozen=True, slots=True)
class Span:
    """Bytes of one file that an expert needs."""

    file: int
    start: int
    end: int


def _spec(key: ExpertKey, parts: Mapping[str, Virtual], item_bytes: ItemBytes) -> ExpertSpec:
    pieces = [p for virtual in parts.values() for p in virtual.pieces]
    needed = _join([_span(p, item_bytes) for p in pieces], max_gap=0)
    needed_bytes = sum(span.end - span.start for span in needed)
    ranges = read_ranges(needed)
    weight_bytes = sum(_num_items(p) * item_bytes[p.entry.format] for p in pieces)
    if needed_bytes > _MAX_READ_AMPLIFICATION * weight_bytes:
        raise UnsupportedModelError(
            f"{key}: its {weight_bytes} bytes lie scattered over {needed_bytes}; experts that are "
            f"interleaved with one another cannot be streamed in place"
        )
    built = tuple(_part(name, v, ranges, item_bytes) for name, v in parts.items())
    return ExpertSpec(key, built, tuple(ranges), weight_bytes)


def read_ranges(needed: list[Span]) -> list[ReadRange]:
    """How to read them into a slot: whole pages, and what lies close together at once."""
    gap = min(_JOIN_GAP_BYTES, sum(span.end - span.start for span in needed) // 8)
    ranges, end_offset = [], 0
    for span in _join(needed, gap):
        start, end = align_down(span.start), align_up(span.end)
        ranges.append(ReadRange(span.file, start, end - start, span.end - start, end_offset))
        end_offset += end - start
    return ranges


def _part(name: str, virtual: Virtual, ranges: list[ReadRange], item_bytes: ItemBytes) -> Part:
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
    item = item_bytes[virtual.pieces[0].entry.format]
    blocks = [
        Block(_slot_offset(p, ranges, item), p.shape, p.strides, p.origin[dim])
        for p in sorted(virtual.pieces, key=lambda p: p.origin[dim])
    ]
    return Part(name, formats.pop(), virtual.shape, dim, tuple(_merge_blocks(blocks, dim, item)))


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


def _slot_offset(piece: Piece, ranges: list[ReadRange], item: int) -> int:
    return slot_offset(ranges, piece.entry.file, piece.entry.offset + piece.offset * item)


def slot_offset(ranges: list[ReadRange], file: int, start: int) -> int:
    """Where byte ``start`` of a file lies in the slot."""
    for r in ranges:  # by what it needs: ranges that share a page overlap in what they read
        if r.file == file and r.file_offset <= start < r.file_offset + r.needed_bytes:
            return r.slot_offset + start - r.file_offset
    raise AssertionError(f"no range holds byte {start} of file {file}")


def _span(piece: Piece, item_bytes: ItemBytes) -> Span:
    item = item_bytes[piece.entry.format]
    start = piece.entry.offset + piece.offset * item
    extent = 1 + sum((n - 1) * s for n, s in zip(piece.shape, piece.strides, strict=True))
    return Span(piece.entry.file, start, start + extent * item)


def _join(spans: list[Span], max_gap: int) -> list[Span]:
    joined: list[Span] = []
    for span in sorted(spans, key=lambda s: (s.file, s.start)):
        last = joined[-1] if joined else None
        if last and last.file == span.file and span.start <= last.end + max_gap:
            joined[-1] = Span(span.file, last.start, max(last.end, span.end))
        else:
            joined.append(span)
    return joined


def _num_items(piece: Piece) -> int:
    count = 1
    for size in piece.shape:
        count *= size
    return count
