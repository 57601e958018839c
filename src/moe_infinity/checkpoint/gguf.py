"""GGUF files as checkpoints, in place: experts and linear layers in the form they are stored in."""

from __future__ import annotations

import contextlib
import hashlib
import re
import threading
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from moe_infinity.checkpoint.base import Checkpoint, ExpertStore, PackedShape, TensorEntry
from moe_infinity.checkpoint.direct_io import DirectFile, OpenedFile
from moe_infinity.checkpoint.gguf_experts import CODED, EXPERTS, specs_of
from moe_infinity.checkpoint.gguf_families import FAMILIES, config_values, model_name
from moe_infinity.checkpoint.gguf_header import GgufHeader, GgufTensor, read_gguf_header
from moe_infinity.checkpoint.safetensors import FileStore, read_through, sampled
from moe_infinity.errors import (
    CheckpointNotFoundError,
    CorruptCheckpointError,
    UnsupportedModelError,
)
from moe_infinity.kernels.formats import DTYPES
from moe_infinity.types import ExpertKey, ExpertSpec

_SPLIT = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf")
_OLD_EXPERTS = re.compile(r"blk\.\d+\.ffn_(gate|up|down)\.\d+\.weight")
_COMPUTED_IN = {"F32": "float32", "F16": "float16"}  # from the form of most; else bfloat16


class GgufCheckpoint(Checkpoint):
    """A model in a GGUF file, or in several that llama.cpp's tools split it into.

    path: the file, the first or any other of them, or their folder. Raises CheckpointNotFoundError,
    CorruptCheckpointError for files that contradict themselves, UnsupportedModelError for families
    and number formats that are not known here.
    """

    packed_specs: Mapping[ExpertKey, ExpertSpec]
    config_values: Mapping[str, Any]

    def __init__(self, path: Path) -> None:
        self.path = path
        self.files = tuple(_files_of(path))
        headers = [read_gguf_header(file) for file in self.files]
        self._values = headers[0].values
        _require_all(self.files, self._values)
        stored = dict(_numbered(self.files, headers))
        self._architecture = self._require_family()
        self._family = FAMILIES[self._architecture]
        experts = {name: stored.pop(name) for name in list(stored) if EXPERTS.fullmatch(name)}
        self.config_values = self._config(stored, experts)
        self.packed_specs = specs_of(
            self.files[0], experts, self.config_values["num_hidden_layers"]
        )
        self._sources: dict[str, TensorEntry] = {}
        self._describe_dense(stored)
        self.tokenizer_values = self._values if "tokenizer.ggml.tokens" in self._values else None
        with contextlib.ExitStack() as undo:
            self._opened: list[OpenedFile] = [
                undo.enter_context(contextlib.closing(DirectFile(file))) for file in self.files
            ]
            undo.pop_all()
        self._scratch = threading.local()

    @cached_property
    def fingerprint(self) -> str:
        digest = hashlib.sha256(repr(sorted(self.config_values.items())).encode())
        for entry in (*self._sources.values(), *self.packed_specs.values()):
            digest.update(repr(entry).encode())
        for file in self._opened:
            digest.update(f"{file.num_bytes}\n".encode())
        return digest.hexdigest()

    @cached_property
    def identity(self) -> str:
        return sampled(self.fingerprint, self._opened)

    def read_tensor(self, entry: TensorEntry, into: memoryview) -> None:
        read_through(self._opened[entry.file], entry.offset, into, self._scratch)
        if self._family.splits_rotary and re.search(r"\.(q|k)_proj\.", entry.name):
            source = self._sources[entry.name]
            row_size = source.num_bytes // source.shape[0]
            head = source.shape[0] // self._num_heads(entry.name)
            _unite_halves(np.frombuffer(into, dtype=np.uint8).reshape(-1, row_size), head)

    def _num_heads(self, name: str) -> int:
        key = "num_attention_heads" if ".q_proj." in name else "num_key_value_heads"
        return int(self.config_values[key])

    def expert_store(self, specs: Mapping[ExpertKey, ExpertSpec]) -> ExpertStore:
        return FileStore(specs, self._opened)

    def _require_family(self) -> str:
        architecture = self._values.get("general.architecture")
        is_dense = architecture == "llama" and not self._values.get("llama.expert_count")
        if architecture not in FAMILIES or is_dense:
            raise UnsupportedModelError(
                f"{self.path}: got architecture {architecture!r}{' without experts' * is_dense}, "
                f"expected one of {', '.join(FAMILIES)} (llama with experts is Mixtral); other "
                f"families run from their safetensors checkpoints"
            )
        return str(architecture)

    def _config(
        self, stored: Mapping[str, TensorEntry], experts: Mapping[str, TensorEntry]
    ) -> dict[str, Any]:
        prefix = self._architecture + "."
        key = {n.removeprefix(prefix): v for n, v in self._values.items() if n.startswith(prefix)}
        try:
            found = config_values(self._family, key, self._values)
        except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
            raise CorruptCheckpointError(
                f"{self.path}: got no sound value of {prefix}* ({type(error).__name__}: {error}), "
                f"expected a model's metadata; convert it again"
            ) from error
        embeddings = stored.get("token_embd.weight")
        if embeddings is None or not experts:
            lacking = "token_embd.weight" if embeddings is None else "experts (ffn_*_exps)"
            old = next((name for name in stored if _OLD_EXPERTS.fullmatch(name)), None)
            raise CorruptCheckpointError(
                f"{self.path}: has no {lacking}, expected a whole model"
                + (f"; {old!r} is of an old form: convert it again" if old else "")
            )
        formats = [entry.format for entry in experts.values()]
        most = max(dict.fromkeys(formats), key=formats.count)  # the first of those
        return found | {
            "vocab_size": embeddings.shape[0],
            "tie_word_embeddings": "output.weight" not in stored,
            "dtype": _COMPUTED_IN.get(most, "bfloat16"),
        }

    def _describe_dense(self, stored: Mapping[str, TensorEntry]) -> None:
        """Tensors beside the experts, by the model's names."""
        tensors: dict[str, TensorEntry] = {}
        packed: dict[str, PackedShape] = {}
        for name, entry in stored.items():
            named = model_name(name)
            if named is not None:
                self._require_sound(named, entry)
            else:
                raise UnsupportedModelError(
                    f"{self.path}: got tensor {name!r}, expected only those known of "
                    f"{self._architecture!r}; is it of a newer model?"
                )
            shape = entry.shape
            if named.endswith("shared_expert_gate.weight") and len(shape) == 1:
                shape = (1, *shape)
            is_linear = named.endswith("_proj.weight") or named == "lm_head.weight"
            self._sources[named] = entry
            if is_linear and entry.format in CODED:
                packed[named] = PackedShape(entry.format, *shape)
                tensors[named] = _entry(named, "U8", (entry.num_bytes,), entry)
            else:
                tensors[named] = _entry(named, entry.format, shape, entry)
        self.tensors, self.packed_dense = tensors, packed

    def _require_sound(self, name: str, entry: TensorEntry) -> None:
        """What reading it takes for granted."""
        is_matrix = len(entry.shape) == 2 or entry.format in DTYPES
        is_turned = self._family.splits_rotary and re.search(r"\.(q|k)_proj\.", name)
        if not is_matrix or (is_turned and entry.shape[0] % (2 * self._num_heads(name))):
            raise CorruptCheckpointError(
                f"{self.path}: tensor {entry.name!r} has the shape {list(entry.shape)} as "
                f"{entry.format}, expected a matrix of whole heads"
            )


def _entry(name: str, number_format: str, shape: tuple[int, ...], at: TensorEntry) -> TensorEntry:
    return TensorEntry(name, number_format, shape, at.file, at.offset, at.num_bytes)


def _files_of(path: Path) -> list[Path]:
    """All files of the model, in order."""
    if path.is_dir():
        path = _one_in(path)
    match = _SPLIT.fullmatch(path.name)
    if match is None:
        return [path]
    stem, number, count = match.groups()
    if not 1 <= int(number) <= int(count):
        raise CheckpointNotFoundError(
            f"{path}: is number {int(number)} of {int(count)} by its name, expected one of as many"
        )
    files = [path.with_name(f"{stem}-{n:05}-of-{count}.gguf") for n in range(1, int(count) + 1)]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise CorruptCheckpointError(
            f"{path.parent}: {len(missing)} of {len(files)} files are missing "
            f"({', '.join(missing[:3])}); download them again"
        )
    return files


def _one_in(folder: Path) -> Path:
    found = sorted(folder.glob("*.gguf"))
    first = [f for f in found if (m := _SPLIT.fullmatch(f.name)) is None or int(m[2]) == 1]
    if len(first) != 1:
        names = ", ".join(file.name for file in first) or "none that begins a model"
        raise CheckpointNotFoundError(
            f"{folder}: got {len(first)} GGUF models ({names}), expected one; name the file"
        )
    return first[0]


def _require_all(files: tuple[Path, ...], values: Mapping[str, Any]) -> None:
    count = values.get("split.count", 1) or 1
    if count != len(files):
        raise CorruptCheckpointError(
            f"{files[0]}: is one of {count} files by its header and of {len(files)} by its name, "
            f"expected the names that the splitting tool gave"
        )


def _numbered(
    files: tuple[Path, ...], headers: list[GgufHeader]
) -> Iterator[tuple[str, TensorEntry]]:
    seen: dict[str, Path] = {}
    for number, (file, header) in enumerate(zip(files, headers, strict=True)):
        for each in header.tensors:
            if each.name in seen:
                raise CorruptCheckpointError(
                    f"{file}: tensor {each.name!r} is also in {seen[each.name].name}; expected it "
                    f"once"
                )
            seen[each.name] = file
            yield each.name, _as_entry(each, number)


def _as_entry(tensor: GgufTensor, file: int) -> TensorEntry:
    place = (file, tensor.offset, tensor.num_bytes)
    return TensorEntry(tensor.name, tensor.format, tensor.shape, *place)


def _unite_halves(rows: np.ndarray[Any, np.dtype[np.uint8]], head: int) -> None:
    """Put rows [R, bytes], heads of ``head`` rows, back in their place, that were moved for a
    rotation of neighbours: the first ones of all pairs are a head's first half."""
    pairs = rows.reshape(-1, head // 2, 2, rows.shape[1])
    rows[:] = pairs.swapaxes(1, 2).reshape(rows.shape)
