"""From a checkpoint to a model whose dense weights are in memory and whose experts are places."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    rename_source_key,
)

from moe_infinity.checkpoint.base import Checkpoint, Sides, TensorEntry
from moe_infinity.checkpoint.expert_layout import (
    ExpertTensors,
    NameRule,
    build_specs,
    sort_tensors,
)
from moe_infinity.checkpoint.safetensors import ITEM_BYTES
from moe_infinity.devices.base import Device
from moe_infinity.errors import (
    CheckpointError,
    CheckpointNotFoundError,
    CorruptCheckpointError,
    UnsupportedModelError,
)
from moe_infinity.kernels.formats import DTYPES, require_supported
from moe_infinity.kernels.packed import PACKED
from moe_infinity.model import soundness
from moe_infinity.model.adapters import _interface, find_adapter
from moe_infinity.model.adapters.base import Adapter, ExpertsModule
from moe_infinity.model.coded_linears import CodedLinear, attach_coded, coded_linears
from moe_infinity.model.config_values import first_number
from moe_infinity.model.lazy_tensors import LazyTensor, Placeholder, lazy_tensor
from moe_infinity.model.looked_up import LookedUp, attach_looked_up, find_looked_up
from moe_infinity.model.packed_linears import move
from moe_infinity.model.quiet import Quiet
from moe_infinity.model.skeleton import build_meta, find_experts, without_expert_weights
from moe_infinity.types import ExpertKey, ExpertShape, ExpertSpec

# Where a config does not say in a known word: more than most models use.
_TOP_K_UNKNOWN = 8


@dataclass(frozen=True)
class Anatomy:
    """What headers and config say about a model; no weight was read for it."""

    config: Any
    meta: Any  # the whole model on the meta device
    adapter: Adapter
    experts: list[ExpertsModule]
    shape: ExpertShape
    dense: list[TensorEntry]
    specs: dict[ExpertKey, ExpertSpec]
    dtype: torch.dtype  # of the computation
    coded: Mapping[str, CodedLinear]  # linear layers whose weights stay coded, by the weight's name
    has_tokenizer: bool  # that may be loaded
    looked_up: LookedUp | None  # an embedding that could stay on disk


def read_config(path: Path) -> Any:
    """The model's config. Raises CheckpointNotFoundError or CorruptCheckpointError."""
    file = path / "config.json"
    if not path.is_dir():
        raise CheckpointNotFoundError(f"{path}: no such folder, expected a checkpoint's")
    if not file.exists():
        raise CheckpointNotFoundError(f"{path}: has no config.json, expected a model's folder")
    try:
        said = json.loads(file.read_text()).get("quantization_config")
        if not isinstance(said, (dict, type(None))):
            raise ValueError(f"quantization_config is {type(said).__name__}, expected a table")
        config = transformers.AutoConfig.from_pretrained(path)
    except Exception as error:  # of any kind: the library checks values with errors of its own
        unknown = "model_type" in str(error) or "does not recognize" in str(error)
        kind = UnsupportedModelError if unknown else CorruptCheckpointError
        raise kind(
            f"{file}: got no config that can be read ({_in_one_line(error)}), expected that of a "
            f"model the installed transformers knows"
        ) from error
    for each in {id(c): c for c in (config, config.get_text_config())}.values():
        if getattr(each, "quantization_config", None) is not None:
            del each.quantization_config  # the checkpoint sees to it: no layer of the library's own
    return config


def config_of(checkpoint: Checkpoint) -> Any:
    """Of a checkpoint that has no config.json, from its own values."""
    if checkpoint.config_values is None:
        return read_config(checkpoint.path)
    try:
        return transformers.AutoConfig.for_model(**checkpoint.config_values)
    except Exception as error:  # of any kind: the library checks values with errors of its own
        raise CorruptCheckpointError(
            f"{checkpoint.path}: got values that make no config ({_in_one_line(error)}), expected "
            f"those of a model"
        ) from error


def examine(checkpoint: Checkpoint, dtype: str | None) -> Anatomy:
    """Find every expert and every dense tensor of a checkpoint, from headers and config alone."""
    config = config_of(checkpoint)
    meta = _build(checkpoint, config)
    adapter = find_adapter(config.model_type)
    experts = find_experts(meta)
    found = _sort(checkpoint, meta, adapter, experts)
    if checkpoint.config_values is not None:
        soundness.refuse_strays(checkpoint, found)
    specs = dict(checkpoint.packed_specs or _specs(experts, found, checkpoint.sides))
    if checkpoint.packed_specs is not None:
        soundness.require_fitting(checkpoint.path, specs, experts)
    counts = tuple(module.num_experts for module in experts)
    soundness.require_enough(checkpoint.path, config, max(counts))
    top_k = min(adapter.top_k or _top_k(config), max(counts))
    shape = ExpertShape(len(experts), max(counts), top_k, counts)
    dense = [checkpoint.tensors[name] for name in found.dense]
    computed = _compute_dtype(config, dense, dtype)
    rule = naming(meta, adapter)
    coded = coded_linears(checkpoint, meta, rule, dense)
    looked_up = find_looked_up(meta, rule, dense)
    parts = (config, meta, adapter, experts, shape, dense, specs, computed, coded)
    return Anatomy(*parts, checkpoint.has_tokenizer, looked_up)


def are_coded(anatomy: Anatomy) -> bool:
    """Whether all of the experts' matrices are."""
    parts = (part for spec in anatomy.specs.values() for part in spec.parts)
    return all(part.format in PACKED for part in parts if len(part.shape) == 2)


def _specs(
    experts: list[ExpertsModule], found: ExpertTensors, sides: Mapping[str, Sides]
) -> dict[ExpertKey, ExpertSpec]:
    """Of all experts, from the checkpoint's tensors."""
    specs: dict[ExpertKey, ExpertSpec] = {}
    for layer, module in enumerate(experts):
        params = {name: found.params[f"{module.name}.{name}"] for name in module.params}
        for virtual_name, virtual in params.items():
            for piece in virtual.pieces:
                require_supported(f"{module.name}.{virtual_name}", piece.entry.format)
        built = build_specs(layer, params, ITEM_BYTES, sides)
        specs |= {spec.key: spec for spec in built}
    return specs


def load(
    checkpoint: Checkpoint,
    anatomy: Anatomy,
    device: Device | None = None,
    looks_up: bool = False,
) -> tuple[nn.Module, list[nn.Module]]:
    """Build the model with its dense weights in owned memory, or on a device. Returns it and its
    experts modules. looks_up: the embedding stays on disk; the checkpoint has to stay open.

    Raises CorruptCheckpointError if a dense tensor is missing, ReadError if one cannot be read.
    """
    _interface.register()
    failures: list[CheckpointError] = []
    looked_up = anatomy.looked_up if looks_up else None
    own = dict(anatomy.meta.named_parameters())  # without those that are another one's
    lazy = _lazy_tensors(checkpoint, anatomy, looked_up, own, failures)
    with without_expert_weights(anatomy.adapter, anatomy.experts), Quiet():
        try:
            model, info = type(anatomy.meta).from_pretrained(
                None,
                config=anatomy.config,
                state_dict=lazy,
                dtype=anatomy.dtype,
                experts_implementation=_interface.IMPLEMENTATION,
                ignore_mismatched_sizes=True,  # they are named below
                output_loading_info=True,
            )
        except Exception:
            if failures:
                raise failures[0] from None
            raise
    if failures:
        raise failures[0]
    soundness.require_complete(checkpoint, info)
    attach_coded(model, checkpoint, anatomy.coded, anatomy.dtype, own)
    if looked_up is not None:
        attach_looked_up(model, checkpoint, looked_up, anatomy.dtype)
    if device is not None:
        move(model, device.torch_device)
    # Of training, and some configs keep it: every pass would collect them and compute a loss.
    model.config.get_text_config().output_router_logits = False
    _set_generation_config(model, checkpoint.path)
    return model, [model.get_submodule(module.name) for module in anatomy.experts]


def _lazy_tensors(
    checkpoint: Checkpoint,
    anatomy: Anatomy,
    looked_up: LookedUp | None,
    own: Container[str],
    failures: list[CheckpointError],
) -> dict[str, LazyTensor | Placeholder]:
    """By the checkpoint's name; linear layers that stay coded by the model's."""
    coded = {linear.entry.name for linear in anatomy.coded.values()}
    left = coded | ({looked_up.entry.name} if looked_up else set())
    plain = (entry for entry in anatomy.dense if entry.name not in left)
    lazy: dict[str, LazyTensor | Placeholder] = {
        e.name: lazy_tensor(checkpoint, e, failures, anatomy.dtype) for e in plain
    }
    hidden = {name: linear.shape for name, linear in anatomy.coded.items() if name in own}
    if looked_up is not None:
        hidden[looked_up.entry.name] = looked_up.shape
    return lazy | {name: Placeholder(shape, anatomy.dtype) for name, shape in hidden.items()}


def _build(checkpoint: Checkpoint, config: Any) -> Any:
    path = checkpoint.path
    source = path if checkpoint.config_values is not None else path / "config.json"
    try:
        return build_meta(config)
    except CheckpointError:
        raise
    except Exception as error:
        raise CorruptCheckpointError(
            f"{source}: got a config that {config.model_type!r} cannot be built from "
            f"({_in_one_line(error)}), expected that of a model"
        ) from error


def _in_one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]


def _sort(
    checkpoint: Checkpoint, meta: nn.Module, adapter: Adapter, experts: list[ExpertsModule]
) -> ExpertTensors:
    entries = (checkpoint.tensors[name] for name in sorted(checkpoint.tensors, key=_natural_key))
    expected = {f"{m.name}.{p}": shape for m in experts for p, shape in m.params.items()}
    if checkpoint.packed_specs is not None:
        expected = {}
    known = meta.state_dict().keys()
    turned = [m for m in experts if getattr(m.module, "is_transposed", False)]
    transposed = {f"{m.name}.{p}" for m in turned for p, s in m.params.items() if len(s) == 3}
    return sort_tensors(entries, naming(meta, adapter), expected, known, transposed)


def _natural_key(name: str) -> list[int | str]:
    """Numbers in a name count as numbers: expert_2 comes before expert_10, as it is loaded."""
    parts = re.split(r"(\d+)", name)
    return [int(part) if number % 2 else part for number, part in enumerate(parts)]


def naming(meta: Any, adapter: Adapter) -> Callable[[str], NameRule]:
    """The library's own renaming of checkpoint tensors, as its loader applies it."""
    mapping = [*get_model_conversion_mapping(meta), *adapter.converters]
    renamings = [m for m in mapping if isinstance(m, WeightRenaming)]
    converters = [m for m in mapping if isinstance(m, WeightConverter)]
    by_pattern = {pattern: c for c in converters for pattern in c.source_patterns}
    known = meta.state_dict()
    prefix = meta.base_model_prefix

    def rule(name: str) -> NameRule:
        renamed, pattern = rename_source_key(name, renamings, converters, prefix, known)
        if renamed not in known and name in known:
            renamed, pattern = rename_source_key(name, [], [], prefix, known)
        return NameRule(renamed, pattern, by_pattern[pattern] if pattern else None)

    return rule


def _top_k(config: Any) -> int:
    names = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k")
    found = first_number(
        config.get_text_config(), *names, "moe_num_active_experts", "top_k_experts"
    )
    return found or _TOP_K_UNKNOWN


def _compute_dtype(config: Any, dense: list[TensorEntry], wanted: str | None) -> torch.dtype:
    if wanted not in (None, "auto"):
        return getattr(torch, wanted)  # type: ignore[no-any-return]
    stored = getattr(config, "dtype", None) or getattr(config.get_text_config(), "dtype", None)
    if isinstance(stored, torch.dtype) and stored.is_floating_point:
        return stored
    floats = (DTYPES[entry.format] for entry in dense if entry.format in DTYPES)
    return next(floats, torch.float32)


def _set_generation_config(model: Any, path: Path) -> None:
    if (path / "generation_config.json").exists():
        model.generation_config = transformers.GenerationConfig.from_pretrained(path)
