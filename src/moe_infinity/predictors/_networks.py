"""The arithmetic of small networks, for inference in numpy. Knows nothing of how they learn."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from moe_infinity.errors import TraceError

Floats = NDArray[np.float32]


def sigmoid(x: Floats) -> Floats:
    y: Floats = np.reciprocal(1 + np.exp(-np.clip(x, -60, 60)))  # exp(88) is float32's end
    return y


def softmax(scores: Floats) -> Floats:
    """Over the last axis; experts a router masks (-inf) get nothing."""
    finite = np.nan_to_num(scores, nan=-60.0, posinf=60.0, neginf=-1e4)
    powers = np.exp(finite - finite.max(axis=-1, keepdims=True))
    y: Floats = powers / powers.sum(axis=-1, keepdims=True)
    return y


def mean_probabilities(logits: Floats, width: int) -> Floats:
    """[T, N] router logits -> [width] softmax, mean over tokens; 0 beyond N."""
    row = np.zeros(width, dtype=np.float32)
    row[: logits.shape[1]] = softmax(logits).mean(axis=0)
    return row


def sparsemax(scores: Floats) -> Floats:
    """[N] the nearest point of the simplex: most weights are exactly 0.

    Martins and Astudillo (arXiv 1602.02068).
    """
    falling = np.sort(scores)[::-1]
    sums = np.cumsum(falling) - 1
    size = int((np.arange(1, len(scores) + 1) * falling > sums).sum())
    weights: Floats = np.maximum(scores - sums[size - 1] / size, 0)
    return weights


def lstm_cell(gates: Floats, cell: Floats) -> tuple[Floats, Floats]:
    """gates [4D] in torch's order, before their functions; returns output and cell [D]."""
    enter, forget, new, leave = np.split(gates, 4)
    cell = sigmoid(forget) * cell + sigmoid(enter) * np.tanh(new)
    return sigmoid(leave) * np.tanh(cell), cell


def any_of(chances: Floats) -> NDArray[np.float64]:
    """Chance that at least one token of the first axis uses an expert."""
    either: NDArray[np.float64] = 1 - (1 - chances.astype(np.float64)).prod(axis=0)
    return either


def check_width(got: int, expected: int, name: str) -> None:
    """Raise TraceError where inputs are not as wide as those a network learned from."""
    if got != expected:
        raise TraceError(
            f"{name}: inputs are {got} wide, its networks were fitted to {expected}; "
            f"fit it to a trace of this model"
        )
