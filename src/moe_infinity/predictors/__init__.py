"""Predictors of coming experts, one file each; a new file is found by its name."""

from __future__ import annotations

import sys

from moe_infinity.predictors.base import ExpertPredictor
from moe_infinity.registry import find_class, member_names

AUTO_PREFETCH = "gate_lookahead"  # what prefetch="auto" tries first


def predictor_names() -> list[str]:
    return member_names(sys.modules[__name__])


def find_predictor(name: str) -> type[ExpertPredictor]:
    """The predictor class of that name or 'package.module:Class'; raises UnknownNameError."""
    return find_class(sys.modules[__name__], name, "Predictor", ExpertPredictor)  # type: ignore[type-abstract]
