"""Makes packed folders: expert by expert, resumable after any interruption, complete or not there.

Everything is written to a folder beside the target, whose journal says what has safely arrived; the
last step gives it its name. Memory: one expert and its coded form.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import struct
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from moe_infinity.checkpoint.base import Checkpoint, ExpertStore, TensorEntry
from moe_infinity.checkpoint.direct_io import align_up, allocate
from moe_infinity.checkpoint.journal import Journal, sync, sync_folder, write_synced
from moe_infinity.checkpoint.pack_format import (
    ALIGNMENT_BYTES,
    DENSE,
    EXPERTS,
    FORMATS,
    HEADER,
    VERSION,
    Pack,
    PackedExpert,
    checksums,
    file_checksums,
    part_of,
)
from moe_infinity.errors import (
    ConfigError,
    DiskSpaceError,
    PackError,
    UnsupportedModelError,
)
from moe_infinity.kernels.formats import part_views
from moe_infinity.kernels.packed import PackedMatrix, can_pack, encode
from moe_infinity.types import Block, ExpertKey, ExpertSpec, Part

JOURNAL = "journal.jsonl"
_BLOCK_ALIGNMENT = 64
_MARGIN_BYTES = 64 * 1024**2
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".safetensors.index.json", ".h5")
_LARGEST_COPY_BYTES = 256 * 1024**2  # tokenizers reach 30 MB
_BITS = {"Q8_0": 8.5, "Q4_0": 4.5, "EXACT12": 12.1}


@dataclass(frozen=True)
class Job:
    """What to pack. specs: of all experts; dense: of all other tensors the model uses."""

    source: Checkpoint
    specs: Mapping[ExpertKey, ExpertSpec]
    dense: Sequence[TensorEntry]
    experts_format: str  # a name of FORMATS
    splits_gate_up: bool  # gate and up are halves of one part
    target: Path

    @property
    def partial(self) -> Path:
        return self.target.with_name(self.target.name + ".partial")

    @property
    def identity(self) -> dict[str, Any]:
        """Of a journal: only the same job may go on with it."""
        return {
            "version": VERSION,
            "source": self.source.identity,
            "experts_format": self.experts_format,
        }


def estimate_bytes(job: Job) -> int:
    """About what the packed folder will take; rather more than less."""
    total = sum(entry.num_bytes for entry in job.dense)
    number_format = FORMATS[job.experts_format]
    for spec in job.specs.values():
        bits = 16.0 if number_format is None else _BITS[number_format]
        stored = spec.weight_bytes if number_format is None else spec.weight_bytes * bits / 16
        total += align_up(int(stored)) + ALIGNMENT_BYTES
    return total


def pack(job: Job, on_bytes: Callable[[int], None] = lambda _: None) -> None:
    """Write ``job.target``. on_bytes: told how many bytes of the source are done, more and more.

    Raises ConfigError if the target exists, DiskSpaceError where the disk is or gets full,
    PackError where it cannot be written, UnsupportedModelError for experts that have no such form,
    and what reading the source raises.
    """
    _refuse(job)
    try:
        job.partial.mkdir(parents=True, exist_ok=True)
        experts = _write_experts(job, on_bytes)
        dense, dense_header = _write_dense(job, on_bytes)
        names = _copy_small_files(job)
        files = file_checksums(job.partial, names) | {DENSE: dense_header}
        header = Pack(VERSION, job.experts_format, job.source.identity, experts, dense, files)
        write_synced(job.partial / HEADER, header.to_bytes())
        (job.partial / JOURNAL).unlink()
        os.replace(job.partial, job.target)
        sync_folder(job.target.parent)
    except OSError as error:
        kind = DiskSpaceError if error.errno in (errno.ENOSPC, errno.EDQUOT) else PackError
        raise kind(
            f"{job.partial}: got {error.strerror or error}, expected to write "
            f"{estimate_bytes(job) / 1e9:.1f} GB there; what is written stays, and the same "
            f"command goes on with it"
        ) from error


def _refuse(job: Job) -> None:
    if job.target.exists():
        raise ConfigError(f"{job.target}: exists already, expected a folder to be made; remove it")
    folder = job.target.absolute().parent
    if not folder.is_dir():
        raise ConfigError(f"{folder}: no such folder, expected one to make {job.target.name} in")
    if job.experts_format != "bf16":
        for spec in job.specs.values():
            _require_packable(job, spec)
    done = job.partial / EXPERTS
    needed = estimate_bytes(job) + _MARGIN_BYTES - (done.stat().st_size if done.exists() else 0)
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise DiskSpaceError(
            f"{folder}: got {free / 1e9:.1f} GB free, expected {needed / 1e9:.1f} GB for "
            f"{job.experts_format} experts and the rest; free some, or choose a smaller format"
        )


def _require_packable(job: Job, spec: ExpertSpec) -> None:
    number_format = FORMATS[job.experts_format]
    assert number_format is not None
    for part in spec.parts:
        if len(part.shape) != 2:
            continue
        if number_format == "EXACT12" and part.format != "BF16":
            raise UnsupportedModelError(
                f"{spec.key} {part.name}: got {part.format} weights, expected BF16 for exact12; "
                f"choose int8 or int4"
            )
        if not can_pack(number_format, part.shape):
            raise UnsupportedModelError(
                f"{spec.key} {part.name}: got a matrix {list(part.shape)}, expected columns "
                f"divisible by 32 for {job.experts_format}; choose bf16 or exact12"
            )


def _write_experts(job: Job, on_bytes: Callable[[int], None]) -> list[PackedExpert]:
    """Go on where the journal ends."""
    path, journal = job.partial / EXPERTS, Journal(job.partial / JOURNAL)
    done = [PackedExpert(**line) for line in journal.resume(job.identity)]
    if not done:
        path.unlink(missing_ok=True)
    for each in done:
        on_bytes(job.specs[each.key].weight_bytes)
    store = job.source.expert_store(job.specs)
    left = sorted(job.specs.keys() - {each.key for each in done})
    with open(path, "r+b" if path.exists() else "w+b") as file:
        end = max((_aligned(each.offset + each.num_bytes) for each in done), default=0)
        file.truncate(end)
        for key in left:
            data, parts = _coded(job, store, key)
            file.seek(end)
            file.write(data)
            file.write(bytes(_aligned(len(data)) - len(data)))
            sync(file)
            each = PackedExpert(
                *key, end, len(data), [part_of(p) for p in parts], checksums(memoryview(data))
            )
            journal.append(asdict(each))
            done.append(each)
            end += _aligned(len(data))
            on_bytes(job.specs[key].weight_bytes)
    return done


def _coded(job: Job, store: ExpertStore, key: ExpertKey) -> tuple[bytes, list[Part]]:
    """One expert's bytes and where its parts lie in them."""
    spec = job.specs[key]
    slot = memoryview(allocate(spec.slot_bytes))
    for chunk in store.chunks(key, 8 * 1024**2):
        store.read_into(key, slot[chunk.slot_offset :][: chunk.num_bytes], chunk)
    views = part_views(spec, torch.frombuffer(slot, dtype=torch.uint8))
    data = bytearray()
    parts = []
    for part in spec.parts:
        blocks = [_plain(block) for block in views[part.name]]
        if job.splits_gate_up and part.name == "gate_up_proj" and len(blocks) == 1:
            blocks = list(blocks[0].chunk(2))
        parts.append(_append(data, part, blocks, FORMATS[job.experts_format]))
    return bytes(data), parts


def _append(
    data: bytearray, part: Part, blocks: list[torch.Tensor], number_format: str | None
) -> Part:
    """Code a part's blocks behind ``data``; all of them plain if one of them does not pay."""
    is_matrix = len(part.shape) == 2 and number_format is not None
    coded = (
        [encode(block, number_format) for block in blocks] if is_matrix and number_format else []
    )
    if not coded or any(each is None for each in coded):
        coded = [_raw(block) for block in blocks]
        number_format = None
    found, origin = [], 0
    for block, each in zip(blocks, coded, strict=True):
        assert each is not None
        data.extend(bytes(-len(data) % _BLOCK_ALIGNMENT))
        found.append(Block(len(data), tuple(block.shape), _row_major(block.shape), origin))
        data.extend(each.tobytes())
        origin += block.shape[part.concat_dim]
    return replace(part, format=number_format or part.format, blocks=tuple(found))


def _plain(block: torch.Tensor | PackedMatrix) -> torch.Tensor:
    if isinstance(block, PackedMatrix):
        raise UnsupportedModelError(
            "got a checkpoint that is packed already, expected one in 16 or 32 bit; pack the source"
        )
    return block


def _raw(block: torch.Tensor) -> np.ndarray[Any, np.dtype[np.uint8]]:
    return block.contiguous().view(-1).view(torch.uint8).numpy()


def _row_major(shape: Sequence[int]) -> tuple[int, ...]:
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= size
    return tuple(reversed(strides))


def _write_dense(job: Job, on_bytes: Callable[[int], None]) -> tuple[dict[str, int], int]:
    """All other tensors as one safetensors file: (crc32 by tensor, crc32 of the header)."""
    table: dict[str, Any] = {}
    end = 0
    entries = sorted(job.dense, key=lambda entry: entry.name)
    for entry in entries:
        offsets = [end, end + entry.num_bytes]
        table[entry.name] = {"dtype": entry.format, "shape": entry.shape, "data_offsets": offsets}
        end += entry.num_bytes
    body = json.dumps(table, separators=(",", ":")).encode()
    body += b" " * (-(8 + len(body)) % _BLOCK_ALIGNMENT)
    header = struct.pack("<Q", len(body)) + body
    found = {}
    with open(job.partial / DENSE, "wb") as file:
        file.write(header)
        for entry in entries:
            data = memoryview(bytearray(entry.num_bytes))
            job.source.read_tensor(entry, data)
            file.write(data)
            found[entry.name] = zlib.crc32(data)
            on_bytes(entry.num_bytes)
        sync(file)
    return found, zlib.crc32(header)


def _copy_small_files(job: Job) -> list[str]:
    """Config, tokenizer, licence: everything beside the weights."""
    names = []
    for path in sorted(job.source.path.iterdir()):
        is_weights = path.name.endswith(_WEIGHTS) or path.name in (HEADER, EXPERTS)
        if not path.is_file() or is_weights or path.stat().st_size > _LARGEST_COPY_BYTES:
            continue
        shutil.copyfile(path, job.partial / path.name)
        names.append(path.name)
    return names


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
