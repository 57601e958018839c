"""What a packed folder looks like: names, checksums, and the header that lists every expert.

docs/packed_format.md describes it byte by byte. Written by packing.py, read by packed.py.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from moe_infinity.checkpoint.direct_io import align_up
from moe_infinity.errors import CheckpointNotFoundError, CorruptCheckpointError
from moe_infinity.types import Block, ExpertKey, ExpertSpec, Part, ReadRange

VERSION = 3
HEADER, EXPERTS, DENSE = "pack.json", "experts.bin", "dense.safetensors"
ALIGNMENT_BYTES = 64 * 1024  # of experts in their file
# Every so many bytes of an expert have a checksum of their own: a load is checked piece by piece.
CHECKED_BYTES = 1024 * 1024
# Experts as the user names them -> as their parts say it. None: as the source has them.
FORMATS: dict[str, str | None] = {
    "bf16": None,
    "int8": "Q8_0",
    "int4": "Q4_0",
    "exact12": "EXACT12",
}
LOSSY = ("int8", "int4")
# Linear layers beside the experts -> their form, and that of the layer that gives the logits: no
# later layer averages its errors out.
DENSE_FORMATS: dict[str, tuple[str, str] | None] = {
    "bf16": None,
    "int8": ("Q8_0", "Q8_0"),
    "int4": ("Q4_0", "Q8_0"),
}
_START, _MIDDLE, _END = b'{"checksum":"', b'","pack":', b"}\n"


@dataclass(frozen=True)
class PackedExpert:
    """Where one expert lies in the file of experts, and what its bytes sum to."""

    layer: int
    expert: int
    offset: int
    num_bytes: int
    parts: list[dict[str, Any]]  # of a Part
    checksums: list[int]  # crc32 of every CHECKED_BYTES

    @property
    def key(self) -> ExpertKey:
        return ExpertKey(self.layer, self.expert)

    @property
    def end(self) -> int:
        """Where the next expert can begin."""
        return aligned(self.offset + self.num_bytes)

    def spec(self) -> ExpertSpec:
        """As the cache sees it: one read. File 0 is the file of experts."""
        whole = ReadRange(0, self.offset, align_up(self.num_bytes), self.num_bytes, 0)
        parts = tuple(_part(each) for each in self.parts)
        return ExpertSpec(self.key, parts, (whole,), self.num_bytes)


@dataclass(frozen=True)
class Pack:
    """The header of a packed folder."""

    version: int
    experts_format: str  # a name of FORMATS
    source: str  # fingerprint of the checkpoint it was made from
    experts: list[PackedExpert]
    dense: dict[str, int]  # crc32 by tensor
    files: dict[str, int]  # crc32 of everything small beside them; of DENSE its header
    dense_format: str = "bf16"  # a name of DENSE_FORMATS; version 1 had no other
    packed_dense: dict[str, list[Any]] = field(default_factory=dict)  # name: format, rows, cols
    is_rounded: bool = False  # its source was coded, and its numbers are in bf16

    def to_bytes(self) -> bytes:
        return _framed(json.dumps(asdict(self), separators=(",", ":")).encode())

    @classmethod
    def read(cls, folder: Path) -> Pack:
        """Raises CorruptCheckpointError where a byte of the header is not what was written."""
        path = folder / HEADER
        try:
            data = path.read_bytes()
        except OSError as error:
            raise CheckpointNotFoundError(
                f"{path}: got {error.strerror}, expected the header of a packed checkpoint"
            ) from error
        start = len(_START) + 8 + len(_MIDDLE)
        body = data[start : -len(_END)]
        if data != _framed(body):
            raise CorruptCheckpointError(
                f"{path}: the header's checksum is not that of its contents; the file is damaged "
                f"or was edited: pack the model again"
            )
        raw = json.loads(body)
        if raw["version"] > VERSION:
            raise CorruptCheckpointError(
                f"{path}: got version {raw['version']}, this program reads up to {VERSION}; "
                f"update moe-infinity"
            )
        experts = [PackedExpert(**each) for each in raw.pop("experts")]
        return cls(experts=experts, **raw)


def aligned(num_bytes: int) -> int:
    """Up to a place in the file of experts where one can begin."""
    return -(-num_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES


def checksums(data: memoryview) -> list[int]:
    return [
        zlib.crc32(data[start : start + CHECKED_BYTES])
        for start in range(0, len(data), CHECKED_BYTES)
    ]


def require_same(folder: Path, expected: Mapping[str, int]) -> None:
    """Raise CorruptCheckpointError for a small file that is not what was packed."""
    for name, checksum in expected.items():
        try:
            found = zlib.crc32((folder / name).read_bytes())
        except OSError as error:
            raise CorruptCheckpointError(
                f"{folder / name}: got {error.strerror}, expected it beside {HEADER}; pack again"
            ) from error
        if found != checksum:
            raise CorruptCheckpointError(
                f"{folder / name}: got checksum {found:08x}, expected {checksum:08x}; the file was "
                f"changed since it was packed: pack the model again"
            )


def _framed(body: bytes) -> bytes:
    return _START + f"{zlib.crc32(body):08x}".encode() + _MIDDLE + body + _END


def _part(raw: dict[str, Any]) -> Part:
    blocks = tuple(
        Block(b["offset_bytes"], tuple(b["shape"]), tuple(b["strides"]), b["origin"])
        for b in raw["blocks"]
    )
    return Part(raw["name"], raw["format"], tuple(raw["shape"]), raw["concat_dim"], blocks)
