"""How well a predictor does on requests it was not fitted to. Knows nothing of how it learns."""

from __future__ import annotations

import numpy as np

from moe_infinity.errors import TraceError
from moe_infinity.predictors.base import ExpertPredictor
from moe_infinity.simulator.replay import show, watched
from moe_infinity.tracing.event import Event
from moe_infinity.tracing.trace import Trace

_MOST_PASSES = 300  # decode passes that are judged: a few seconds


def split(trace: Trace) -> tuple[Trace, Trace]:
    """Nine tenths of the requests to learn from, the last tenth to judge by."""
    num_requests = len(np.unique(trace.request))
    if num_requests < 2:
        raise TraceError(
            f"{trace.name}: got {num_requests} request, expected at least 2: one is held back to "
            f"judge by; record more prompts"
        )
    return trace.split(num_requests - max(1, num_requests // 10))


def measures(predictor: ExpertPredictor, train: Trace, validation: Trace) -> dict[str, float]:
    """Recall on both parts, and the share of the second's events that it spoke about."""
    seen, _ = recall(predictor, train)
    unseen, spoken = recall(predictor, validation)
    return {"train_recall": seen, "validation_recall": unseen, "spoken": spoken}


def recall(
    predictor: ExpertPredictor, trace: Trace, most_passes: int = _MOST_PASSES
) -> tuple[float, float]:
    """(Recall at as many experts as were used, share of decode events it spoke about).

    Of its last word before a layer's event. The predictor learns on while it is judged.
    """
    found: list[float] = []
    num_events = num_passes = 0
    for each in watched(predictor, trace):
        for event in each.events:
            if each.phase == "decode":
                num_events += 1
                found += _judged(predictor, event)
            show(predictor, each, event)
        num_passes += each.phase == "decode"
        if num_passes == most_passes:
            predictor.end_request()
            break
    return float(np.mean(found)) if found else 0.0, len(found) / max(num_events, 1)


def _judged(predictor: ExpertPredictor, event: Event) -> list[float]:
    scores = predictor.predict()
    if scores is None or not len(event.experts) or not scores[event.layer].any():
        return []
    best = np.argsort(-scores[event.layer], kind="stable")[: len(event.experts)]
    return [float(np.isin(best, event.experts).mean())]
