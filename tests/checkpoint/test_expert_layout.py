"""The bytes that a spec reads are exactly the expert's matrices, however they were stored."""

import itertools
import json
import random
import struct
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers.core_model_loading import (
    Concatenate,
    Interleave,
    MergeModulelist,
    Transpose,
)

from moe_infinity.checkpoint.base import Checkpoint, ExpertStore
from moe_infinity.checkpoint.direct_io import ALIGNMENT_BYTES, align_up, allocate
from moe_infinity.checkpoint.expert_layout import NameRule, build_specs, sort_tensors
from moe_infinity.checkpoint.memory import MemoryStore
from moe_infinity.checkpoint.safetensors import ITEM_BYTES, SafetensorsCheckpoint
from moe_infinity.errors import CorruptCheckpointError, ReadError, UnsupportedModelError
from moe_infinity.kernels.formats import part_views
from moe_infinity.types import ExpertKey, ExpertSpec

Named = list[tuple[str, torch.Tensor]]
FORMATS = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
NUM_EXPERTS, HIDDEN, INTER = 3, 6, 4
LARGE = (96, 160)  # hidden and intermediate size of experts over many pages


def write(path: Path, tensors: Named, odd: int = 0, gap: int = 0) -> None:
    """A safetensors file in exactly this order, its data ``odd`` bytes off, ``gap`` between."""
    header, data = {}, b""
    for name, tensor in tensors:
        raw = tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        offsets = [len(data), len(data) + len(raw)]
        shape = list(tensor.shape)
        header[name] = {"dtype": FORMATS[tensor.dtype], "shape": shape, "data_offsets": offsets}
        data += raw + b"\xee" * gap
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % 8 + odd)
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def open_shards(path: Path, shards: Sequence[Named], **how: int) -> SafetensorsCheckpoint:
    for number, tensors in enumerate(shards):
        write(path / f"model-{number}.safetensors", tensors, **how)
    return SafetensorsCheckpoint(path)


def converter(sources: list[str], targets: list[str], *operations: Any) -> Any:
    return SimpleNamespace(
        source_patterns=sources, target_patterns=targets, operations=list(operations)
    )


GATE_UP = converter(
    ["experts.*.gate", "experts.*.up"], ["experts.gate_up_proj"], MergeModulelist(0), Concatenate(1)
)
DOWN = converter(["experts.*.down"], ["experts.down_proj"], MergeModulelist(0))


def per_expert(name: str) -> NameRule:
    """experts.3.gate and its like."""
    if not name.startswith("experts."):
        return NameRule(name, None, None)
    kind = name.rsplit(".", 1)[1]
    used = DOWN if kind == "down" else GATE_UP
    return NameRule(used.target_patterns[0], f"experts.*.{kind}", used)


def as_it_is(name: str) -> NameRule:
    return NameRule(name, None, None)


def random_experts(
    hidden: int = HIDDEN, inter: int = INTER, dtype: torch.dtype = torch.float32
) -> Named:
    torch.manual_seed(0)
    shapes = {"gate": (inter, hidden), "up": (inter, hidden), "down": (hidden, inter)}
    return [
        (f"experts.{e}.{kind}", torch.randn(shape).to(dtype))
        for e in range(NUM_EXPERTS)
        for kind, shape in shapes.items()
    ]


def fused(tensors: Named) -> dict[str, torch.Tensor]:
    found = dict(tensors)
    pairs = [
        torch.cat([found[f"experts.{e}.gate"], found[f"experts.{e}.up"]])
        for e in range(NUM_EXPERTS)
    ]
    downs = [found[f"experts.{e}.down"] for e in range(NUM_EXPERTS)]
    return {"gate_up_proj": torch.stack(pairs), "down_proj": torch.stack(downs)}


def specs_of(
    checkpoint: Checkpoint, rule: Any, whole: dict[str, torch.Tensor], layer: int = 0
) -> dict[ExpertKey, ExpertSpec]:
    expected = {f"experts.{name}": tuple(t.shape) for name, t in whole.items()}
    entries = [checkpoint.tensors[name] for name in sorted(checkpoint.tensors)]
    found = sort_tensors(entries, rule, expected, set())
    params = {name: found.params[f"experts.{name}"] for name in whole}
    return {spec.key: spec for spec in build_specs(layer, params, ITEM_BYTES)}


def load(store: ExpertStore, key: ExpertKey, slot: memoryview, chunk_bytes: int) -> None:
    for chunk in store.chunks(key, chunk_bytes):
        end = chunk.slot_offset + chunk.num_bytes
        store.read_into(key, slot[chunk.slot_offset : end], chunk)


def check(
    checkpoint: SafetensorsCheckpoint,
    specs: dict[ExpertKey, ExpertSpec],
    whole: dict[str, torch.Tensor],
) -> None:
    """Every expert, from disk and from memory, in one read and page by page."""
    memory = MemoryStore(specs, [file.read_bytes() for file in checkpoint.files])
    stores = (checkpoint.expert_store(specs), memory)
    for store, chunk_bytes in itertools.product(stores, (ALIGNMENT_BYTES, 2**30)):
        slots = memoryview(allocate(2 * store.slot_bytes))
        for key, half in itertools.product(specs, (0, 1)):
            slots[:] = b"\xaa" * len(slots)
            slot = slots[half * store.slot_bytes : (half + 1) * store.slot_bytes]
            load(store, key, slot, chunk_bytes)
            compare(specs[key], slot, {name: t[key.expert] for name, t in whole.items()})


def compare(spec: ExpertSpec, slot: memoryview, whole: dict[str, torch.Tensor]) -> None:
    views = part_views(spec, torch.frombuffer(slot, dtype=torch.uint8))
    assert views.keys() == whole.keys()
    for part in spec.parts:
        joined = torch.cat(views[part.name], dim=part.concat_dim)
        assert part.shape == tuple(joined.shape)
        assert torch.equal(joined, whole[part.name]), part.name
        sizes = [block.shape[part.concat_dim] for block in part.blocks]
        assert [b.origin for b in part.blocks] == [0, *itertools.accumulate(sizes)][:-1]
    assert spec.weight_bytes == sum(t.nbytes for t in whole.values())
    assert spec.read_bytes >= spec.weight_bytes


@pytest.mark.parametrize("odd", [0, 1, 2])
@pytest.mark.parametrize("dtype", list(FORMATS))
@pytest.mark.parametrize("order", list(itertools.permutations(("gate", "up", "down"))))
def test_per_expert_in_any_order(
    tmp_path: Path, order: tuple[str, ...], dtype: torch.dtype, odd: int
) -> None:
    tensors = random_experts(dtype=dtype)
    placed = sorted(tensors, key=lambda t: (t[0][:9], order.index(t[0].rsplit(".", 1)[1])))
    checkpoint = open_shards(tmp_path, [placed], odd=odd)
    whole = fused(tensors)
    check(checkpoint, specs_of(checkpoint, per_expert, whole), whole)
    checkpoint.close()


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("num_shards", "gap"), [(1, 0), (1, 3000), (3, 0), (2, 5000)])
@pytest.mark.parametrize("size", [(HIDDEN, INTER), LARGE])
def test_per_expert_shuffled_over_shards(
    tmp_path: Path, size: tuple[int, int], num_shards: int, gap: int, seed: int
) -> None:
    """Also ranges that are not joined and share a page."""
    tensors = random_experts(*size)
    placed = [("dense", torch.zeros(700)), *tensors]
    random.Random(seed).shuffle(placed)
    shards = [placed[n::num_shards] for n in range(num_shards)]
    checkpoint = open_shards(tmp_path, shards, odd=seed, gap=gap)
    whole = fused(tensors)
    check(checkpoint, specs_of(checkpoint, per_expert, whole), whole)
    checkpoint.close()


def test_ranges_that_share_a_page(tmp_path: Path) -> None:
    """An expert's first tensor ends and its next begins in one page, too far apart to be joined."""
    tensors = random_experts()
    checkpoint = open_shards(tmp_path, [tensors], gap=1000)
    whole = fused(tensors)
    specs = specs_of(checkpoint, per_expert, whole)
    assert any(
        a.file_offset + a.num_bytes > b.file_offset
        for spec in specs.values()
        for a, b in itertools.pairwise(spec.ranges)
    )
    check(checkpoint, specs, whole)
    checkpoint.close()


def biased(whole: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    biases = {f"{name}_bias": torch.randn(t.shape[:2]) for name, t in whole.items()}
    return {**whole, **biases}


@pytest.mark.parametrize("odd", [0, 3])
@pytest.mark.parametrize("size", [(HIDDEN, INTER), LARGE])
def test_fused_with_biases(tmp_path: Path, size: tuple[int, int], odd: int) -> None:
    whole = biased(fused(random_experts(*size)))
    checkpoint = open_shards(tmp_path, [[(f"experts.{n}", t) for n, t in whole.items()]], odd=odd)
    check(checkpoint, specs_of(checkpoint, as_it_is, whole), whole)
    checkpoint.close()


@pytest.mark.parametrize("dtype", list(FORMATS))
@pytest.mark.parametrize("steps", ["transpose", "interleave", "both"])
def test_fused_and_converted(tmp_path: Path, steps: str, dtype: torch.dtype) -> None:
    operations = {
        "transpose": [Transpose(1, 2)],
        "interleave": [Interleave(1)],
        "both": [Transpose(1, 2), Interleave(1)],
    }[steps]
    stored = {n: t.to(dtype) for n, t in fused(random_experts(*LARGE)).items()}
    used = {n: converter([f"raw.{n}"], [f"experts.{n}"], *operations) for n in stored}
    whole = {}
    for name, tensor in stored.items():
        value: Any = {name: [tensor]}
        for operation in operations:
            value = operation.convert(value, [name], [name])
        whole[name] = value[name]

    def rule(name: str) -> NameRule:
        short = name.removeprefix("raw.")
        return NameRule(f"experts.{short}", name, used[short])

    checkpoint = open_shards(tmp_path, [[(f"raw.{n}", t) for n, t in stored.items()]], odd=1)
    check(checkpoint, specs_of(checkpoint, rule, whole), whole)
    checkpoint.close()


def test_interleaved_biases(tmp_path: Path) -> None:
    tensor = torch.randn(NUM_EXPERTS, 2 * INTER)
    used = converter(["raw.b"], ["experts.up_proj_bias"], Interleave(1))
    whole = {"up_proj_bias": torch.cat([tensor[:, ::2], tensor[:, 1::2]], dim=1)}
    checkpoint = open_shards(tmp_path, [[("raw.b", tensor)]])
    specs = specs_of(checkpoint, lambda n: NameRule("experts.up_proj_bias", n, used), whole)
    check(checkpoint, specs, whole)
    checkpoint.close()


def test_adjacent_tensors_are_one_range_and_one_block(tmp_path: Path) -> None:
    tensors = random_experts(*LARGE)
    checkpoint = open_shards(tmp_path, [tensors])
    for spec in specs_of(checkpoint, per_expert, fused(tensors)).values():
        assert len(spec.ranges) == 1
        assert [len(part.blocks) for part in spec.parts] == [1, 1]
        assert spec.read_bytes <= align_up(spec.weight_bytes) + ALIGNMENT_BYTES
    checkpoint.close()


def test_up_before_gate_is_one_range_and_two_blocks(tmp_path: Path) -> None:
    tensors = random_experts(*LARGE)
    placed = sorted(tensors, key=lambda t: (t[0][:9], "ugd".index(t[0].rsplit(".", 1)[1][0])))
    checkpoint = open_shards(tmp_path, [placed])
    for spec in specs_of(checkpoint, per_expert, fused(tensors)).values():
        assert len(spec.ranges) == 1
        assert [len(part.blocks) for part in spec.parts] == [2, 1]
    checkpoint.close()


def test_tensors_far_apart_are_read_apart(tmp_path: Path) -> None:
    tensors = random_experts(*LARGE)
    by_kind = sorted(tensors, key=lambda t: t[0].rsplit(".", 1)[1])
    checkpoint = open_shards(tmp_path, [by_kind])
    for spec in specs_of(checkpoint, per_expert, fused(tensors)).values():
        assert len(spec.ranges) == 3
        assert spec.read_bytes <= spec.weight_bytes + 3 * 2 * ALIGNMENT_BYTES
    checkpoint.close()


@pytest.mark.parametrize("pages", [1, 2, 3, 7, 1000])
def test_chunks_cover_every_range(tmp_path: Path, pages: int) -> None:
    tensors = random_experts(*LARGE)
    checkpoint = open_shards(tmp_path, [tensors[::2], tensors[1::2]], odd=3)
    specs = specs_of(checkpoint, per_expert, fused(tensors))
    store = checkpoint.expert_store(specs)
    for key, spec in specs.items():
        chunks = store.chunks(key, pages * ALIGNMENT_BYTES)
        for c in chunks:
            assert 0 < c.needed_bytes <= c.num_bytes <= pages * ALIGNMENT_BYTES
            places = (c.file_offset, c.num_bytes, c.slot_offset)
            assert not any(value % ALIGNMENT_BYTES for value in places)
        for whole in spec.ranges:
            shift = whole.slot_offset - whole.file_offset
            inside = [
                c for c in chunks if c.file == whole.file and c.slot_offset - c.file_offset == shift
            ]
            assert sum(c.needed_bytes for c in inside) == whole.needed_bytes
            ends = [c.file_offset + c.num_bytes for c in inside]
            starts = [c.file_offset for c in inside]
            assert starts == [whole.file_offset, *ends[:-1]]
    assert store.slot_bytes == max(spec.slot_bytes for spec in specs.values())
    checkpoint.close()


def test_alignment_is_the_same_in_every_slot(tmp_path: Path) -> None:
    """Products may round differently by alignment: an expert must not depend on its slot."""
    whole = fused(random_experts(*LARGE))
    checkpoint = open_shards(tmp_path, [[(f"experts.{n}", t) for n, t in whole.items()]], odd=4)
    specs = specs_of(checkpoint, as_it_is, whole)
    size = checkpoint.expert_store(specs).slot_bytes
    assert size % ALIGNMENT_BYTES == 0
    slots = torch.frombuffer(allocate(5 * size), dtype=torch.uint8)
    for spec in specs.values():
        for name in whole:
            addresses = {
                view.data_ptr() % ALIGNMENT_BYTES
                for n in range(5)
                for view in part_views(spec, slots[n * size : (n + 1) * size])[name]
            }
            assert len(addresses) == 1
    checkpoint.close()


def test_every_layer_has_its_keys(tmp_path: Path) -> None:
    tensors = random_experts()
    checkpoint = open_shards(tmp_path, [tensors])
    specs = specs_of(checkpoint, per_expert, fused(tensors), layer=4)
    assert list(specs) == [ExpertKey(4, e) for e in range(NUM_EXPERTS)]
    checkpoint.close()


def test_scattered_experts(tmp_path: Path) -> None:
    """Experts along the last dimension: one expert's bytes are spread over everything."""
    stored = torch.randn(HIDDEN, INTER, 8)
    used = converter(["raw"], ["experts.down_proj"], Transpose(0, 2))
    whole = {"down_proj": stored.transpose(0, 2)}
    checkpoint = open_shards(tmp_path, [[("raw", stored)]])
    with pytest.raises(UnsupportedModelError, match="scattered"):
        specs_of(checkpoint, lambda n: NameRule("experts.down_proj", n, used), whole)
    checkpoint.close()


def test_mixed_formats(tmp_path: Path) -> None:
    tensors = random_experts()
    mixed = [(n, t.bfloat16() if n.endswith("up") else t) for n, t in tensors]
    checkpoint = open_shards(tmp_path, [mixed])
    with pytest.raises(UnsupportedModelError, match=r"gate_up_proj.*BF16.*F32"):
        specs_of(checkpoint, per_expert, fused(tensors))
    checkpoint.close()


@pytest.mark.parametrize(
    "missing",
    ["gate", "down", "gate up", "0.gate", "2.up", "1.down", "2.", "experts", "0.gate 1.up"],
)
def test_missing_tensors(tmp_path: Path, missing: str) -> None:
    tensors = random_experts()
    left = [("dense", torch.zeros(1))]
    left += [(n, t) for n, t in tensors if not any(word in n for word in missing.split())]
    checkpoint = open_shards(tmp_path, [left])
    with pytest.raises(CorruptCheckpointError, match="expert"):
        specs_of(checkpoint, per_expert, fused(tensors))
    checkpoint.close()


@pytest.mark.parametrize("which", ["0.gate", "1.up", "down", "2.down", "gate"])
@pytest.mark.parametrize("change", ["rows", "columns", "dimension"])
def test_wrong_shapes(tmp_path: Path, which: str, change: str) -> None:
    def spoil(tensor: torch.Tensor) -> torch.Tensor:
        if change == "dimension":
            return tensor[None]
        return tensor[1:] if change == "rows" else tensor[:, 1:]

    tensors = random_experts()
    spoilt = [(n, spoil(t) if which in n else t) for n, t in tensors]
    checkpoint = open_shards(tmp_path, [spoilt])
    with pytest.raises(CorruptCheckpointError, match="expert"):
        specs_of(checkpoint, per_expert, fused(tensors))
    checkpoint.close()


def test_a_parameter_that_is_there_twice(tmp_path: Path) -> None:
    whole = fused(random_experts())
    stored = [(f"experts.{n}", t) for n, t in whole.items()]
    checkpoint = open_shards(tmp_path, [[*stored, ("again.down_proj", whole["down_proj"])]])
    with pytest.raises(CorruptCheckpointError, match="2 times"):
        specs_of(checkpoint, lambda n: as_it_is(n.replace("again", "experts")), whole)
    checkpoint.close()


def test_what_is_neither_dense_nor_expert_is_left_out(tmp_path: Path) -> None:
    tensors = [*random_experts(), ("dense", torch.zeros(2)), ("extra.head", torch.zeros(2))]
    checkpoint = open_shards(tmp_path, [tensors])
    expected = {f"experts.{n}": tuple(t.shape) for n, t in fused(tensors[:-2]).items()}
    found = sort_tensors(checkpoint.tensors.values(), per_expert, expected, {"dense"})
    assert found.dense == ["dense"]
    assert found.params.keys() == expected.keys()
    checkpoint.close()


def test_a_memory_store_of_too_little(tmp_path: Path) -> None:
    tensors = random_experts()
    checkpoint = open_shards(tmp_path, [tensors])
    specs = specs_of(checkpoint, per_expert, fused(tensors))
    store = MemoryStore(specs, [checkpoint.files[0].read_bytes()[:-1]])
    key = ExpertKey(0, NUM_EXPERTS - 1)
    with pytest.raises(ReadError, match="expected"):
        load(store, key, memoryview(allocate(store.slot_bytes)), 2**30)
    checkpoint.close()
