"""What the library's loader is given in place of tensors: each is read when it asks for it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from moe_infinity.checkpoint.base import Checkpoint, PackedShape, SidePlane, TensorEntry
from moe_infinity.checkpoint.direct_io import HUGE_PAGE_BYTES, allocate_on_huge_pages
from moe_infinity.errors import CheckpointError, CorruptCheckpointError, UnsupportedModelError
from moe_infinity.kernels.formats import DTYPES, SIDE_DTYPES
from moe_infinity.kernels.packed import PACKED, PackedMatrix, row_bytes
from moe_infinity.kernels.planes import PLANES, Scales

_STORED_DTYPES = {
    **DTYPES,
    "F64": torch.float64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_DECODED_AT_ONCE = 4 * 1024**2  # numbers
_ROWS = 512  # read together at least: whole heads, whose rows may have to change places


class LazyTensor:
    """Reads its tensor when the library's loader, on one of its threads, indexes it."""

    def __init__(
        self, checkpoint: Checkpoint, entry: TensorEntry, failures: list[CheckpointError]
    ) -> None:
        self._checkpoint = checkpoint
        self._entry = entry
        self._failures = failures

    def __getitem__(self, index: Any) -> torch.Tensor:
        try:
            tensor = self._read()
        except CheckpointError as error:
            self._failures.append(error)
            raise
        return tensor[index]

    def get_shape(self) -> list[int]:
        return list(self._entry.shape)

    def get_dtype(self) -> str:
        return self._entry.format

    def _read(self) -> torch.Tensor:
        dtype = _STORED_DTYPES.get(self._entry.format)
        if dtype is None:
            raise UnsupportedModelError(
                f"dense tensor {self._entry.name!r} is stored as {self._entry.format}, expected "
                f"one of {', '.join((*_STORED_DTYPES, *PACKED))}"
            )
        return read_tensor(self._checkpoint, self._entry, dtype)


class DecodedTensor(LazyTensor):
    """A tensor that is stored coded, as numbers of ``dtype``."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        entry: TensorEntry,
        failures: list[CheckpointError],
        dtype: torch.dtype,
    ) -> None:
        super().__init__(checkpoint, entry, failures)
        self._dtype = dtype

    def get_dtype(self) -> str:
        return _name_of(self._dtype)

    def _read(self) -> torch.Tensor:
        """Some rows at a time: the whole of it in float32 is in no budget."""
        decoded = torch.empty(self._entry.shape, dtype=self._dtype)
        rows, start = decoded.view(-1, self._entry.shape[-1]), 0
        for some in decoded_rows(self._checkpoint, self._entry, self._dtype):
            rows[start : start + len(some)] = some
            start += len(some)
        return decoded


def decoded_rows(
    checkpoint: Checkpoint, entry: TensorEntry, dtype: torch.dtype
) -> Iterator[torch.Tensor]:
    """A coded tensor as numbers, [some rows, cols] after another."""
    (*lead, cols), size = entry.shape, row_bytes(entry.format, entry.shape[-1])
    num_rows = math.prod(lead)
    step = max(_ROWS, _DECODED_AT_ONCE // cols // _ROWS * _ROWS)
    whole = None
    if entry.format in PLANES:
        whole = read_packed(checkpoint, entry, PackedShape(entry.format, num_rows, cols))
    for start in range(0, num_rows, step):
        count = min(step, num_rows - start)
        if whole is not None:
            yield whole.decode_rows(start, count).to(dtype)
            continue
        num_bytes, offset = count * size, entry.offset + start * size
        piece = replace(entry, format="U8", shape=(num_bytes,), offset=offset, num_bytes=num_bytes)
        coded = read_tensor(checkpoint, piece, torch.uint8)
        yield PackedMatrix(entry.format, count, cols, coded).decode().to(dtype)


def _name_of(dtype: torch.dtype) -> str:
    return next(name for name, known in DTYPES.items() if known is dtype)


def lazy_tensor(
    checkpoint: Checkpoint,
    entry: TensorEntry,
    failures: list[CheckpointError],
    dtype: torch.dtype,
) -> LazyTensor:
    """For a tensor as it is stored; coded ones become numbers of ``dtype``."""
    if entry.format in PLANES and entry.name not in checkpoint.sides:
        raise CorruptCheckpointError(
            f"{checkpoint.path}: tensor {entry.name!r} is stored as {entry.format} without scales, "
            f"expected them beside it and a quantization_config in config.json"
        )
    if entry.format in PACKED:
        return DecodedTensor(checkpoint, entry, failures, dtype)
    return LazyTensor(checkpoint, entry, failures)


class Placeholder:
    """Stands for a weight that is not in memory as numbers: of its shape, one number large. NaN:
    what computes with it all the same must not look sound."""

    def __init__(self, shape: PackedShape, dtype: torch.dtype) -> None:
        self._shape = (shape.rows, shape.cols)
        self._dtype = dtype

    def __getitem__(self, index: Any) -> torch.Tensor:
        return torch.full((1,), math.nan, dtype=self._dtype).expand(self._shape)[index]

    def get_shape(self) -> list[int]:
        return list(self._shape)

    def get_dtype(self) -> str:
        return _name_of(self._dtype)


def read_tensor(checkpoint: Checkpoint, entry: TensorEntry, dtype: torch.dtype) -> torch.Tensor:
    tensor = _empty(entry, dtype)
    if tensor.numel():
        raw = memoryview(tensor.view(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
        checkpoint.read_tensor(entry, raw)
    return tensor


def read_packed(checkpoint: Checkpoint, entry: TensorEntry, shape: PackedShape) -> PackedMatrix:
    """A coded tensor as it is stored, as one matrix of all its rows."""
    sides = checkpoint.sides.get(entry.name)
    if sides is None:
        return PackedMatrix(*shape, read_tensor(checkpoint, entry, torch.uint8))
    raw = replace(entry, format="U8", shape=(entry.num_bytes,))
    scales = Scales(_read_plane(checkpoint, sides.scales), sides.scales.group)
    zeros = None if sides.zeros is None else _read_plane(checkpoint, sides.zeros)
    return PackedMatrix(*shape, read_tensor(checkpoint, raw, torch.uint8), scales, zeros)


def _read_plane(checkpoint: Checkpoint, plane: SidePlane) -> torch.Tensor:
    tensor = read_tensor(checkpoint, plane.entry, SIDE_DTYPES[plane.entry.format])
    return tensor.as_strided(plane.shape, plane.strides)


def _empty(entry: TensorEntry, dtype: torch.dtype) -> torch.Tensor:
    """Large tensors lie in large pages: those of 4 KiB cost up to half of reading speed."""
    if entry.num_bytes < HUGE_PAGE_BYTES:
        return torch.empty(entry.shape, dtype=dtype)
    whole = torch.frombuffer(allocate_on_huge_pages(entry.num_bytes), dtype=torch.uint8)
    return whole.view(dtype).view(entry.shape)
