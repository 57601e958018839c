"""What everything about weights looks like to the rest: tensors, experts, a fingerprint."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from moe_infinity.checkpoint.direct_io import OpenedFile
from moe_infinity.types import ExpertKey, ExpertSpec, ReadRange


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One stored tensor: its number format, shape and bytes in file number ``file``."""

    name: str
    format: str
    shape: tuple[int, ...]
    file: int
    offset: int
    num_bytes: int


class SidePlane(NamedTuple):
    """Scales or zero points of a whole coded tensor, whose rows are counted through all of it.

    shape, strides: in elements, [out, in] order. group: how many rows and columns of weights one
    number stands for.
    """

    entry: TensorEntry
    shape: tuple[int, int]
    strides: tuple[int, int]
    group: tuple[int, int]


class Sides(NamedTuple):
    """What a coded tensor keeps apart from its codes."""

    scales: SidePlane
    zeros: SidePlane | None = None


class PackedShape(NamedTuple):
    """A coded matrix [rows, cols]."""

    format: str
    rows: int
    cols: int


_TOKENIZER_FILES = ("tokenizer*", "vocab*", "*.model", "*.tiktoken", "merges.txt")


class Checkpoint(ABC):
    """A model as it lies on disk. Nothing is read but headers until someone asks."""

    path: Path
    tensors: Mapping[str, TensorEntry]
    files: tuple[Path, ...]
    _opened: Sequence[OpenedFile]  # the same
    # Where experts were packed beforehand: all of them, without looking for their tensors.
    packed_specs: Mapping[ExpertKey, ExpertSpec] | None = None
    # Linear layers that were coded beforehand, by the model's name of their weight.
    packed_dense: Mapping[str, PackedShape] = MappingProxyType({})
    # Of tensors whose scales lie apart, by name.
    sides: Mapping[str, Sides] = MappingProxyType({})
    lossy: tuple[str, ...] = ()  # what was given up when it was made
    # What config.json would hold, and the tokenizer in llama.cpp's words, where there are no files.
    config_values: Mapping[str, Any] | None = None
    tokenizer_values: Mapping[str, Any] | None = None

    @property
    def has_tokenizer(self) -> bool:
        """Whether there is one to load, in its own values or in files beside it."""
        if self.tokenizer_values is not None:
            return True
        return any(file for names in _TOKENIZER_FILES for file in self.path.glob(names))

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """Hex digest that changes when config, tensor names, shapes or places change."""

    @property
    @abstractmethod
    def identity(self) -> str:
        """The fingerprint with a sample of the weights in it: tells fine-tunes apart.

        Raises ReadError.
        """

    @abstractmethod
    def read_tensor(self, entry: TensorEntry, into: memoryview) -> None:
        """Copy the tensor's bytes into memory the caller owns. Thread-safe. Raises ReadError."""

    @abstractmethod
    def read_part(self, entry: TensorEntry, start_bytes: int, into: memoryview) -> None:
        """Copy some of the tensor's bytes, as they are stored, from ``start_bytes`` on. No checksum
        is compared. Thread-safe. Raises ReadError."""

    def check_tensor(self, entry: TensorEntry) -> None:
        """Read a tensor through and compare its checksum, where there is one.

        Raises CorruptCheckpointError, ReadError.
        """

    @abstractmethod
    def expert_store(self, specs: Mapping[ExpertKey, ExpertSpec]) -> ExpertStore:
        """A store that reads the experts described by ``specs`` from this checkpoint."""

    def versions(self) -> list[tuple[str, int, str]]:
        """Of each file its name, bytes and a word that changes when it is changed."""
        opened = zip(self.files, self._opened, strict=True)
        return [(file.name, each.num_bytes, each.version()) for file, each in opened]

    def close(self) -> None:
        """Close all files; idempotent."""
        for file in self._opened:
            file.close()


class ExpertStore(ABC):
    """Where experts are read from. ``read_into`` is thread-safe."""

    specs: Mapping[ExpertKey, ExpertSpec]

    @abstractmethod
    def read_into(self, key: ExpertKey, buffer: memoryview, chunk: ReadRange) -> None:
        """Fill ``buffer`` (chunk.num_bytes long, page-aligned) with one chunk of an expert.

        Raises ReadError on a short or failed read, CheckpointChangedError if the file changed.
        """

    def descriptors(self, key: ExpertKey, chunks: Sequence[ReadRange]) -> list[int] | None:
        """Of each chunk of an expert, the file from which the kernel can read it by itself; None
        where ``read_into`` does more than that."""
        return None

    def give_up(self) -> None:
        """Nobody waits for reads that are under way: they may fail now, and all later ones."""

    def chunks(self, key: ExpertKey, chunk_bytes: int) -> list[ReadRange]:
        """The expert's read ranges, cut into pieces of at most ``chunk_bytes`` (page multiple)."""
        return [piece for r in self.specs[key].ranges for piece in _cut(r, chunk_bytes)]

    @property
    def slot_bytes(self) -> int:
        """Bytes of a slot that holds any of this store's experts."""
        return max(spec.slot_bytes for spec in self.specs.values())


def descriptors_in(files: Sequence[OpenedFile], chunks: Sequence[ReadRange]) -> list[int] | None:
    """Of each chunk its file's, if all have one."""
    of_file = {number: files[number].descriptor() for number in {c.file for c in chunks}}
    found = [of_file[chunk.file] for chunk in chunks]
    return None if None in found else [fd for fd in found if fd is not None]


def _cut(whole: ReadRange, chunk_bytes: int) -> list[ReadRange]:
    pieces = []
    for start in range(0, whole.num_bytes, chunk_bytes):
        needed = whole.needed_bytes - start
        if needed <= 0:
            break
        size = min(chunk_bytes, whole.num_bytes - start)
        pieces.append(
            ReadRange(
                file=whole.file,
                file_offset=whole.file_offset + start,
                num_bytes=size,
                needed_bytes=min(needed, size),
                slot_offset=whole.slot_offset + start,
            )
        )
    return pieces
