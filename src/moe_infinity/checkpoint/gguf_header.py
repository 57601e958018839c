"""The header of a GGUF file: what it says of itself, and where its tensors lie. Nothing is believed
that the file's size does not bear out, and a header has so many bytes and values at most: a file
may be large and hold nothing.

Versions 2 and 3, little-endian. A key's value is read as it is; tensors are described row-major, as
everywhere else here, where the file counts its dimensions from the innermost on.
"""

from __future__ import annotations

import math
import os
import struct
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from moe_infinity.checkpoint.base import TensorEntry
from moe_infinity.errors import CheckpointNotFoundError, CorruptCheckpointError

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_DEFAULT_ALIGNMENT = 32
_MAX_DIMS = 4
_MAX_DEPTH = 4  # of arrays in arrays
_MAX_HEADER_BYTES = 100_000_000  # that of safetensors
_MAX_VALUES = 4_000_000  # strings and arrays in arrays; vocabularies have a tenth

# name, weights of a block, bytes of a block
_TYPES = {
    0: ("F32", 1, 4),
    1: ("F16", 1, 2),
    2: ("Q4_0", 32, 18),
    3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24),
    8: ("Q8_0", 32, 34),
    9: ("Q8_1", 32, 40),
    10: ("Q2_K", 256, 84),
    11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210),
    15: ("Q8_K", 256, 292),
    16: ("IQ2_XXS", 256, 66),
    17: ("IQ2_XS", 256, 74),
    18: ("IQ3_XXS", 256, 98),
    19: ("IQ1_S", 256, 50),
    20: ("IQ4_NL", 32, 18),
    21: ("IQ3_S", 256, 110),
    22: ("IQ2_S", 256, 82),
    23: ("IQ4_XS", 256, 136),
    24: ("I8", 1, 1),
    25: ("I16", 1, 2),
    26: ("I32", 1, 4),
    27: ("I64", 1, 8),
    28: ("F64", 1, 8),
    29: ("IQ1_M", 256, 56),
    30: ("BF16", 1, 2),
    34: ("TQ1_0", 256, 54),
    35: ("TQ2_0", 256, 66),
    39: ("MXFP4", 32, 17),
}
_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q"}
_SCALARS |= {11: "<q", 12: "<d"}
_STRING, _ARRAY = 8, 9
_FEWEST_BYTES = {"key": 13, "tensor": 24}  # of one


@dataclass(frozen=True, slots=True)
class GgufHeader:
    values: dict[str, Any]
    tensors: tuple[TensorEntry, ...]


def read_gguf_header(path: Path, number: int = 0) -> GgufHeader:
    """Of file ``number`` of a checkpoint. Raises CorruptCheckpointError naming the file, what was
    got and what was expected, and CheckpointNotFoundError if it cannot be opened."""
    try:
        with path.open("rb") as file:
            return _Reader(path, number, file).header()
    except OSError as error:
        raise CheckpointNotFoundError(
            f"{path}: got {error.strerror}, expected a readable GGUF file"
        ) from error


class _Reader:
    def __init__(self, path: Path, number: int, file: BinaryIO) -> None:
        self._path = path
        self._file_number = number
        self._file = file
        self._file_bytes = os.fstat(file.fileno()).st_size
        self._num_values = 0

    def header(self) -> GgufHeader:
        magic = self._file.read(4)
        if not magic:
            raise self._wrong("is empty", "a GGUF file; download it again")
        if magic != _MAGIC:
            raise self._wrong(f"begins with {magic!r}", "GGUF; is it another kind of file?")
        version = self._number("<I")
        if version not in _VERSIONS:
            is_swapped = version >= 1 << 16 and version % (1 << 16) == 0
            raise self._wrong(
                "is big-endian" if is_swapped else f"is of version {version}",
                "a little-endian file of version 2 or 3; convert the model again",
            )
        num_tensors, num_keys = self._number("<Q"), self._number("<Q")
        values = {}
        for _ in range(self._count(num_keys, _FEWEST_BYTES["key"], "keys")):
            key = self._string()
            values[key] = self._value(self._number("<I"), key)
        described = [
            self._tensor()
            for _ in range(self._count(num_tensors, _FEWEST_BYTES["tensor"], "tensors"))
        ]
        return GgufHeader(values, self._placed(values, described))

    def _placed(
        self, values: dict[str, Any], described: list[TensorEntry]
    ) -> tuple[TensorEntry, ...]:
        """With offsets from the start of the file, all inside of it and apart from one another."""
        alignment = values.get("general.alignment", _DEFAULT_ALIGNMENT)
        if type(alignment) is not int or not 8 <= alignment <= 1 << 20 or alignment % 8:
            raise self._wrong(f"aligns its tensors to {alignment!r}", "a multiple of 8")
        start = -(-self._file.tell() // alignment) * alignment
        placed, end, last = [], 0, "the header"
        for each in sorted(described, key=lambda each: each.offset):
            if each.offset % alignment:
                raise self._wrong(
                    f"has tensor {each.name!r} at {each.offset}", f"multiples of {alignment}"
                )
            if each.offset < end:
                raise self._wrong(f"has tensor {each.name!r} inside {last}", "them apart")
            end, last = each.offset + each.num_bytes, repr(each.name)
            if start + end > self._file_bytes:
                raise self._wrong(
                    f"has tensor {each.name!r} up to byte {start + end}",
                    f"at most the {self._file_bytes} bytes there are; it is truncated: download it "
                    f"again",
                )
            placed.append(replace(each, offset=start + each.offset))
        names = {each.name for each in placed}
        if len(names) < len(placed):
            raise self._wrong("has two tensors of one name", "each name once")
        return tuple(placed)

    def _tensor(self) -> TensorEntry:
        """Its offset is from the end of the header."""
        name = self._string()
        num_dims = self._number("<I")
        if not 1 <= num_dims <= _MAX_DIMS:
            raise self._wrong(f"gives tensor {name!r} {num_dims} dimensions", f"1 to {_MAX_DIMS}")
        shape = tuple(reversed([self._number("<Q") for _ in range(num_dims)]))
        kind, offset = self._number("<I"), self._number("<Q")
        if not all(shape):
            raise self._wrong(f"gives tensor {name!r} the shape {list(shape)}", "sizes from 1 on")
        if kind not in _TYPES:
            raise self._wrong(
                f"stores tensor {name!r} in a format of number {kind}",
                f"one of {', '.join(name for name, *_ in _TYPES.values())}",
            )
        number_format, block, block_bytes = _TYPES[kind]
        if shape[-1] % block:
            raise self._wrong(
                f"stores tensor {name!r} of shape {list(shape)} as {number_format}",
                f"rows of a multiple of {block} numbers",
            )
        num_bytes = math.prod(shape) // block * block_bytes
        return TensorEntry(name, number_format, shape, self._file_number, offset, num_bytes)

    def _value(self, kind: int, key: str, depth: int = 0) -> Any:
        if kind in _SCALARS:
            return self._number(_SCALARS[kind])
        if kind == _STRING:
            return self._string()
        if kind != _ARRAY or depth == _MAX_DEPTH:
            raise self._wrong(f"gives {key!r} a value of type {kind}", "a type of versions 2 and 3")
        inner, count = self._number("<I"), self._number("<Q")
        if inner in _SCALARS:
            form = _SCALARS[inner]
            size = struct.calcsize(form)
            raw = self._bytes(self._count(count, size, f"numbers of {key!r}") * size)
            return np.frombuffer(raw, dtype=form)
        fewest = 8 if inner == _STRING else 12
        count = self._count(count, fewest, f"values of {key!r}")
        self._num_values += count
        if self._num_values > _MAX_VALUES:
            raise self._wrong(f"has {self._num_values} values", f"at most {_MAX_VALUES}")
        return [self._value(inner, key, depth + 1) for _ in range(count)]

    def _string(self) -> str:
        raw = self._bytes(self._number("<Q"))
        return raw.decode("utf-8", errors="replace")  # tokens may be any bytes

    def _number(self, form: str) -> Any:
        return struct.unpack(form, self._bytes(struct.calcsize(form)))[0]

    def _count(self, count: int, fewest_bytes: int, what: str) -> int:
        """As claimed, if the rest of the file can hold as many."""
        if count * fewest_bytes > self._file_bytes - self._file.tell():
            raise self._wrong(
                f"claims {count} {what}",
                f"no more than its {self._file_bytes} bytes have room for; if it was cut off, "
                f"download it again",
            )
        return count

    def _bytes(self, count: int) -> bytes:
        left = self._file_bytes - self._file.tell()
        if count > left:
            raise self._wrong(
                f"ends {count - left} bytes too early in its header",
                "all of it; download it again",
            )
        if self._file.tell() + count > _MAX_HEADER_BYTES:
            raise self._wrong(
                "has no end of its header", f"one of at most {_MAX_HEADER_BYTES} bytes"
            )
        return self._file.read(count)

    def _wrong(self, got: str, expected: str) -> CorruptCheckpointError:
        return CorruptCheckpointError(f"{self._path}: {got}, expected {expected}")
