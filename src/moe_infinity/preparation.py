"""From a checkpoint to a packing job: what it holds, and what form that can take."""

from __future__ import annotations

import tempfile
from collections.abc import Collection, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from moe_infinity.assembly import open_checkpoint
from moe_infinity.checkpoint.base import Checkpoint
from moe_infinity.checkpoint.hub import unless_downloaded
from moe_infinity.checkpoint.pack_format import DENSE_FORMATS, FORMATS
from moe_infinity.checkpoint.pack_job import DenseTensor, Job
from moe_infinity.checkpoint.remote import open_remote
from moe_infinity.errors import ConfigError, UnsupportedModelError
from moe_infinity.kernels.formats import DTYPES
from moe_infinity.kernels.packed import can_pack
from moe_infinity.model.direct_use import weights_read_directly
from moe_infinity.model.latent_attention import absorbed_weights
from moe_infinity.model.loading import Anatomy, examine, naming, read_config
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
    if source.packed_specs is not None:
        raise UnsupportedModelError(
            f"{source.path}: is packed already, or a GGUF file, expected a checkpoint in 16 or 32 "
            f"bit; pack its source"
        )
    anatomy = examine(source, None)
    maths = [anatomy.adapter.math(each.module) for each in anatomy.experts]
    if FORMATS[experts_format] and any(math.is_transposed for math in maths):
        raise UnsupportedModelError(
            f"{source.path}: its experts are stored [in, out], expected [out, in] for "
            f"{experts_format}; pack them as bf16"
        )
    return Job(
        source=source,
        specs=anatomy.specs,
        dense=list(_dense(anatomy, dense_format)),
        experts_format=experts_format,
        dense_format=dense_format,
        splits_gate_up=all(math.has_gate and not math.is_transposed for math in maths),
        target=target,
    )


def require_forms(experts_format: str, dense_format: str) -> None:
    """Raise ConfigError for an unknown form."""
    _choice("--experts", experts_format, FORMATS)
    _choice("--dense", dense_format, DENSE_FORMATS)


def _choice(option: str, got: str, known: Collection[str]) -> None:
    if got not in known:
        raise ConfigError(f"{option}: got {got!r}, expected one of {', '.join(known)}")


def _dense(anatomy: Anatomy, dense_format: str) -> Iterator[DenseTensor]:
    """Every tensor beside the experts; linear layers coded, where that was asked for. Of a weight
    that serves as embeddings too, a coded copy gives the logits."""
    formats = DENSE_FORMATS[dense_format]
    if formats is None:
        yield from (DenseTensor(entry.name, entry) for entry in anatomy.dense)
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
        shape = entry.shape if entry.format in DTYPES and named.converter is None else ()
        if head in linears and name and name != head and every[head] is every[name]:
            if name not in shared and linears[head].weight.shape == shape:
                yield DenseTensor(name, entry)
                yield DenseTensor(head, entry, head_format)
                shared.add(name)
            elif name not in shared:
                yield DenseTensor(entry.name, entry)
        elif name in linears and linears[name].weight.shape == shape:
            yield DenseTensor(name, entry, head_format if name == head else layer_format)
        else:
            yield DenseTensor(entry.name, entry)


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
