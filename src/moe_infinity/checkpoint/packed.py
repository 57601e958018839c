"""Packed checkpoints: one read per expert, every byte checked when it is first loaded."""

from __future__ import annotations

import contextlib
import hashlib
import threading
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path

from moe_infinity.checkpoint.base import (
    Checkpoint,
    ExpertStore,
    PackedShape,
    TensorEntry,
    descriptors_in,
)
from moe_infinity.checkpoint.direct_io import OpenedFile, align_down, align_up, allocate, open_all
from moe_infinity.checkpoint.pack_format import (
    CHECKED_BYTES,
    DENSE,
    EXPERTS,
    HEADER,
    LOSSY,
    Pack,
    PackedExpert,
    require_same,
)
from moe_infinity.checkpoint.safetensors import read_header, read_through
from moe_infinity.errors import CorruptCheckpointError
from moe_infinity.kernels.packed import can_pack, row_bytes
from moe_infinity.types import ExpertKey, ExpertSpec, ReadRange


def is_packed(path: Path) -> bool:
    return (path / HEADER).is_file()


class PackedCheckpoint(Checkpoint):
    """A folder made by ``moe-infinity pack``.

    Raises CorruptCheckpointError if header, small files or sizes are not what was written.
    """

    packed_specs: Mapping[ExpertKey, ExpertSpec]

    def __init__(self, path: Path) -> None:
        self.path = path
        self.pack = Pack.read(path)
        require_same(path, {n: c for n, c in self.pack.files.items() if n != DENSE})
        self.files = (path / EXPERTS, path / DENSE)
        with contextlib.ExitStack() as undo:
            self._opened = open_all(self.files)
            undo.callback(self.close)
            self._require_size()
            self.tensors = {entry.name: entry for entry in self._dense_entries()}
            self.packed_dense = self._packed_dense()
            undo.pop_all()
        self.packed_specs = {each.key: each.spec() for each in self.pack.experts}
        for each in self.pack.experts:
            each.parts.clear()  # the specs have them, and there may be tens of thousands
        formats = {"experts": self.pack.experts_format, "dense": self.pack.dense_format}
        self.lossy = tuple(f"{what} {name}" for what, name in formats.items() if name in LOSSY)
        if self.pack.is_rounded:
            self.lossy += ("codes rounded to bf16",)
        self._scratch = threading.local()

    @cached_property
    def fingerprint(self) -> str:
        return hashlib.sha256((self.path / HEADER).read_bytes()).hexdigest()

    @property
    def identity(self) -> str:
        return self.fingerprint  # the header holds checksums of all weights

    def read_tensor(self, entry: TensorEntry, into: memoryview) -> None:
        self.read_part(entry, 0, into)
        self._require_checksum(entry, zlib.crc32(into))

    def read_part(self, entry: TensorEntry, start_bytes: int, into: memoryview) -> None:
        read_through(self._opened[1], entry.offset + start_bytes, into, self._scratch)

    def check_tensor(self, entry: TensorEntry) -> None:
        self._check(entry, memoryview(allocate(CHECKED_BYTES)))

    def _check(self, entry: TensorEntry, buffer: memoryview) -> None:
        found = 0
        for start in range(0, entry.num_bytes, CHECKED_BYTES):
            piece = buffer[: min(CHECKED_BYTES, entry.num_bytes - start)]
            self.read_part(entry, start, piece)
            found = zlib.crc32(piece, found)
        self._require_checksum(entry, found)

    def _require_checksum(self, entry: TensorEntry, found: int) -> None:
        expected = self.pack.dense[entry.name]
        if found != expected:
            raise CorruptCheckpointError(
                f"{self.files[1]}: tensor {entry.name!r} has checksum {found:08x}, expected "
                f"{expected:08x}; the file is damaged: pack the model again"
            )

    def expert_store(self, specs: Mapping[ExpertKey, ExpertSpec]) -> ExpertStore:
        return PackedStore(specs, self.files[0], self._opened[0], self.pack.experts)

    def verify(self, on_bytes: Callable[[int], None] = lambda _: None) -> None:
        """Check every byte. Raises CorruptCheckpointError at the first that is wrong.

        on_bytes: told how many bytes more were found to be right.
        """
        buffer = memoryview(allocate(CHECKED_BYTES))  # the memory budget is filled already
        for entry in self.tensors.values():
            self._check(entry, buffer)
            on_bytes(entry.num_bytes)
        store = self.expert_store(self.packed_specs)
        end = 0
        for each in sorted(self.pack.experts, key=lambda each: each.offset):
            self._require_zeros(buffer, end, each.offset)
            for chunk in store.chunks(each.key, CHECKED_BYTES):
                store.read_into(each.key, buffer[: chunk.num_bytes], chunk)
            on_bytes(each.num_bytes)
            end = each.offset + each.num_bytes
        self._require_zeros(buffer, end, self._opened[0].num_bytes)

    def _require_size(self) -> None:
        end = max(each.end for each in self.pack.experts)
        got = self._opened[0].num_bytes
        if got != end:
            raise CorruptCheckpointError(
                f"{self.files[0]}: got {got} bytes, expected {end}; it is incomplete: pack the "
                f"model again"
            )

    def _packed_dense(self) -> dict[str, PackedShape]:
        """What is said of coded tensors is true of them: they are computed as they lie."""
        found = {}
        for name, each in self.pack.packed_dense.items():
            entry = self.tensors.get(name)
            is_known = len(each) == 3 and each[0] in ("Q8_0", "Q4_0")
            form, rows, cols = each if is_known else ("", 0, 0)
            sound = is_known and entry is not None and entry.format == "U8"
            sound = sound and rows > 0 and cols > 0 and can_pack(form, (rows, cols))
            if not sound or self.tensors[name].num_bytes != rows * row_bytes(form, cols):
                raise CorruptCheckpointError(
                    f"{self.path / HEADER}: got {each} for tensor {name!r}, expected form, rows, "
                    f"columns as they are stored; pack again"
                )
            found[name] = PackedShape(form, rows, cols)
        return found

    def _dense_entries(self) -> list[TensorEntry]:
        entries = read_header(self.files[1], 1)
        start = min((entry.offset for entry in entries), default=0)
        with self.files[1].open("rb") as file:
            found = zlib.crc32(file.read(start))
        end = max((entry.offset + entry.num_bytes for entry in entries), default=start)
        names = {entry.name for entry in entries}
        sound = found == self.pack.files[DENSE] and end == self._opened[1].num_bytes
        if not sound or names != self.pack.dense.keys():
            raise CorruptCheckpointError(
                f"{self.files[1]}: its header is not what was packed; pack the model again"
            )
        return entries

    def _require_zeros(self, buffer: memoryview, start: int, end: int) -> None:
        """Between experts there is padding; a page of it may hold the end of an expert."""
        page = align_down(start)
        if start >= end:
            return
        self._opened[0].read_into(buffer[: align_up(end) - page], page, end - page)
        if any(buffer[start - page : end - page]):
            raise CorruptCheckpointError(
                f"{self.files[0]}: bytes {start} to {end} are not zero, expected padding; the file "
                f"is damaged: pack the model again"
            )


class PackedStore(ExpertStore):
    """Experts of one file; pieces are checked the first time each is read."""

    def __init__(
        self,
        specs: Mapping[ExpertKey, ExpertSpec],
        path: Path,
        file: OpenedFile,
        experts: list[PackedExpert],
    ) -> None:
        self.specs = specs
        self._path, self._file = path, file
        self._checksums = {each.key: each.checksums for each in experts}
        self._checked: set[tuple[ExpertKey, int]] = set()  # adding to a set is atomic

    def chunks(self, key: ExpertKey, chunk_bytes: int) -> list[ReadRange]:
        """Chunks begin where checksums do."""
        return super().chunks(key, max(1, chunk_bytes // CHECKED_BYTES) * CHECKED_BYTES)

    def descriptors(self, key: ExpertKey, chunks: Sequence[ReadRange]) -> list[int] | None:
        """Once all of them were checked."""
        numbers = [number for chunk in chunks for _, number in _checked_pieces(chunk)]
        if not self._checked.issuperset((key, number) for number in numbers):
            return None
        return descriptors_in([self._file], chunks)

    def read_into(self, key: ExpertKey, buffer: memoryview, chunk: ReadRange) -> None:
        self._file.read_into(buffer, chunk.file_offset, chunk.needed_bytes)
        for start, number in _checked_pieces(chunk):
            if (key, number) in self._checked:
                continue
            found = zlib.crc32(buffer[start : min(start + CHECKED_BYTES, chunk.needed_bytes)])
            if found != self._checksums[key][number]:
                raise CorruptCheckpointError(
                    f"{self._path}: layer {key.layer} expert {key.expert}: piece {number} has "
                    f"checksum {found:08x}, expected {self._checksums[key][number]:08x}; the file "
                    f"is damaged: pack the model again"
                )
            self._checked.add((key, number))


def _checked_pieces(chunk: ReadRange) -> Iterator[tuple[int, int]]:
    """Where pieces that have a checksum each begin in a chunk, and their numbers in the expert."""
    for start in range(0, chunk.needed_bytes, CHECKED_BYTES):
        yield start, (chunk.slot_offset + start) // CHECKED_BYTES
