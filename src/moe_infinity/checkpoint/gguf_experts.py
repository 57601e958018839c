"""Where the experts of a GGUF file lie: gate, up and down in three tensors of their block."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from moe_infinity.checkpoint.base import TensorEntry
from moe_infinity.checkpoint.spans import Span, read_ranges, slot_offset
from moe_infinity.errors import CorruptCheckpointError, UnsupportedModelError
from moe_infinity.kernels.formats import DTYPES
from moe_infinity.kernels.packed import PACKED
from moe_infinity.types import Block, ExpertKey, ExpertSpec, Part

EXPERTS = re.compile(r"blk\.(\d+)\.ffn_(gate|up|down)_exps\.weight")
CODED = tuple(name for name in PACKED if name != "EXACT12")  # that are computed as they are stored


def specs_of(
    path: Path, experts: Mapping[str, TensorEntry], num_blocks: int
) -> dict[ExpertKey, ExpertSpec]:
    """Of all experts; in these families every block has some."""
    by_block: dict[int, dict[str, TensorEntry]] = {}
    for name, entry in experts.items():
        match = EXPERTS.fullmatch(name)
        assert match is not None
        by_block.setdefault(int(match[1]), {})[match[2]] = entry
    if sorted(by_block) != list(range(len(by_block))) or len(by_block) != num_blocks:
        raise CorruptCheckpointError(
            f"{path}: has experts in {len(by_block)} blocks, expected them in each of {num_blocks}"
        )
    specs = {}
    for layer, block in enumerate(sorted(by_block)):
        entries = by_block[block]
        _require_fitting(path, block, entries)
        for expert in range(entries["gate"].shape[0]):
            specs[ExpertKey(layer, expert)] = _spec(ExpertKey(layer, expert), entries)
    return specs


def _require_fitting(path: Path, block: int, entries: Mapping[str, TensorEntry]) -> None:
    for name, entry in entries.items():
        if entry.format not in (*DTYPES, *CODED):
            raise UnsupportedModelError(
                f"{path}: block {block}: expert tensor {name!r} is stored as {entry.format}, "
                f"expected one of {', '.join((*DTYPES, *CODED))}; quantise the model otherwise"
            )
    shapes = {name: entry.shape for name, entry in entries.items()}
    gate, up, down = (shapes.get(name, ()) for name in ("gate", "up", "down"))
    if len(gate) != 3 or up != gate or down != (gate[0], gate[2], gate[1]):
        raise CorruptCheckpointError(
            f"{path}: block {block} has experts of shapes {shapes}, expected gate and up [E, I, H] "
            f"and down [E, H, I]"
        )
    if entries["gate"].format != entries["up"].format:
        raise UnsupportedModelError(
            f"{path}: block {block} stores gate as {entries['gate'].format} and up as "
            f"{entries['up'].format}, expected one form for both"
        )


def _spec(key: ExpertKey, entries: Mapping[str, TensorEntry]) -> ExpertSpec:
    spans = {name: _span(entry, key.expert) for name, entry in entries.items()}
    ranges = read_ranges(list(spans.values()))

    def block(name: str, origin: int = 0) -> Block:
        _, rows, cols = entries[name].shape
        at = slot_offset(ranges, spans[name].file, spans[name].start)
        return Block(at, (rows, cols), (cols, 1), origin)

    _, rows, cols = entries["gate"].shape
    first = (block("gate"), block("up", rows))
    parts = (
        Part("gate_up_proj", entries["gate"].format, (2 * rows, cols), 0, first),
        Part("down_proj", entries["down"].format, (cols, rows), 0, (block("down"),)),
    )
    weight_bytes = sum(span.end - span.start for span in spans.values())
    return ExpertSpec(key, parts, tuple(ranges), weight_bytes)


def _span(entry: TensorEntry, expert: int) -> Span:
    size = entry.num_bytes // entry.shape[0]
    start = entry.offset + expert * size
    return Span(entry.file, start, start + size)
