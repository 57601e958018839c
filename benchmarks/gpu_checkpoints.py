"""Checkpoints of real shapes made on the spot for benchmarks/gpu.py. It knows nothing of runs.

Random weights are drawn on the GPU where there is one. Packed int4 experts are drawn as blocks of
the format itself: a scale and 32 codes between -7 and 7, so that nothing has to be coded.

Legend of letters: E experts of a layer, B bytes of an expert in its file.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import shutil
import tempfile
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from make_checkpoint import (
    BUNDLED,
    SHAPES,
    checkpoint_shapes,
    named_generator,
    natural_key,
    random_entries,
    safetensors_header,
    write_random,
    write_widened,
)

_SHARD_BYTES = 1_000_000_000
_NUM_WRITERS = 8
_LONGEST_CONTEXT = 16_384
_CODE_STD = math.sqrt((15**2 - 1) / 12)  # of whole numbers from -7 to 7, each as likely
_GROUP, _GROUP_BYTES, _SCALE_BYTES = 32, 18, 2  # of Q4_0
_SPARE_BYTES = 2 * 1024**3  # of the disk, left free
_ROUTINGS = {
    "skewed": "random router with skewed popularity; no locality in time, unlike real text",
    "real": "the bundled model's own routing, each width copied",
}


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """A checkpoint to make. shape: of SHAPES, or None for the bundled model widened."""

    name: str
    shape: str | None = None
    widen: int = 0
    form: str = "bf16"  # or int4: packed, experts in Q4_0
    changes: dict[str, Any] = field(default_factory=dict)  # to the shape's configuration
    source: Path = BUNDLED  # what is widened

    def config(self, num_layers: int | None = None) -> Any:
        from transformers import CONFIG_MAPPING

        assert self.shape is not None
        options = {**SHAPES[self.shape], "max_position_embeddings": _LONGEST_CONTEXT}
        options |= self.changes
        if num_layers is not None:
            options["num_hidden_layers"] = num_layers
        return CONFIG_MAPPING[options.pop("model_type")](**options)


def replaced(wanted: Wanted, changes: dict[str, Any]) -> Wanted:
    return dataclasses.replace(wanted, changes=changes)


def make(wanted: Wanted, work: Path, most_bytes: int) -> dict[str, Any]:
    """Write it below ``work``, of fewer layers if all are more than ``most_bytes`` or than the disk
    has room for. Returns what was made."""
    out = work / wanted.name
    shutil.rmtree(out, ignore_errors=True)
    work.mkdir(parents=True, exist_ok=True)
    room = min(most_bytes, shutil.disk_usage(work).free - _SPARE_BYTES)
    began = time.perf_counter()
    if wanted.shape is None:
        num_layers = of_layers = json.loads((wanted.source / "config.json").read_text())[
            "num_hidden_layers"
        ]
        write_widened(wanted.source, out, wanted.widen, device=_drawn_on())
    else:
        of_layers = wanted.config().num_hidden_layers
        num_layers = layers_within(wanted, room)
        (_write_int4 if wanted.form == "int4" else _write_bf16)(wanted.config(num_layers), out)
    seconds = time.perf_counter() - began
    num_bytes = sum(file.stat().st_size for file in out.iterdir())
    return {
        "name": wanted.name,
        "form": wanted.form,
        "layers": num_layers,
        "of_layers": of_layers,
        "bytes": num_bytes,
        "seconds": seconds,
        "written_gbps": num_bytes / seconds / 1e9,
        "routing": _ROUTINGS["skewed" if wanted.shape else "real"],
    }


def layers_within(wanted: Wanted, room_bytes: int) -> int:
    """As many layers as there is room for, all at best, 2 at least."""
    most = wanted.config().num_hidden_layers
    sizes = [_num_bytes(wanted, layers) for layers in (2, 3)]
    each = sizes[1] - sizes[0]
    return max(2, min(most, 2 + (room_bytes - sizes[0]) // each))


def _num_bytes(wanted: Wanted, num_layers: int) -> int:
    share = _GROUP_BYTES / (2 * _GROUP) if wanted.form == "int4" else 1.0
    shapes = checkpoint_shapes(wanted.config(num_layers))
    sizes = {name: 2 * math.prod(shape) for name, shape in shapes.items()}
    return int(sum(size * (share if _is_expert(name) else 1) for name, size in sizes.items()))


def _is_expert(name: str) -> bool:
    return ".experts." in name


def _drawn_on() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _write_bf16(config: Any, out: Path) -> None:
    options = {"shard_bytes": _SHARD_BYTES, "num_threads": _NUM_WRITERS, "device": _drawn_on()}
    write_random(config, out, routing="skewed", **options)


def _write_int4(config: Any, out: Path) -> None:
    """A packed folder: header, experts and dense weights as checkpoint/pack_format.py says."""
    from moe_infinity.checkpoint.pack_format import DENSE, EXPERTS, HEADER, VERSION, Pack

    out.mkdir(parents=True)
    dense, dense_header = _write_dense(config, out / DENSE)
    config.dtype = torch.bfloat16
    config.save_pretrained(out)
    files = {file.name: zlib.crc32(file.read_bytes()) for file in out.glob("*.json")}
    header = Pack(
        version=VERSION,
        experts_format="int4",
        source="random",
        experts=_write_experts(config, out / EXPERTS),
        dense=dense,
        files=files | {DENSE: dense_header},
    )
    (out / HEADER).write_bytes(header.to_bytes())


def _write_dense(config: Any, path: Path) -> tuple[dict[str, int], int]:
    """Everything but experts, in bf16: crc32 by tensor, and of the header."""
    entries = random_entries(config, "skewed", torch.bfloat16, 0)
    entries = [each for each in entries if not _is_expert(each.name)]
    entries.sort(key=lambda each: natural_key(each.name))
    header = safetensors_header(entries)
    found = {}
    with path.open("wb") as file:
        file.write(header)
        for each in entries:
            tensor = each.fill(named_generator(each.name, 0, _drawn_on())).contiguous().cpu()
            data = tensor.view(torch.uint8).numpy().data
            found[each.name] = zlib.crc32(data)
            file.write(data)
    return found, zlib.crc32(header)


def _write_experts(config: Any, path: Path) -> list[Any]:
    """Every expert of every layer, a layer at a time."""
    from moe_infinity.checkpoint.pack_format import PackedExpert, checksums

    parts, num_bytes = _expert_parts(config)
    generator = named_generator("experts", 0, _drawn_on())
    found = []
    with path.open("wb") as file, ThreadPoolExecutor(_NUM_WRITERS) as pool:
        for layer in range(config.num_hidden_layers):
            data = _layer_of_experts(config, parts, num_bytes, generator).numpy()
            sums = pool.map(lambda row: checksums(memoryview(row[:num_bytes])), data)
            for expert, each in enumerate(sums):
                offset = file.tell() + expert * data.shape[1]
                found.append(PackedExpert(layer, expert, offset, num_bytes, parts, each))
            file.write(memoryview(data.reshape(-1)))
    return found


def _layer_of_experts(
    config: Any, parts: list[dict[str, Any]], num_bytes: int, generator: torch.Generator
) -> torch.Tensor:
    """[E, B] uint8, each padded to where the next one may begin."""
    from moe_infinity.checkpoint.pack_format import aligned

    where = generator.device
    size = (config.num_experts, num_bytes)
    data = torch.zeros(config.num_experts, aligned(num_bytes), dtype=torch.uint8, device=where)
    for shift in (0, 4):
        codes = torch.randint(1, 16, size, dtype=torch.uint8, device=where, generator=generator)
        data[:, :num_bytes] |= codes << shift
    for part in parts:
        narrow = math.sqrt(2 * config.num_hidden_layers) if part["name"] == "down_proj" else 1.0
        scale = 1 / math.sqrt(part["shape"][-1]) / narrow / _CODE_STD
        half = torch.tensor([scale], dtype=torch.float16).view(torch.uint8).to(where)
        for block in part["blocks"]:
            start, numbers = block["offset_bytes"], math.prod(block["shape"])
            coded = data[:, start : start + numbers // _GROUP * _GROUP_BYTES]
            coded.unflatten(1, (-1, _GROUP_BYTES))[..., :_SCALE_BYTES] = half
    return data.cpu()


def _expert_parts(config: Any) -> tuple[list[dict[str, Any]], int]:
    """How this library packs such an expert: read off one that it has packed. And its bytes."""
    from moe_infinity.assembly import open_checkpoint
    from moe_infinity.checkpoint.pack_format import Pack
    from moe_infinity.checkpoint.packing import pack
    from moe_infinity.preparation import packing_job

    small = type(config).from_dict(config.to_dict())
    small.num_hidden_layers, small.num_experts, small.vocab_size = 1, 2, 64
    small.num_experts_per_tok = 1
    small.bos_token_id = small.eos_token_id = 0
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder, "source"), Path(folder, "packed")
        write_random(small, source, routing="uniform")
        with contextlib.closing(open_checkpoint(source)) as opened:
            pack(packing_job(opened, target, "int4"))
        first = Pack.read(target).experts[0]
    assert all(part["format"] == "Q4_0" for part in first.parts), first.parts
    return first.parts, first.num_bytes
