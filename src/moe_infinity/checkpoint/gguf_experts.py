"""Where the experts of a GGUF file lie: gate, up and down in three tensors of their block, of some
families with biases beside them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from moe_infinity.checkpoint.base import TensorEntry
from moe_infinity.checkpoint.spans import Span, read_ranges, slot_offset
from moe_infinity.errors import CorruptCheckpointError, UnsupportedModelError
from moe_infinity.kernels.formats import DTYPES
from moe_infinity.kernels.packed import PACKED
from moe_infinity.kernels.planes import PLANES
from moe_infinity.types import Block, ExpertKey, ExpertSpec, Part

EXPERTS = re.compile(r"blk\.(\d+)\.ffn_(gate|up|down)_exps\.(weight|bias)")
CODED = tuple(name for name in PACKED if name not in ("EXACT12", *PLANES))  # computed as stored
_Entries = Mapping[str, TensorEntry]  # of a block: gate, up, down; gate_bias, up_bias, down_bias


def specs_of(
    path: Path, experts: Mapping[str, TensorEntry], blocks: range, is_transposed: bool
) -> dict[ExpertKey, ExpertSpec]:
    """Of all experts; in these families each of some ``blocks`` in a row has them. is_transposed:
    the model holds what is not coded as [in, out]."""
    by_block: dict[int, dict[str, TensorEntry]] = {}
    for name, entry in experts.items():
        match = EXPERTS.fullmatch(name)
        assert match is not None
        block, part, kind = match.groups()
        by_block.setdefault(int(block), {})[part + "_bias" * (kind == "bias")] = entry
    if len(by_block) != len(blocks) or any(block not in blocks for block in by_block):
        raise CorruptCheckpointError(
            f"{path}: has experts in {len(by_block)} blocks up to {max(by_block)}, expected them "
            f"from {blocks.start} up to {blocks.stop - 1}"
        )
    specs = {}
    for layer, block in enumerate(blocks):
        entries = by_block[block]
        _require_fitting(path, block, entries)
        for expert in range(entries["gate"].shape[0]):
            key = ExpertKey(layer, expert)
            specs[key] = _spec(key, entries, is_transposed)
    return specs


def _require_fitting(path: Path, block: int, entries: _Entries) -> None:
    for name, entry in entries.items():
        known = DTYPES if name.endswith("_bias") else (*DTYPES, *CODED)
        if entry.format not in known:
            raise UnsupportedModelError(
                f"{path}: block {block}: expert tensor {name!r} is stored as {entry.format}, "
                f"expected one of {', '.join(known)}; quantise the model otherwise"
            )
    shapes = {name: entry.shape for name, entry in entries.items()}
    gate, up, down = (shapes.get(name, ()) for name in ("gate", "up", "down"))
    if len(gate) != 3 or up != gate or down != (gate[0], gate[2], gate[1]):
        raise CorruptCheckpointError(
            f"{path}: block {block} has experts of shapes {shapes}, expected gate and up [E, I, H] "
            f"and down [E, H, I]"
        )
    biases = {n: s for n, s in shapes.items() if n.endswith("_bias")}
    if biases and biases != {"gate_bias": gate[:2], "up_bias": gate[:2], "down_bias": down[:2]}:
        raise CorruptCheckpointError(
            f"{path}: block {block} has experts of shapes {shapes}, expected biases "
            f"of gate, up and down, one for each of their rows"
        )
    for one, other in (("gate", "up"), ("gate_bias", "up_bias")):
        if one in entries and entries[one].format != entries[other].format:
            raise UnsupportedModelError(
                f"{path}: block {block} stores {one} as {entries[one].format} and {other} as "
                f"{entries[other].format}, expected one form for both"
            )


def _spec(key: ExpertKey, entries: _Entries, is_transposed: bool) -> ExpertSpec:
    spans = {name: _span(entry, key.expert) for name, entry in entries.items()}
    ranges = read_ranges(list(spans.values()))

    def part(name: str, *tensors: str) -> Part:
        """Of tensors that follow one another: rows, or columns where they lie turned."""
        number_format, shape = entries[tensors[0]].format, entries[tensors[0]].shape[1:]
        strides = (shape[1], 1) if len(shape) == 2 else (1,)
        dim = 0
        if is_transposed and len(shape) == 2 and number_format in DTYPES:
            shape, strides, dim = shape[::-1], strides[::-1], 1
        blocks = tuple(
            Block(
                slot_offset(ranges, spans[each].file, spans[each].start),
                shape,
                strides,
                number * shape[dim],
            )
            for number, each in enumerate(tensors)
        )
        whole = list(shape)
        whole[dim] *= len(tensors)
        return Part(name, number_format, tuple(whole), dim, blocks)

    parts = [part("gate_up_proj", "gate", "up"), part("down_proj", "down")]
    if "down_bias" in entries:
        parts += [part("gate_up_proj_bias", "gate_bias", "up_bias")]
        parts += [part("down_proj_bias", "down_bias")]
    weight_bytes = sum(span.end - span.start for span in spans.values())
    return ExpertSpec(key, tuple(parts), tuple(ranges), weight_bytes)


def _span(entry: TensorEntry, expert: int) -> Span:
    size = entry.num_bytes // entry.shape[0]
    start = entry.offset + expert * size
    return Span(entry.file, start, start + size)
