"""Trains the networks of predictors/learned.py: the router's input -> the next layers' experts.

T: tokens, L: layers, K: top-k, E: experts, H: hidden size, M: width of a network.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from moe_infinity.errors import TraceError
from moe_infinity.predictors.learned import FORM, STRIDE, Predictor
from moe_infinity.tracing.state_tensors import save_state
from moe_infinity.tracing.trace import Trace
from moe_infinity.training._torch import base_rates, many_hot, scaling, seeded
from moe_infinity.training.measuring import measures, split

_WIDTH = 128  # 57 MB of networks at 48 layers of 2048 x 128 experts
_BATCH, _EPOCHS = 128, 8
_FEWEST_STEPS, _MOST_STEPS = 300, 600  # per layer: minutes on two cores for a model of 48
_RATE = 2e-3


def train(trace: Trace, path: Path, seed: int = 0) -> dict[str, float]:
    """Write the networks to ``path``; returns recalls. Raises TraceError without hidden states."""
    if trace.hidden is None:
        raise TraceError(f"{trace.name}: holds no router inputs; record it with --hidden")
    early, late = split(trace)
    with seeded(seed):
        layers = [_train_layer(early, layer) for layer in range(trace.shape.num_layers)]
    networks = {name: np.stack([each[name] for each in layers]) for name in layers[0]}
    save_state(path, FORM, networks, trace.shape, trace.fingerprint or "")
    predictor = Predictor(trace.shape)
    predictor.load(path)
    return measures(predictor, early, late)


def new_network(num_inputs: int, num_experts: int) -> nn.Sequential:
    """What the predictor computes in numpy, before the sigmoid."""
    return nn.Sequential(
        nn.Linear(num_inputs, _WIDTH), nn.ReLU(), nn.Linear(_WIDTH, STRIDE * num_experts)
    )


def arrays_of(
    network: nn.Sequential, mean: torch.Tensor, scale: torch.Tensor
) -> dict[str, NDArray[np.float32]]:
    """The network as the predictor reads it, for inputs (x - mean) * scale given as x."""
    first, _, second = network
    assert isinstance(first, nn.Linear) and isinstance(second, nn.Linear)
    w1 = first.weight.T * scale[:, None]  # [H, M]
    found = {"w1": w1, "b1": first.bias - mean @ w1, "w2": second.weight.T, "b2": second.bias}
    return {name: tensor.detach().numpy().copy() for name, tensor in found.items()}


def _train_layer(trace: Trace, layer: int) -> dict[str, NDArray[np.float32]]:
    assert trace.hidden is not None
    ran = np.flatnonzero((trace.ids[:, layer] >= 0).any(axis=1))
    inputs = torch.from_numpy(trace.hidden[ran, layer].astype(np.float32))  # [T, H]
    ids = _targets(trace, layer)[torch.from_numpy(ran)]  # [T, 2K]
    mean, scale = scaling(inputs)
    inputs = (inputs - mean) * scale
    network = new_network(inputs.shape[1], trace.shape.num_experts)
    num_outputs = STRIDE * trace.shape.num_experts
    last = network[2]
    assert isinstance(last, nn.Linear)
    last.bias.data = base_rates(many_hot(ids, num_outputs).mean(dim=0))
    steps = int(np.clip(_EPOCHS * len(inputs) // _BATCH, _FEWEST_STEPS, _MOST_STEPS))
    optimizer = torch.optim.AdamW(network.parameters(), lr=_RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps if len(inputs) else 0):
        rows = torch.randint(len(inputs), (_BATCH,))
        goal = many_hot(ids[rows], num_outputs)
        loss = nn.functional.binary_cross_entropy_with_logits(network(inputs[rows]), goal)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
    return arrays_of(network, mean, scale)


def _targets(trace: Trace, layer: int) -> torch.Tensor:
    """[T, 2K] experts of the next two layers, as columns of [2E]; -1: none."""
    ids = np.full((trace.num_tokens, STRIDE, trace.shape.top_k), -1, dtype=np.int64)
    coming = trace.ids[:, layer + 1 : layer + 1 + STRIDE]
    ids[:, : coming.shape[1]] = coming
    offsets = np.arange(STRIDE)[:, None] * trace.shape.num_experts
    return torch.from_numpy(np.where(ids >= 0, ids + offsets, -1).reshape(len(ids), -1))
