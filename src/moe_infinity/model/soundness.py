"""Whether a checkpoint is the one of the model that its config makes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moe_infinity.checkpoint.base import Checkpoint
from moe_infinity.checkpoint.expert_layout import ExpertTensors
from moe_infinity.errors import CorruptCheckpointError, UnsupportedModelError
from moe_infinity.kernels.packed import PACKED
from moe_infinity.model.adapters.base import ExpertsModule
from moe_infinity.types import ExpertKey, ExpertSpec, Part


def refuse_strays(checkpoint: Checkpoint, found: ExpertTensors) -> None:
    """In a file that names its tensors itself each one changes what is computed."""
    strays = sorted(checkpoint.tensors.keys() - set(found.dense))
    if strays:
        raise UnsupportedModelError(
            f"{checkpoint.path}: got {len(strays)} tensors that its model has no place for (first: "
            f"{strays[0]!r}), expected none; is it of a newer model?"
        )


def require_fitting(
    path: Path, specs: Mapping[ExpertKey, ExpertSpec], experts: list[ExpertsModule]
) -> None:
    """Experts that were described beforehand have to be those of the model that is built."""
    counts = Counter(key.layer for key in specs)
    wanted = {layer: module.num_experts for layer, module in enumerate(experts)}
    if counts != wanted:  # before anything is made for each: a config may claim any number
        layer = min(n for n in counts.keys() | wanted.keys() if counts[n] != wanted.get(n))
        raise CorruptCheckpointError(
            f"{path}: got {counts[layer]} experts in layer {layer}, expected "
            f"{wanted.get(layer, 'nothing')} from its config"
        )
    expected = {
        ExpertKey(layer, number): {name: shape[1:] for name, shape in module.params.items()}
        for layer, module in enumerate(experts)
        for number in range(module.num_experts)
    }
    found = {
        key: {part.name: _shape(part, expected.get(key, {})) for part in spec.parts}
        for key, spec in specs.items()
    }
    if found != expected:
        key = min(k for k in found.keys() | expected.keys() if found.get(k) != expected.get(k))
        raise CorruptCheckpointError(
            f"{path}: layer {key.layer} expert {key.expert}: got {found.get(key, 'nothing')}, "
            f"expected {expected.get(key, 'nothing')} from its config"
        )


def require_enough(path: Path, config: Any, num_experts: int) -> None:
    """A token cannot go to more experts than a layer has."""
    wanted = getattr(config.get_text_config(), "num_experts_per_tok", None)
    if isinstance(wanted, int) and wanted > num_experts:
        raise CorruptCheckpointError(
            f"{path}: num_experts_per_tok: got {wanted}, expected at most the {num_experts} "
            f"experts of a layer"
        )


def _shape(part: Part, expected: Mapping[str, tuple[int, ...]]) -> tuple[int, ...]:
    """As the model has it: coded matrices are [out, in] whatever it says."""
    turned = part.shape[::-1]
    is_turned = part.format in PACKED and expected.get(part.name) == turned
    return turned if is_turned else part.shape


def require_complete(checkpoint: Checkpoint, info: dict[str, Any]) -> None:
    """Raise CorruptCheckpointError unless the library found every dense tensor, in its shape."""
    if info["mismatched_keys"]:
        name, got, expected = min(info["mismatched_keys"], key=str)
        raise CorruptCheckpointError(
            f"{checkpoint.path}: tensor {name!r} has shape {list(got)} in the checkpoint, expected "
            f"{list(expected)} from its config; is this the config of another model?"
        )
    if info["missing_keys"]:
        raise CorruptCheckpointError(
            f"{checkpoint.path}: lacks {len(info['missing_keys'])} tensors of its model (first: "
            f"{min(info['missing_keys'])!r}); download the checkpoint again"
        )
