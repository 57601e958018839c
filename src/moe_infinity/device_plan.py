"""The arithmetic of a device's memory: dense weights, KV cache and workspace first, slots after."""

from __future__ import annotations

import operator
from dataclasses import dataclass

from moe_infinity.config import format_bytes
from moe_infinity.errors import BudgetError
from moe_infinity.size_classes import SizeClass, divide

# With "auto" a device keeps this much free, or so much of it: what shows the desktop grows.
_AUTO_RESERVE_BYTES = 512 * 1024**2
_AUTO_RESERVE_SHARE = 0.05
NUM_SPARE = 2  # slots of a class beside those of the cache, while victims are copied back to RAM


@dataclass(frozen=True)
class DeviceFacts:
    """What planning needs to know of a device. runtime_bytes: what its driver and libraries take
    there; host_bytes: and in RAM."""

    name: str
    free_bytes: int
    total_bytes: int
    runtime_bytes: int = 0
    host_bytes: int = 0


@dataclass(frozen=True)
class DevicePlan:
    """Where every byte of device memory goes. All sizes in bytes."""

    name: str
    budget_bytes: int
    dense_bytes: int
    kv_bytes: int
    workspace_bytes: int
    runtime_bytes: int
    slots_per_class: tuple[int, ...]
    slot_bytes: tuple[int, ...]
    num_spare: int  # of each class
    experts_total: int
    smallest_budget_bytes: int

    @property
    def num_slots(self) -> int:
        return sum(self.slots_per_class)

    @property
    def cache_bytes(self) -> int:
        sizes = zip(self.slots_per_class, self.slot_bytes, strict=True)
        return sum((n + self.num_spare) * size for n, size in sizes)

    @property
    def used_bytes(self) -> int:
        fixed = self.dense_bytes + self.kv_bytes + self.workspace_bytes + self.runtime_bytes
        return fixed + self.cache_bytes

    def arithmetic(self) -> str:
        """One line per term, for people."""
        spare = f" and {self.num_spare * len(self.slot_bytes)} spare" if self.num_spare else ""
        rows = [
            ("dense weights", self.dense_bytes),
            ("KV cache", self.kv_bytes),
            ("activations and logits", self.workspace_bytes),
            ("driver and libraries", self.runtime_bytes),
            (f"expert slots ({self.num_slots} of {self.experts_total}{spare})", self.cache_bytes),
            (f"sum, of {format_bytes(self.budget_bytes)}", self.used_bytes),
        ]
        lines = [f"  {name:<40} {format_bytes(size):>12}" for name, size in rows]
        return "\n".join([f"  on {self.name}:", *lines])


@dataclass(frozen=True)
class DeviceNeeds:
    """What a model takes on a device beside expert slots, at a context."""

    dense_bytes: int
    kv_bytes: int
    workspace_bytes: int

    @property
    def total(self) -> int:
        return self.dense_bytes + self.kv_bytes + self.workspace_bytes


@dataclass(frozen=True)
class Fewest:
    """What a device cannot do without: slots of each size class, and what lies beside them at the
    shortest context."""

    slots: list[tuple[int, SizeClass]]
    beside: DeviceNeeds


def device_budget(facts: DeviceFacts, asked_bytes: int | None) -> int:
    """Bytes to plan with. Raises BudgetError for more than is free; None: what can be spared."""
    if asked_bytes is None:
        reserve = max(_AUTO_RESERVE_BYTES, int(facts.total_bytes * _AUTO_RESERVE_SHARE))
        return max(facts.free_bytes - reserve, facts.free_bytes // 2)
    if asked_bytes > facts.free_bytes:
        raise BudgetError(
            f"vram: got {format_bytes(asked_bytes)}, expected at most the "
            f"{format_bytes(facts.free_bytes)} that are free of {facts.name}'s "
            f"{format_bytes(facts.total_bytes)}; ask for less, or close what uses the rest"
        )
    return asked_bytes


def plan_device(
    facts: DeviceFacts,
    budget: int,
    needs: DeviceNeeds,
    fewest: Fewest,
    vram_slots: int | None,
    num_spare: int,
) -> DevicePlan:
    """Divide a device's budget. vram_slots: capacity in experts, if it is bounded so too.
    Raises BudgetError with the arithmetic if it cannot work."""
    classes = [c for _, c in fewest.slots]
    beside = facts.runtime_bytes + sum(num_spare * c.slot_bytes for c in classes)
    least = fewest.beside.total + beside + sum(n * c.slot_bytes for n, c in fewest.slots)
    plan = DevicePlan(
        name=facts.name,
        budget_bytes=budget,
        dense_bytes=needs.dense_bytes,
        kv_bytes=needs.kv_bytes,
        workspace_bytes=needs.workspace_bytes,
        runtime_bytes=facts.runtime_bytes,
        slots_per_class=divide(budget - needs.total - beside, fewest.slots, vram_slots),
        slot_bytes=tuple(c.slot_bytes for c in classes),
        num_spare=num_spare,
        experts_total=sum(c.num_experts for c in classes),
        smallest_budget_bytes=-(-least // 1024**2) * 1024**2,
    )
    _refuse_too_small(plan, fewest, vram_slots)
    return plan


def _refuse_too_small(plan: DevicePlan, fewest: Fewest, vram_slots: int | None) -> None:
    needed = [n for n, _ in fewest.slots]
    if all(map(operator.ge, plan.slots_per_class, needed)):
        return
    if vram_slots is not None and vram_slots < sum(needed):
        raise BudgetError(
            f"vram_slots: got {vram_slots}, expected at least {sum(needed)}: one token's experts "
            f"of one layer"
        )
    raise BudgetError(
        f"the model will not fit into vram={format_bytes(plan.budget_bytes)}:\n"
        f"{plan.arithmetic()}\n"
        f"what is beside the experts has to lie on the device, and one token's experts of a "
        f"layer; the smallest budget that works is {format_bytes(plan.smallest_budget_bytes)}"
    )
