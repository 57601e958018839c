"""Quantised weights in safetensors files: which tensors are a weight's codes, scales, zero points.

The codes take the name and shape of the weight; its scales and zero points go beside it
(``Sides``), so that everything else sees a model's usual tensors. Methods are those of the
``quantization_config`` in config.json.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moe_infinity.checkpoint.base import Sides, TensorEntry
from moe_infinity.checkpoint.code_finders import METHODS, Misfit, Tensors
from moe_infinity.errors import CorruptCheckpointError, UnsupportedModelError

# Of activations and keys, which are computed as they are; and words about what is told elsewhere.
_IGNORED = (
    *(".input_scale", "activation_scale", "activation_scale_inv", ".k_scale", ".v_scale"),
    *(".weight_shape", ".g_idx"),
)
# What belongs to codes and was not taken: of another method, or of a form that is not known.
_OF_CODES = (
    *(
        ".weight_scale",
        "_scale_inv",
        ".weight_packed",
        ".weight_zero_point",
        ".weight_global_scale",
    ),
    *(".qweight", ".qzeros", "_proj_blocks", "_proj_scales"),
)


def quantisation_of(path: Path) -> dict[str, Any] | None:
    """What a folder's config.json says of quantised weights; None if it does not, or cannot be
    read: whoever builds a model of it says so."""
    try:
        raw = json.loads((path / "config.json").read_text())
        values = (raw, raw.get("text_config") or {})
        found = (v.get(n) for v in values for n in ("quantization_config", "compression_config"))
        return next((each for each in found if isinstance(each, dict) and each), None)
    except (OSError, ValueError, AttributeError):
        return None


def column_groups(
    stored: Mapping[str, TensorEntry], sides: Mapping[str, Sides]
) -> tuple[TensorEntry, int] | None:
    """A tensor that says which group each column is of, and the columns of a group if they are in
    their order. Whoever shuffles columns does so in all layers: one is enough. None: none says."""
    for name in sorted(stored):
        weight = f"{name.removesuffix('g_idx')}weight"
        if name.endswith(".g_idx") and stored[name].format == "I32" and weight in sides:
            return stored[name], sides[weight].scales.group[1]
    return None


def gather(
    path: Path, stored: Mapping[str, TensorEntry], quantisation: Mapping[str, Any] | None
) -> tuple[Tensors, dict[str, Sides]]:
    """The model's tensors, and what of them lies apart. quantisation: None where nothing is.

    Raises UnsupportedModelError for a method or form that is not known here, CorruptCheckpointError
    for tensors that do not fit together or are not what the config says.
    """
    if quantisation is None:
        _refuse_codes(path, stored)
        return dict(stored), {}
    method = str(quantisation.get("quant_method") or "").replace("_", "-")
    find = METHODS.get(method)
    if find is None:
        raise UnsupportedModelError(
            f"{path}: the weights are quantised by {method or 'an unnamed method'!r}, expected one "
            f"of {', '.join(METHODS)}; use the model's 16-bit checkpoint"
        )
    tensors = {n: e for n, e in stored.items() if not n.endswith(_IGNORED)}
    sides: dict[str, Sides] = {}
    try:
        for coded, its_sides, used in find(tensors, quantisation):
            for name in used:
                tensors.pop(name, None)
            tensors[coded.name] = coded
            sides[coded.name] = its_sides
        left = next((n for n in sorted(tensors) if n.endswith(_OF_CODES)), None)
        if left is not None:
            raise Misfit(
                f"got tensor {left!r}, expected only what {method} makes; is that the "
                f"quant_method of config.json?",
                is_unknown=True,
            )
    except Misfit as error:
        kind = UnsupportedModelError if error.is_unknown else CorruptCheckpointError
        advice = "use another checkpoint of the model" if error.is_unknown else "download it again"
        raise kind(f"{path}: {error}; {advice}") from error
    if not sides:
        raise CorruptCheckpointError(
            f"{path}: its config says the weights are quantised by {method}, expected such tensors "
            f"and found none; is the config of another checkpoint?"
        )
    return tensors, sides


def _refuse_codes(path: Path, stored: Mapping[str, TensorEntry]) -> None:
    """Of a checkpoint whose config does not speak of any."""
    endings = (".qweight", ".weight_packed", "_scale_inv")
    found = next((name for name in stored if name.endswith(endings)), None)
    if found is not None:
        raise CorruptCheckpointError(
            f"{path}: got quantised weights ({found!r}), expected a quantization_config in "
            f"config.json that says how; download config.json again"
        )
