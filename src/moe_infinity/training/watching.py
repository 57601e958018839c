"""Fits a predictor that learns by watching: shows it a trace and saves what it knows then."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from moe_infinity.errors import TraceError
from moe_infinity.predictors.base import ExpertPredictor
from moe_infinity.simulator.replay import teach
from moe_infinity.tracing.trace import Trace
from moe_infinity.training.measuring import recall, split


def watch(predictor: ExpertPredictor, trace: Trace, path: Path) -> dict[str, float]:
    """Save to ``path`` what all of ``trace`` taught; returns its recall on the last requests.

    Of a single request, its recall on that. Raises TraceError where nothing was learned.
    """
    predictor.fingerprint = trace.fingerprint or ""
    late = trace
    if len(np.unique(trace.request)) > 1:
        early, late = split(trace)
        teach(predictor, early)
    unseen, spoken = recall(predictor, late, late.num_tokens)  # it learns on meanwhile
    predictor.save(path)
    if not path.is_file():
        raise TraceError(f"{trace.name}: nothing was learned from it; it needs decode passes")
    return {"validation_recall": unseen, "spoken": spoken}
