"""Does the engine agree with stock transformers on a family, and with itself at every capacity?"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from moe_infinity import MoE
from support.families import (
    Family,
    build_tiny,
    force_routing,
    logits,
    record_routing,
    save_tiny,
    stock_spread,
    tiny_input_ids,
)

# Stock's implementations agree to the last bit on some families. Rounding of the logits
# themselves is then the smallest difference that means anything: units in the last place.
_FLOOR_ULPS = 4
_BUDGET = "8GiB"
POLICIES = ("fifo", "lru", "lfu", "lfru", "next_use")


@dataclass(frozen=True)
class Agreement:
    """Largest differences of logits, and whether they were bit-identical throughout."""

    dtype: str
    difference: float
    spread: float  # of stock's own implementations, routing forced equal
    floor: float
    bit_identical: bool
    num_settings: int

    @property
    def is_within(self) -> bool:
        return self.difference <= max(2 * self.spread, self.floor)


def compare(item: Family, folder: Path, dtype: torch.dtype) -> Agreement:
    """Save a tiny random model and run it by stock and by the engine at several settings."""
    path = folder / str(dtype).removeprefix("torch.")
    save_tiny(item, path, dtype)
    ids = tiny_input_ids()
    stock = build_tiny(item, dtype=dtype)
    stock.set_experts_implementation("eager")
    with torch.no_grad():
        with record_routing(stock) as routing:
            expected = logits(stock, ids)
        spread = stock_spread(stock, ids)
    with MoE(path, ram=_BUDGET, max_batch=ids.shape[0]) as moe:
        reference = _logits(moe, ids)
        with torch.no_grad(), force_routing(moe.model, routing):
            difference = (logits(moe.model, ids) - expected).abs().max().item()
        top_k = moe.plan.working_set // len(moe.residency())
        smallest = top_k * len(moe.plan.slots_per_class)
        everything = moe.plan.experts_total
    settings = _settings(smallest, everything)
    same = all(torch.equal(_run(path, ids, s), reference) for s in settings)
    ulp = torch.finfo(dtype).eps * expected.abs().max().item()
    floor = _FLOOR_ULPS * ulp
    return Agreement(path.name, difference, spread, floor, same, len(settings) + 1)


def _settings(smallest: int, everything: int) -> list[dict[str, Any]]:
    """Every policy at the smallest capacity; capacities in between; reads by the kernel, by 1 and
    by 8 threads."""
    middle = (smallest + everything) // 2
    settings: list[dict[str, Any]] = [
        {"policy": policy, "ram_slots": smallest, "num_read_threads": (1, 8, None)[number % 3]}
        for number, policy in enumerate(POLICIES)
    ]
    settings += [{"ram_slots": slots, "num_read_threads": 8} for slots in (smallest + 1, middle)]
    return settings


def _run(path: Path, ids: torch.Tensor, settings: dict[str, Any]) -> torch.Tensor:
    with MoE(path, ram=_BUDGET, max_batch=ids.shape[0], **settings) as moe:
        found = _logits(moe, ids)
        moe.check_integrity()
        return found


def _logits(moe: MoE, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return logits(moe.model, ids)
