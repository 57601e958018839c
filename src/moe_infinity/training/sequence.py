"""Trains the network of predictors/sequence.py: tokens' embeddings -> experts of all layers.

B: texts, T: tokens, L: layers, K: top-k, E: experts, H: hidden size, D: width of the network.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from moe_infinity.errors import TraceError
from moe_infinity.predictors.sequence import DEPTH, FORM, WINDOW, Predictor
from moe_infinity.tracing.state_tensors import save_state
from moe_infinity.tracing.trace import Trace
from moe_infinity.training._torch import base_rates, many_hot, scaling, seeded
from moe_infinity.training.measuring import measures, split

_WIDTH = 128
_TEXT_TOKENS = 128  # longer requests are cut: what attention cannot see matters little
_BATCH, _EPOCHS = 4, 8
_FEWEST_STEPS, _MOST_STEPS = 150, 600
_RATE = 5e-3
_HIDDEN = -1e9  # score of a token that attention must not see


class Network(nn.Module):
    """What the predictor computes in numpy, a token at a time; here whole texts at once."""

    def __init__(self, num_inputs: int, num_outputs: int) -> None:
        super().__init__()
        self.compress = nn.Linear(num_inputs, _WIDTH)
        self.lstm = nn.LSTM(_WIDTH, _WIDTH, DEPTH, batch_first=True)
        self.out = nn.Linear(_WIDTH, num_outputs)

    def forward(self, embeddings: torch.Tensor) -> torch.Tensor:
        """[B, T, H] -> [B, T, L*E] scores before the sigmoid."""
        x, _ = self.lstm(self.compress(embeddings))  # [B, T, D]
        at = torch.arange(x.shape[1])
        distance = at[:, None] - at
        unseen = (distance < 0) | (distance >= WINDOW)
        similar = (x @ x.mT * (1 / _WIDTH**0.5)).masked_fill(unseen, _HIDDEN)
        scores: torch.Tensor = self.out(x + sparsemax(similar) @ x)
        return scores


def sparsemax(scores: torch.Tensor) -> torch.Tensor:
    """Over the last axis; see predictors/_networks.py."""
    falling = scores.sort(dim=-1, descending=True).values
    sums = falling.cumsum(dim=-1) - 1
    ranks = torch.arange(1, scores.shape[-1] + 1)
    size = (ranks * falling > sums).sum(dim=-1, keepdim=True)
    return (scores - sums.gather(-1, size - 1) / size).clamp(min=0)


def train(trace: Trace, path: Path, seed: int = 0) -> dict[str, float]:
    """Write the network to ``path``; returns recalls. Raises TraceError without embeddings."""
    if trace.embeddings is None:
        raise TraceError(f"{trace.name}: holds no embeddings; record it with --hidden")
    early, late = split(trace)
    with seeded(seed):
        arrays = _train(early)
    save_state(path, FORM, arrays, trace.shape, trace.fingerprint or "")
    predictor = Predictor(trace.shape)
    predictor.load(path)
    return measures(predictor, early, late)


def arrays_of(
    network: Network, mean: torch.Tensor, scale: torch.Tensor
) -> dict[str, NDArray[np.float32]]:
    """The network as the predictor reads it, for inputs (x - mean) * scale given as x."""
    enter = network.compress.weight.T * scale[:, None]  # [H, D]
    found = {"in": enter, "in_bias": network.compress.bias - mean @ enter}
    lstm = dict(network.lstm.named_parameters())
    for layer in range(DEPTH):
        sides = (lstm[f"weight_ih_l{layer}"], lstm[f"weight_hh_l{layer}"])
        found[f"lstm{layer}"] = torch.cat(sides, dim=1).T  # [2D, 4D]
        found[f"lstm{layer}_bias"] = lstm[f"bias_ih_l{layer}"] + lstm[f"bias_hh_l{layer}"]
    found |= {"out": network.out.weight.T, "out_bias": network.out.bias}
    return {name: tensor.detach().numpy().copy() for name, tensor in found.items()}


def _train(trace: Trace) -> dict[str, NDArray[np.float32]]:
    assert trace.embeddings is not None
    embeddings = torch.from_numpy(trace.embeddings.astype(np.float32))  # [T, H]
    ids = torch.from_numpy(trace.ids.astype(np.int64))  # [T, L, K]
    mean, scale = scaling(embeddings)
    embeddings = (embeddings - mean) * scale
    network = Network(embeddings.shape[1], trace.shape.num_layers * trace.shape.num_experts)
    rates = many_hot(ids[:: max(1, len(ids) // 1000)], trace.shape.num_experts).mean(dim=0)
    network.out.bias.data = base_rates(rates).flatten()
    texts = _texts(trace)
    steps = int(np.clip(_EPOCHS * len(texts) // _BATCH, _FEWEST_STEPS, _MOST_STEPS))
    optimizer = torch.optim.AdamW(network.parameters(), lr=_RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        rows = texts[torch.randint(len(texts), (_BATCH,))]  # [B, T], -1 after a text's end
        used = ids[rows]  # [B, T, L, K]
        goal = many_hot(used, trace.shape.num_experts)
        counts = ((rows >= 0)[..., None] & (used >= 0).any(dim=-1))[..., None].expand_as(goal)
        scores = network(embeddings[rows]).view_as(goal)
        loss = nn.functional.binary_cross_entropy_with_logits(scores[counts], goal[counts])
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return arrays_of(network, mean, scale)


def _texts(trace: Trace) -> torch.Tensor:
    """[B, T] rows of the trace, request by request, cut into texts; -1 after a text's end."""
    texts = []
    for request in np.unique(trace.request):
        rows = np.flatnonzero(trace.request == request)
        texts += np.split(rows, range(_TEXT_TOKENS, len(rows), _TEXT_TOKENS))
    longest = max(map(len, texts))
    padded = [np.pad(text, (0, longest - len(text)), constant_values=-1) for text in texts]
    return torch.from_numpy(np.stack(padded))
