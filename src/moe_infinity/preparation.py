"""From a checkpoint to a packing job: which experts it has, and what form they can take."""

from __future__ import annotations

from pathlib import Path

from moe_infinity.assembly import open_checkpoint
from moe_infinity.checkpoint.base import Checkpoint
from moe_infinity.checkpoint.pack_format import FORMATS
from moe_infinity.checkpoint.pack_job import Job
from moe_infinity.errors import ConfigError, UnsupportedModelError
from moe_infinity.model.loading import examine


def packing_job(path: Path, target: Path, experts_format: str) -> Job:
    """What packing the checkpoint at ``path`` takes; nothing but headers is read. The job's source
    is open: close it.

    Raises ConfigError for an unknown form, CheckpointError if the model cannot be packed so.
    """
    if experts_format not in FORMATS:
        raise ConfigError(
            f"--experts: got {experts_format!r}, expected one of {', '.join(FORMATS)}"
        )
    source = open_checkpoint(path)
    try:
        return _job(source, target, experts_format)
    except BaseException:
        source.close()
        raise


def _job(source: Checkpoint, target: Path, experts_format: str) -> Job:
    if source.packed_specs is not None:
        raise UnsupportedModelError(
            f"{source.path}: is packed already, expected a checkpoint in 16 or 32 bit; pack its "
            f"source"
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
        dense=anatomy.dense,
        experts_format=experts_format,
        splits_gate_up=all(math.has_gate and not math.is_transposed for math in maths),
        target=target,
    )
