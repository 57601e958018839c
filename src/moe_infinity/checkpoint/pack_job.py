"""What to pack and where to: how much room it takes, and whether it can be done at all."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from moe_infinity.checkpoint.base import Checkpoint, TensorEntry
from moe_infinity.checkpoint.pack_format import EXPERTS, FORMATS, HEADER, VERSION, aligned
from moe_infinity.errors import ConfigError, DiskSpaceError, UnsupportedModelError
from moe_infinity.kernels.formats import DTYPES
from moe_infinity.kernels.packed import MAX_EXCEPTIONS, PACKED, can_pack, row_bytes
from moe_infinity.types import ExpertKey, ExpertSpec, Part

JOURNAL = "journal.jsonl"
BLOCK_ALIGNMENT = 64
_MARGIN_BYTES = 64 * 1024**2
_WEIGHTS = (
    ".safetensors",
    ".bin",
    ".pt",
    ".pth",
    ".gguf",
    ".h5",
    ".safetensors.index.json",
)
_LARGEST_COPY_BYTES = 256 * 1024**2  # tokenizers reach 30 MB


@dataclass(frozen=True)
class DenseTensor:
    """One tensor beside the experts, as it is packed. format: None as the source has it, or as
    ``numbers`` of ``plain`` gives it: some rows at a time, where the source has codes or only
    whole tensors."""

    name: str
    source: TensorEntry
    format: str | None = None
    plain: str | None = None
    numbers: Callable[[], Iterator[torch.Tensor]] | None = None

    @property
    def stored_as(self) -> str:
        """Of what is not coded."""
        return self.plain or self.source.format

    @property
    def num_bytes(self) -> int:
        if self.format is not None:
            rows, cols = self.source.shape
            return rows * row_bytes(self.format, cols)
        if self.plain is None:
            return self.source.num_bytes
        return math.prod(self.source.shape) * DTYPES[self.plain].itemsize


@dataclass(frozen=True)
class Job:
    """What to pack. specs: of all experts; dense: all other tensors the model uses."""

    source: Checkpoint
    specs: Mapping[ExpertKey, ExpertSpec]
    dense: Sequence[DenseTensor]
    experts_format: str  # a name of FORMATS
    dense_format: str  # a name of DENSE_FORMATS
    splits_gate_up: bool  # gate and up are halves of one part
    target: Path
    is_interleaved: bool = False  # or their rows take turns
    is_transposed: bool = False  # what is not coded is [in, out] in the model
    is_rounded: bool = False  # the source is coded
    made_files: Mapping[str, bytes] = field(
        default_factory=dict
    )  # where the source has no folder of them

    @property
    def partial(self) -> Path:
        return self.target.with_name(self.target.name + ".partial")

    @property
    def identity(self) -> dict[str, Any]:
        """Of a journal: only the same job on the same files may go on with it."""
        return {
            "version": VERSION,
            "source": self.source.identity,
            "experts_format": self.experts_format,
            "dense_format": self.dense_format,
            "files": [list(each) for each in self.source.versions()],
        }


def estimate_bytes(job: Job) -> int:
    """About what the packed folder will take."""
    total = sum(entry.num_bytes for entry in job.dense)
    total += sum(map(len, job.made_files.values()))
    total += sum(path.stat().st_size for path in small_files(job))
    for spec in job.specs.values():
        total += aligned(sum(_estimate(part, job.experts_format) for part in spec.parts))
    return total


def _estimate(part: Part, experts_format: str) -> int:
    """Bytes of one part; of exact12 with as many exceptions as are taken."""
    number_format = FORMATS[experts_format]
    numbers = math.prod(part.shape)
    if number_format is None or len(part.shape) != 2:
        item = DTYPES[part.format].itemsize if part.format in DTYPES else 2
        return numbers * item + 2 * BLOCK_ALIGNMENT
    rows, cols = part.shape
    side = 5 * rows + int(4 * MAX_EXCEPTIONS * numbers) if number_format == "EXACT12" else 0
    return rows * row_bytes(number_format, cols) + side + 2 * BLOCK_ALIGNMENT


def refuse(job: Job) -> None:
    if job.target.exists():
        raise ConfigError(
            f"{job.target}: exists already, expected the name of a folder to be made"
            + ("; is OUT missing? pack MODEL OUT" if (job.target / "config.json").exists() else "")
        )
    folder = job.target.absolute().parent
    if not folder.is_dir():
        raise ConfigError(f"{folder}: no such folder, expected one to make {job.target.name} in")
    number_format = FORMATS[job.experts_format]
    if number_format is not None:
        for spec in job.specs.values():
            _require_packable(spec, job.experts_format, number_format)
    there = sum(path.stat().st_size for path in job.partial.glob("*"))
    needed = estimate_bytes(job) + _MARGIN_BYTES - there
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise DiskSpaceError(
            f"{folder}: got {free / 1e9:.1f} GB free, expected {needed / 1e9:.1f} GB for "
            f"{job.experts_format} experts and the rest; free some, or choose a smaller format"
        )


def _require_packable(spec: ExpertSpec, experts_format: str, number_format: str) -> None:
    for part in spec.parts:
        if len(part.shape) != 2:
            continue
        if number_format == "EXACT12" and part.format not in ("BF16", *PACKED):
            raise UnsupportedModelError(
                f"layer {spec.key.layer} expert {spec.key.expert} {part.name}: got {part.format} "
                f"weights, expected BF16 for exact12; choose bf16, which keeps weights of any "
                f"other number as they are, int8 or int4"
            )
        if not can_pack(number_format, part.shape):
            raise UnsupportedModelError(
                f"{spec.key} {part.name}: got a matrix {list(part.shape)}, expected columns "
                f"divisible by 32 for {experts_format}; choose bf16 or exact12"
            )


def small_files(job: Job) -> list[Path]:
    ours = (HEADER, EXPERTS, JOURNAL, *job.made_files)
    if not job.source.path.is_dir():
        return []
    return [
        path
        for path in sorted(job.source.path.iterdir())
        if path.is_file()
        and not path.name.endswith(_WEIGHTS)
        and path.name not in ours
        and path.stat().st_size <= _LARGEST_COPY_BYTES
    ]
