"""GGUF files as checkpoints, in place: experts and linear layers in the form they are stored in."""

from __future__ import annotations

import hashlib
import math
import re
import threading
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from moe_infinity.checkpoint.base import Checkpoint, ExpertStore, PackedShape, TensorEntry
from moe_infinity.checkpoint.direct_io import open_all
from moe_infinity.checkpoint.gguf_experts import CODED, EXPERTS, specs_of
from moe_infinity.checkpoint.gguf_families import (
    FAMILIES,
    config_values,
    family_of,
    model_name,
)
from moe_infinity.checkpoint.gguf_files import files_of, require_all
from moe_infinity.checkpoint.gguf_header import read_gguf_header
from moe_infinity.checkpoint.safetensors import FileStore, by_name, read_through, sampled
from moe_infinity.errors import CorruptCheckpointError, UnsupportedModelError
from moe_infinity.kernels.formats import DTYPES
from moe_infinity.kernels.packed import PackedMatrix
from moe_infinity.types import ExpertKey, ExpertSpec

_BLOCK = re.compile(r"blk\.(\d+)\.")
_KV_HALF = re.compile(r"(blk\.\d+\.attn_)(k|v)_b\.weight")
_OLD_EXPERTS = re.compile(r"blk\.\d+\.ffn_(gate|up|down)\.\d+\.weight")
_TURNED = re.compile(r"\.(q|k)_proj\.")
_TURNED_HEADS = {"q": "num_attention_heads", "k": "num_key_value_heads"}
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
        self.files = tuple(files_of(path))
        headers = [read_gguf_header(file, number) for number, file in enumerate(self.files)]
        self._values = headers[0].values
        require_all(self.files, self._values)
        stored = by_name(self.files, (each for header in headers for each in header.tensors))
        self._architecture = self._require_family()
        prefix = self._architecture + "."
        key = {n.removeprefix(prefix): v for n, v in self._values.items() if n.startswith(prefix)}
        experts = {name: stored.pop(name) for name in list(stored) if EXPERTS.fullmatch(name)}
        self.config_values = self._config(key, stored, experts)
        blocks = range(
            self.config_values.get("first_k_dense_replace", 0),
            self.config_values["num_hidden_layers"],
        )
        unused = range(blocks.stop, int(key["block_count"]))
        self.packed_specs = specs_of(
            self.files[0], _without(experts, unused), blocks, self._family.is_transposed
        )
        self._sources: dict[str, TensorEntry] = {}
        self._halves: dict[str, tuple[TensorEntry, TensorEntry]] = {}  # of kv_b, where it was split
        self._describe_dense(_without(stored, unused))
        self.tokenizer_values = self._values if "tokenizer.ggml.tokens" in self._values else None
        self._opened = open_all(self.files)
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
        if entry.name in self._halves:
            whole = np.frombuffer(into, dtype=np.float32)
            whole[:] = unite_kv_b(*map(self._numbers, self._halves[entry.name])).ravel()
            return
        self.read_part(entry, 0, into)
        if num_heads := self._turned_heads(entry.name):
            source = self._sources[entry.name]
            row_size, head = source.num_bytes // source.shape[0], source.shape[0] // num_heads
            _unite_halves(np.frombuffer(into, dtype=np.uint8).reshape(-1, row_size), head)

    def read_part(self, entry: TensorEntry, start_bytes: int, into: memoryview) -> None:
        read_through(self._opened[entry.file], entry.offset + start_bytes, into, self._scratch)

    def _numbers(self, entry: TensorEntry) -> np.ndarray[Any, np.dtype[np.float32]]:
        """A tensor as float32, in its shape."""
        stored = bytearray(entry.num_bytes)
        self.read_part(entry, 0, memoryview(stored))
        raw = torch.frombuffer(stored, dtype=torch.uint8)
        if entry.format in DTYPES:
            return raw.view(DTYPES[entry.format]).float().numpy().reshape(entry.shape)
        rows = math.prod(entry.shape[:-1])
        matrix = PackedMatrix(entry.format, rows, entry.shape[-1], raw)
        return matrix.decode().numpy().reshape(entry.shape)

    def _turned_heads(self, name: str) -> int:
        """Heads of a tensor whose rows were moved for llama.cpp's rotation; 0: none were."""
        match = _TURNED.search(name) if self._family.splits_rotary else None
        return int(self.config_values[_TURNED_HEADS[match[1]]]) if match else 0

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
        self,
        key: Mapping[str, Any],
        stored: Mapping[str, TensorEntry],
        experts: Mapping[str, TensorEntry],
    ) -> dict[str, Any]:
        try:
            self._family = family_of(self._architecture, key)
            found = config_values(self._family, key, self._values, stored)
        except (KeyError, TypeError, ValueError, ZeroDivisionError, OverflowError) as error:
            raise CorruptCheckpointError(
                f"{self.path}: got no sound value of {self._architecture}.* "
                f"({type(error).__name__}: {error}), expected a model's metadata; convert it again"
            ) from error
        embeddings = stored.get("token_embd.weight")
        if embeddings is None or not experts:
            lacking = "token_embd.weight" if embeddings is None else "experts (ffn_*_exps)"
            old = next((name for name in stored if _OLD_EXPERTS.fullmatch(name)), None)
            raise CorruptCheckpointError(
                f"{self.path}: has no {lacking}, expected a whole model"
                + (f"; {old!r} is of an old form: convert it again" if old else "")
            )
        formats = [entry.format for name, entry in experts.items() if name.endswith("weight")]
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
            if match := _KV_HALF.fullmatch(name):
                if f"{match[1]}kv_b.weight" in stored:
                    raise CorruptCheckpointError(
                        f"{self.path}: got {name!r} beside {match[1]}kv_b.weight, expected one or "
                        f"the other; convert it again"
                    )
                if match[2] == "k":
                    each = self._describe_kv_b(match[1], entry, stored.get(f"{match[1]}v_b.weight"))
                    tensors[each.name] = each
                continue
            named = model_name(self._family, name)
            if named is None:
                raise UnsupportedModelError(
                    f"{self.path}: got tensor {name!r}, expected only those known of "
                    f"{self._architecture!r}; is it of a newer model?"
                )
            self._require_sound(named, entry)
            shape = entry.shape
            if named.endswith("shared_expert_gate.weight") and len(shape) == 1:
                shape = (1, *shape)
            is_linear = named.endswith(("_proj.weight", "_mqa.weight")) or named == "lm_head.weight"
            is_linear = is_linear and not named.endswith("kv_b_proj.weight")  # latent attention's
            self._sources[named] = entry
            if is_linear and entry.format in CODED:
                packed[named] = PackedShape(entry.format, *shape)
                tensors[named] = _entry(named, "U8", (entry.num_bytes,), entry)
            else:
                tensors[named] = _entry(named, entry.format, shape, entry)
        self.tensors, self.packed_dense = tensors, packed

    def _describe_kv_b(
        self, stem: str, keys: TensorEntry, values: TensorEntry | None
    ) -> TensorEntry:
        """Newer files hold kv_b in two tensors, of keys and of values."""
        config = self.config_values
        named = model_name(self._family, f"{stem}kv_b.weight")
        heads, rank = config["num_attention_heads"], config.get("kv_lora_rank", 0)
        sizes = (config.get("qk_nope_head_dim", 0), config.get("v_head_dim", 0))
        wanted = ((heads, rank, sizes[0]), (heads, sizes[1], rank))
        if named is None or values is None or (keys.shape, values.shape) != wanted:
            raise CorruptCheckpointError(
                f"{self.path}: {keys.name!r} has the shape {list(keys.shape)}, expected "
                f"{list(wanted[0])}, and beside it {stem}v_b.weight {list(wanted[1])}"
            )
        for entry in (keys, values):
            if entry.format not in (*DTYPES, *CODED):
                raise UnsupportedModelError(
                    f"{self.path}: tensor {entry.name!r} is stored as {entry.format}, expected one "
                    f"of {', '.join((*DTYPES, *CODED))}"
                )
        self._sources[f"{named}.keys"], self._sources[f"{named}.values"] = keys, values
        self._halves[named] = (keys, values)
        shape = (heads * (sizes[0] + sizes[1]), rank)
        return TensorEntry(named, "F32", shape, keys.file, keys.offset, math.prod(shape) * 4)

    def _require_sound(self, name: str, entry: TensorEntry) -> None:
        """What reading it takes for granted."""
        is_matrix = len(entry.shape) == 2 or entry.format in DTYPES
        num_heads = self._turned_heads(name)
        if not is_matrix or (num_heads and entry.shape[0] % (2 * num_heads)):
            raise CorruptCheckpointError(
                f"{self.path}: tensor {entry.name!r} has the shape {list(entry.shape)} as "
                f"{entry.format}, expected a matrix of whole heads"
            )


def _without(stored: Mapping[str, TensorEntry], blocks: range) -> dict[str, TensorEntry]:
    """But for the tensors of blocks that only guess tokens further ahead."""

    def is_used(name: str) -> bool:
        match = _BLOCK.match(name)
        return match is None or int(match[1]) not in blocks

    return {name: entry for name, entry in stored.items() if is_used(name)}


def _entry(name: str, number_format: str, shape: tuple[int, ...], at: TensorEntry) -> TensorEntry:
    return TensorEntry(name, number_format, shape, at.file, at.offset, at.num_bytes)


def _unite_halves(rows: np.ndarray[Any, np.dtype[np.uint8]], head: int) -> None:
    """Put rows [R, bytes], heads of ``head`` rows, back in their place, that were moved for a
    rotation of neighbours: the first ones of all pairs are a head's first half."""
    pairs = rows.reshape(-1, head // 2, 2, rows.shape[1])
    rows[:] = pairs.swapaxes(1, 2).reshape(rows.shape)


def unite_kv_b(
    keys: np.ndarray[Any, np.dtype[np.float32]], values: np.ndarray[Any, np.dtype[np.float32]]
) -> np.ndarray[Any, np.dtype[np.float32]]:
    """keys [heads, rank, K], values [heads, V, rank] -> [heads, K + V, rank]."""
    return np.concatenate([keys.swapaxes(1, 2), values], axis=1)
