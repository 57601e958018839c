"""How right a predictor is, by how many layers ahead it speaks; caches aside."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moe_infinity.predictors.base import ExpertPredictor
from moe_infinity.simulator.replay import show, watched
from moe_infinity.tracing.trace import Trace

EXTRA = 2  # guesses beyond top-k in the second measure


@dataclass(frozen=True)
class Accuracy:
    """By distance in layers, nearest first: share of the experts used that were among the top-k
    guesses (recall@k) and among two more. asked: events that a prediction was there for.
    """

    recall: list[float | None]
    recall_extra: list[float | None]
    asked: list[int]


def measure(trace: Trace, predictor: ExpertPredictor, max_distance: int) -> Accuracy:
    """Let ``predictor`` watch a trace; compare what it said ``d`` layers before with the truth.

    Counts decode only, also over the end of a token: the first layers of the next one are ahead
    of the last of this one.
    """
    num_layers = trace.shape.num_layers
    sums = np.zeros((2, max_distance))
    asked = np.zeros(max_distance, dtype=np.int64)
    said: deque[NDArray[np.float64] | None] = deque(maxlen=max_distance)  # newest first
    for each in watched(predictor, trace):
        if each.starts_request:
            said.clear()
        for event in each.events:
            if each.phase == "decode" and len(event.experts):
                for distance, rows in enumerate(said):
                    if rows is None or not rows[distance].any():
                        continue
                    asked[distance] += 1
                    hits = _found(rows[distance], event.experts, trace.shape.top_k)
                    sums[:, distance] += np.array(hits) / len(event.experts)
            show(predictor, each, event)
            scores = predictor.predict()
            coming = (event.layer + 1 + np.arange(max_distance)) % num_layers
            said.appendleft(None if scores is None else scores[coming].copy())
    means = sums / np.maximum(asked, 1)
    return Accuracy(_list(means[0], asked), _list(means[1], asked), asked.tolist())


def _found(scores: NDArray[np.float64], experts: NDArray[np.int64], top_k: int) -> tuple[int, int]:
    """Of the experts used, how many were among the best ``top_k`` guesses, and two more."""
    ranked = np.argsort(-scores, kind="stable")
    ranked = ranked[scores[ranked] > 0]
    near = np.isin(experts, ranked[:top_k]).sum()
    return int(near), int(np.isin(experts, ranked[: top_k + EXTRA]).sum())


def _list(means: NDArray[np.float64], asked: NDArray[np.int64]) -> list[float | None]:
    return [float(mean) if count else None for mean, count in zip(means, asked, strict=True)]
