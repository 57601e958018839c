"""Hugging Face checkpoints in safetensors files, in place: headers, tensors, experts."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import math
import os
import struct
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from moe_infinity.checkpoint.base import Checkpoint, ExpertStore, TensorEntry, descriptors_in
from moe_infinity.checkpoint.direct_io import (
    ALIGNMENT_BYTES,
    DirectFile,
    OpenedFile,
    align_down,
    align_up,
    allocate,
    open_all,
)
from moe_infinity.checkpoint.quantised import column_groups, gather, quantisation_of
from moe_infinity.errors import (
    CheckpointNotFoundError,
    CorruptCheckpointError,
    UnsupportedModelError,
)
from moe_infinity.types import ExpertKey, ExpertSpec, ReadRange

# Bytes per element; the names are the format's own. Sub-byte formats are left out on purpose.
ITEM_BYTES = {"F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "BF16": 2, "F16": 2}
ITEM_BYTES |= {"I16": 2, "U16": 2, "I8": 1, "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1}
ITEM_BYTES |= {"F8_E8M0": 1, "F8_E4M3FNUZ": 1, "F8_E5M2FNUZ": 1, "C64": 8}
_MAX_HEADER_BYTES = 100_000_000  # the format's own limit
_INDEX = "model.safetensors.index.json"
_MAX_SIZE = 2**63 - 1
_MAX_DIMS = 64
_SCRATCH_BYTES = 8 * 1024**2


class SafetensorsCheckpoint(Checkpoint):
    """A folder with config.json and one or more safetensors files. open_file: how their contents
    are read; the headers lie in the folder.

    Raises CheckpointNotFoundError without such files, CorruptCheckpointError for files that are
    missing, truncated or contradict themselves.
    """

    def __init__(self, path: Path, open_file: Callable[[Path], OpenedFile] = DirectFile) -> None:
        self.path = path
        files, promised = _find_files(path)
        self.files = tuple(files)
        headers = (read_header(file, number) for number, file in enumerate(self.files))
        tensors = by_name(self.files, itertools.chain.from_iterable(headers))
        absent = [name for name in promised if name not in tensors]
        if absent:
            raise CorruptCheckpointError(
                f"{path / _INDEX}: promises {len(absent)} tensors that its shards lack (first: "
                f"{absent[0]!r}); download the checkpoint again"
            )
        stored = tensors
        self.tensors, self.sides = gather(path, stored, quantisation_of(path))
        self._opened = open_all(self.files, open_file)
        self._scratch = threading.local()
        with contextlib.ExitStack() as undo:
            undo.callback(self.close)
            self._require_columns_in_order(column_groups(stored, self.sides))
            undo.pop_all()

    def _require_columns_in_order(self, found: tuple[TensorEntry, int] | None) -> None:
        if found is None:
            return
        entry, size = found
        said = bytearray(entry.num_bytes)
        self.read_tensor(entry, memoryview(said))
        groups = np.frombuffer(said, dtype="<i4")
        if (groups != np.arange(len(groups)) // size).any():
            raise UnsupportedModelError(
                f"{self.path}: {entry.name!r} puts columns in another order, expected groups of "
                f"{size} that follow one another; quantise the model without desc_act (act-order)"
            )

    @cached_property
    def fingerprint(self) -> str:
        try:
            digest = hashlib.sha256((self.path / "config.json").read_bytes())
        except OSError as error:
            raise CheckpointNotFoundError(
                f"{self.path / 'config.json'}: got {error.strerror}, expected a readable file"
            ) from error
        for file, opened in zip(self.files, self._opened, strict=True):
            digest.update(f"{file.name} {opened.num_bytes}\n".encode())
        for entry in (*self.tensors.values(), *self.sides.values()):
            digest.update(repr(entry).encode())
        return digest.hexdigest()

    @cached_property
    def identity(self) -> str:
        return sampled(self.fingerprint, self._opened)

    def read_tensor(self, entry: TensorEntry, into: memoryview) -> None:
        self.read_part(entry, 0, into)

    def read_part(self, entry: TensorEntry, start_bytes: int, into: memoryview) -> None:
        read_through(self._opened[entry.file], entry.offset + start_bytes, into, self._scratch)

    def expert_store(self, specs: Mapping[ExpertKey, ExpertSpec]) -> ExpertStore:
        return FileStore(specs, self._opened)


def by_name(files: Sequence[Path], entries: Iterable[TensorEntry]) -> dict[str, TensorEntry]:
    """The tensors of all ``files``. Raises CorruptCheckpointError for one that is there twice."""
    tensors: dict[str, TensorEntry] = {}
    for entry in entries:
        if entry.name in tensors:
            raise CorruptCheckpointError(
                f"{files[entry.file]}: tensor {entry.name!r} is also in "
                f"{files[tensors[entry.name].file].name}; expected it once"
            )
        tensors[entry.name] = entry
    return tensors


def sampled(fingerprint: str, files: Sequence[OpenedFile]) -> str:
    """A digest of the fingerprint and of a page in the middle of each file."""
    digest = hashlib.sha256(fingerprint.encode())
    page = memoryview(allocate(ALIGNMENT_BYTES))
    for opened in files:
        start = align_down(opened.num_bytes // 2)
        needed = min(ALIGNMENT_BYTES, opened.num_bytes - start)
        opened.read_into(page, start, needed)
        digest.update(page[:needed])
    return digest.hexdigest()


class FileStore(ExpertStore):
    """Experts in open files; the checkpoint that opened them closes them."""

    def __init__(self, specs: Mapping[ExpertKey, ExpertSpec], files: Sequence[OpenedFile]) -> None:
        self.specs = specs
        self._files = files

    def read_into(self, key: ExpertKey, buffer: memoryview, chunk: ReadRange) -> None:
        self._files[chunk.file].read_into(buffer, chunk.file_offset, chunk.needed_bytes)

    def descriptors(self, key: ExpertKey, chunks: Sequence[ReadRange]) -> list[int] | None:
        return descriptors_in(self._files, chunks)

    def give_up(self) -> None:
        for file in self._files:
            file.give_up()


def read_through(
    file: OpenedFile, offset: int, into: memoryview, scratches: threading.local
) -> None:
    """Fill ``into`` from any offset, through an aligned buffer that each thread keeps."""
    if not hasattr(scratches, "buffer"):
        scratches.buffer = memoryview(allocate(_SCRATCH_BYTES))
    scratch: memoryview = scratches.buffer
    done = 0
    while done < len(into):
        start = align_down(offset + done)
        skip = offset + done - start
        size = min(_SCRATCH_BYTES - skip, len(into) - done)
        file.read_into(scratch[: align_up(skip + size)], start, skip + size)
        into[done : done + size] = scratch[skip : skip + size]
        done += size


def read_header(path: Path, number: int) -> list[TensorEntry]:
    """The tensors of one safetensors file, every claim of its header checked.

    Raises CorruptCheckpointError naming the file, what was got and what was expected, and
    CheckpointNotFoundError if it cannot be opened.
    """
    try:
        raw, file_bytes = _read_raw_header(path)
    except OSError as error:
        raise CheckpointNotFoundError(
            f"{path}: got {error.strerror}, expected a readable safetensors file; is the "
            f"checkpoint whole?"
        ) from error
    try:
        header = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise CorruptCheckpointError(
            f"{path}: the header is not JSON ({error}), expected a table of tensors; download the "
            f"file again"
        ) from error
    if not isinstance(header, dict):
        raise CorruptCheckpointError(
            f"{path}: the header is {type(header).__name__}, expected a table of tensors; download "
            f"the file again"
        )
    header.pop("__metadata__", None)
    start = 8 + len(raw)
    entries = [_entry(path, number, n, v, start, file_bytes) for n, v in header.items()]
    _refuse_overlaps(path, entries)
    return entries


def _read_raw_header(path: Path) -> tuple[bytes, int]:
    """The header's bytes and the size of the whole file."""
    with path.open("rb") as file:
        file_bytes = os.fstat(file.fileno()).st_size
        prefix = file.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else -1
        if not 2 <= length <= min(_MAX_HEADER_BYTES, file_bytes - 8):
            raise CorruptCheckpointError(
                f"{path}: got a header of {length} bytes in a file of {file_bytes}, expected 2 to "
                f"{max(file_bytes - 8, 2)}; the file is truncated or not safetensors"
            )
        return file.read(length), file_bytes


def _entry(
    path: Path, number: int, name: str, info: Any, data_start: int, file_bytes: int
) -> TensorEntry:
    try:
        dtype, shape = info["dtype"], info["shape"]
        begin, end = info["data_offsets"]
        if not isinstance(shape, list) or len(shape) > _MAX_DIMS:
            raise TypeError(f"shape is not a list of at most {_MAX_DIMS} sizes")
        if not all(type(n) is int and 0 <= n <= _MAX_SIZE for n in (*shape, begin, end)):
            raise TypeError(f"a size is not a whole number from 0 to {_MAX_SIZE}")
        if not isinstance(dtype, str):
            raise TypeError("dtype is not a name")
    except (KeyError, TypeError, ValueError) as error:
        raise CorruptCheckpointError(
            f"{path}: tensor {name!r} is described by {str(info)[:200]}, expected dtype, shape and "
            f"data_offsets ({error})"
        ) from error
    if begin > end or data_start + end > file_bytes:
        raise CorruptCheckpointError(
            f"{path}: tensor {name!r} claims bytes {begin} to {end}, expected some of the "
            f"{file_bytes - data_start} there are; the file is truncated: download it again"
        )
    if dtype in ITEM_BYTES and end - begin != math.prod(shape) * ITEM_BYTES[dtype]:
        raise CorruptCheckpointError(
            f"{path}: tensor {name!r} has {end - begin} bytes, expected those of {dtype} with "
            f"shape {str(shape)[:200]}"
        )
    return TensorEntry(name, dtype, tuple(shape), number, data_start + begin, end - begin)


def _refuse_overlaps(path: Path, entries: list[TensorEntry]) -> None:
    ordered = sorted((e for e in entries if e.num_bytes), key=lambda e: e.offset)
    for first, second in itertools.pairwise(ordered):
        if first.offset + first.num_bytes > second.offset:
            raise CorruptCheckpointError(
                f"{path}: tensors {first.name!r} and {second.name!r} overlap, expected them "
                f"apart; download the file again"
            )


def _find_files(path: Path) -> tuple[list[Path], list[str]]:
    """The files, and the tensors an index promises."""
    index = path / _INDEX
    if index.exists():
        return _indexed_files(index)
    files = sorted(path.glob("*.safetensors"))
    single = path / "model.safetensors"
    if single in files:
        return [single], []
    if not files:
        raise CheckpointNotFoundError(
            f"{path}: got no *.safetensors file, expected model.safetensors or {_INDEX}; convert "
            f"other formats with transformers' save_pretrained"
        )
    return files, []


def _indexed_files(index: Path) -> tuple[list[Path], list[str]]:
    try:
        places = json.loads(index.read_bytes())["weight_map"]
        files = [index.parent / name for name in sorted(set(places.values()))]
        if not files:
            raise ValueError("it is empty")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CorruptCheckpointError(
            f"{index}: got no table 'weight_map' ({error}), expected tensor names and their files"
        ) from error
    missing = [file.name for file in files if not os.path.isfile(file)]
    if missing:
        raise CorruptCheckpointError(
            f"{index.parent}: {len(missing)} of {len(files)} shards are missing "
            f"({', '.join(missing[:3])}); download them again"
        )
    return files, list(places)
