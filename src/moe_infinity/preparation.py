"""From a checkpoint to a packing job: what it holds, and what form that can take."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Collection, Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from moe_infinity.assembly import open_checkpoint
from moe_infinity.checkpoint.base import Checkpoint, TensorEntry
from moe_infinity.checkpoint.hub import unless_downloaded
from moe_infinity.checkpoint.pack_format import DENSE_FORMATS, FORMATS
from moe_infinity.checkpoint.pack_job import DenseTensor, Job
from moe_infinity.checkpoint.packed import PackedCheckpoint
from moe_infinity.checkpoint.remote import open_remote
from moe_infinity.errors import ConfigError, UnsupportedModelError
from moe_infinity.kernels.formats import DTYPES
from moe_infinity.kernels.packed import PACKED, can_pack
from moe_infinity.model.direct_use import weights_read_directly
from moe_infinity.model.inputs import load_tokenizer
from moe_infinity.model.latent_attention import absorbed_weights
from moe_infinity.model.lazy_tensors import decoded_rows, read_tensor
from moe_infinity.model.loading import (
    Anatomy,
    are_coded,
    config_of,
    examine,
    naming,
    read_config,
)
from moe_infinity.model.routers import is_router

_FEWEST_ROWS = 32  # of a layer that is worth coding; gates of shared experts have one


@contextmanager
def opened_source(model: str | Path) -> Iterator[Checkpoint]:
    """The checkpoint of a folder, or of a hub id: one that was not downloaded before is read over
    the network, and kept nowhere. Raises what resolving and opening a checkpoint raise."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch, str(model).replace("/", "--"))
        found = unless_downloaded(model, folder)
        if isinstance(found, Path):
            source = open_checkpoint(found)
        else:
            read_config(folder)  # it explains more than missing files
            source = open_remote(found, folder)
        with closing(source):
            yield source


def packing_job(
    source: Checkpoint, target: Path, experts_format: str, dense_format: str = "bf16"
) -> Job:
    """What packing a checkpoint takes; nothing but headers is read.

    Raises ConfigError for an unknown form, CheckpointError if the model cannot be packed so.
    """
    require_forms(experts_format, dense_format)
    if isinstance(source, PackedCheckpoint):
        raise UnsupportedModelError(
            f"{source.path}: is packed already, expected a checkpoint or GGUF file; pack its source"
        )
    anatomy = examine(source, None)
    maths = [anatomy.adapter.math(each.module) for each in anatomy.experts]
    is_transposed = any(math.is_transposed for math in maths)
    if FORMATS[experts_format] and is_transposed and not are_coded(anatomy):
        raise UnsupportedModelError(
            f"{source.path}: its experts are stored [in, out], expected [out, in] for "
            f"{experts_format}; pack them as bf16"
        )
    return Job(
        source=source,
        specs=anatomy.specs,
        dense=list(_dense(source, anatomy, dense_format)),
        experts_format=experts_format,
        dense_format=dense_format,
        splits_gate_up=all(math.has_gate and not math.is_transposed for math in maths),
        target=target,
        is_interleaved=any(math.is_interleaved for math in maths),
        is_transposed=is_transposed,
        is_rounded=bool(anatomy.coded)
        or any(part.format in PACKED for spec in anatomy.specs.values() for part in spec.parts),
        made_files=_made_files(source),
    )


def _made_files(source: Checkpoint) -> dict[str, bytes]:
    """Config and tokenizer of a source that has no files of them; of a quantised one a config that
    does not say so any more."""
    if source.config_values is None:
        if not source.sides:
            return {}
        raw = json.loads((source.path / "config.json").read_text())
        for values in (raw, raw.get("text_config") or {}):
            values.pop("quantization_config", None)
        return {"config.json": json.dumps(raw, indent=2).encode()}
    with tempfile.TemporaryDirectory() as scratch:
        config_of(source).save_pretrained(scratch)
        if source.tokenizer_values is not None:
            load_tokenizer(source).save_pretrained(scratch)
        return {path.name: path.read_bytes() for path in sorted(Path(scratch).iterdir())}


def require_forms(experts_format: str, dense_format: str) -> None:
    """Raise ConfigError for an unknown form."""
    _choice("--experts", experts_format, FORMATS)
    _choice("--dense", dense_format, DENSE_FORMATS)


def _choice(option: str, got: str, known: Collection[str]) -> None:
    if got not in known:
        raise ConfigError(f"{option}: got {got!r}, expected one of {', '.join(known)}")


def _dense(source: Checkpoint, anatomy: Anatomy, dense_format: str) -> Iterator[DenseTensor]:
    """Every tensor beside the experts; linear layers coded, where that was asked for. Of a weight
    that serves as embeddings too, a coded copy gives the logits."""
    formats, read = DENSE_FORMATS[dense_format], _Reading(source, anatomy)
    if formats is None:
        yield from (read.tensor(entry.name, entry) for entry in anatomy.dense)
        return
    layer_format, head_format = formats
    head, linears = _head_of(anatomy.meta), dict(_linears(anatomy))
    own = {id(p): name for name, p in anatomy.meta.named_parameters()}
    every = dict(anatomy.meta.named_parameters(remove_duplicate=False))
    rule = naming(anatomy.meta, anatomy.adapter)
    shared: set[str] = set()
    for entry in anatomy.dense:
        named = rule(entry.name)
        name = own.get(id(every.get(named.parameter)), "")  # a shared weight's first one
        logical = read.logical(entry)
        is_known = logical.format in (*DTYPES, *PACKED) and named.converter is None
        shape = logical.shape if is_known else ()
        if head in linears and name and name != head and every[head] is every[name]:
            if name not in shared and linears[head].weight.shape == shape:
                yield read.tensor(name, entry)
                yield read.tensor(head, entry, head_format)
                shared.add(name)
            elif name not in shared:
                yield read.tensor(entry.name, entry)
        elif name in linears and linears[name].weight.shape == shape:
            yield read.tensor(name, entry, head_format if name == head else layer_format)
        else:
            yield read.tensor(entry.name, entry)


class _Reading:
    """How a source's tensors become what is packed."""

    def __init__(self, source: Checkpoint, anatomy: Anatomy) -> None:
        self._source, self._dtype = source, anatomy.dtype
        self._coded = {each.entry.name: each.shape for each in anatomy.coded.values()}

    def logical(self, entry: TensorEntry) -> TensorEntry:
        """With the form and shape of its numbers."""
        coded = self._coded.get(entry.name)
        return entry if coded is None else replace(entry, format=coded.format, shape=coded[1:])

    def tensor(
        self, name: str, entry: TensorEntry, number_format: str | None = None
    ) -> DenseTensor:
        entry = self.logical(entry)
        if entry.format in PACKED:
            plain = next(n for n, dtype in DTYPES.items() if dtype is self._dtype)
            dtype = self._dtype if number_format is None else torch.float32
            numbers = partial(decoded_rows, self._source, entry, dtype)
            return DenseTensor(name, entry, number_format, plain, numbers)
        if self._source.config_values is not None and entry.format in DTYPES:
            return DenseTensor(
                name, entry, number_format, entry.format, partial(self._whole, entry)
            )
        return DenseTensor(name, entry, number_format)

    def _whole(self, entry: TensorEntry) -> Iterator[torch.Tensor]:
        """GGUF files turn some tensors: they are read in one."""
        yield read_tensor(self._source, entry, DTYPES[entry.format])


def _linears(anatomy: Anatomy) -> Iterator[tuple[str, Any]]:
    """Linear layers that can be coded and are worth it, by the name of their weight.

    Raises UnsupportedModelError for a model of which it cannot be told.
    """
    counts = {each.num_experts for each in anatomy.experts}
    touched = weights_read_directly(anatomy.meta)
    if touched is None:
        raise UnsupportedModelError(
            f"model type {anatomy.config.model_type!r}: cannot tell which linear layers it reads "
            f"by itself, expected one that runs on shapes alone; pack it with --dense bf16"
        )
    touched |= absorbed_weights(anatomy.meta)
    for name, module in anatomy.meta.named_modules():
        if type(module) is not nn.Linear or is_router(name, module, counts):
            continue
        rows, cols = module.weight.shape
        if f"{name}.weight" in touched:
            continue
        if rows >= _FEWEST_ROWS and can_pack("Q8_0", (rows, cols)):
            yield f"{name}.weight", module


def _head_of(meta: Any) -> str:
    """The name of the weight that gives the logits; of a model without one, none."""
    head = meta.get_output_embeddings()
    names = (name for name, module in meta.named_modules() if module is head)
    return next((f"{name}.weight" for name in names), "")
