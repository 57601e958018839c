"""What the trainers share. Knows nothing of networks' forms."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Draw alike every time, and leave the caller's random numbers alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def scaling(inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[T, H] -> mean and 1 / deviation [H]; an input that never changes is scaled by 1."""
    if not len(inputs):
        return torch.zeros(inputs.shape[1]), torch.ones(inputs.shape[1])
    deviation = inputs.std(dim=0, unbiased=False)
    return inputs.mean(dim=0), 1 / torch.where(deviation > 1e-6, deviation, 1.0)


def base_rates(rates: torch.Tensor) -> torch.Tensor:
    """Scores before the sigmoid that say each expert's popularity: where training begins."""
    return torch.logit(rates.nan_to_num(0.0).clamp(1e-3, 0.999))


def many_hot(columns: torch.Tensor, width: int) -> torch.Tensor:
    """[..., K] columns, -1 for none -> [..., width] of 0 and 1."""
    hot = torch.zeros(*columns.shape[:-1], width + 1)
    return hot.scatter_(-1, torch.where(columns < 0, width, columns), 1.0)[..., :width]
