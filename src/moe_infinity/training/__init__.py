"""Fits the predictors that hold networks, from traces. Only what trains loads torch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from moe_infinity.tracing.trace import Trace

# (trace, file to write, seed) -> measures of the fit by name
Trainer = Callable[[Trace, Path, int], dict[str, float]]


def _learned(trace: Trace, path: Path, seed: int = 0) -> dict[str, float]:
    from moe_infinity.training.learned import train

    return train(trace, path, seed)


def _sequence(trace: Trace, path: Path, seed: int = 0) -> dict[str, float]:
    from moe_infinity.training.sequence import train

    return train(trace, path, seed)


TRAINERS: dict[str, Trainer] = {"learned": _learned, "sequence": _sequence}
