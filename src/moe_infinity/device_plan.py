"""The arithmetic of devices' memory: dense weights, KV cache and workspace first, slots after."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Sequence
from dataclasses import dataclass, replace

from moe_infinity.config import format_bytes
from moe_infinity.errors import BudgetError
from moe_infinity.size_classes import SizeClass, divide

# With "auto" a device keeps this much free, or so much of it: what shows the desktop grows.
_AUTO_RESERVE_BYTES = 512 * 1024**2
_AUTO_RESERVE_SHARE = 0.05
_WHY_FIRST = (
    "what is beside the experts has to lie on the device, and one token's experts of a layer"
)
_WHY_OTHERS = (
    "a device beside the model's own has to hold tokens and an expert of each size; leave it out"
)
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
        computing = [
            ("dense weights", self.dense_bytes),
            ("KV cache", self.kv_bytes),
            ("activations and logits", self.workspace_bytes),
        ]
        rows = [
            *(computing if self.dense_bytes else [("tokens and results", self.workspace_bytes)]),
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


@dataclass(frozen=True)
class Wish:
    """What is to be planned for one device. needs: beside expert slots, at the planned context."""

    facts: DeviceFacts
    budget_bytes: int
    needs: DeviceNeeds
    fewest: Fewest


def plan_devices(
    wishes: Sequence[Wish], vram_slots: int | None, num_spare: int
) -> tuple[DevicePlan, ...]:
    """Divide each device's budget; the model's own comes first. Where they have room for more
    experts together than there are, or than vram_slots allows, each gets its share.

    Raises BudgetError with the arithmetic if it cannot work.
    """
    fewest = wishes[0].fewest.slots
    needed = sum(n for n, _ in fewest)
    if vram_slots is not None and vram_slots < needed:
        raise BudgetError(
            f"vram_slots: got {vram_slots}, expected at least {needed}: one token's experts of one "
            f"layer"
        )
    plans = [_plan(wish, num_spare) for wish in wishes]
    _refuse_too_small(plans, wishes)
    everything = sum(c.num_experts * c.slot_bytes for _, c in fewest)
    rooms = zip(*(plan.slots_per_class for plan in plans), strict=True)
    shares = map(_share, divide(everything, fewest, vram_slots), rooms)
    slots = zip(*shares, strict=True)
    return tuple(replace(p, slots_per_class=mine) for p, mine in zip(plans, slots, strict=True))


def _plan(wish: Wish, num_spare: int) -> DevicePlan:
    """With all the slots that the budget has room for."""
    facts, needs, fewest = wish.facts, wish.needs, wish.fewest
    classes = [c for _, c in fewest.slots]
    beside = facts.runtime_bytes + sum(num_spare * c.slot_bytes for c in classes)
    least = fewest.beside.total + beside + sum(n * c.slot_bytes for n, c in fewest.slots)
    return DevicePlan(
        name=facts.name,
        budget_bytes=wish.budget_bytes,
        dense_bytes=needs.dense_bytes,
        kv_bytes=needs.kv_bytes,
        workspace_bytes=needs.workspace_bytes,
        runtime_bytes=facts.runtime_bytes,
        slots_per_class=divide(wish.budget_bytes - needs.total - beside, fewest.slots, None),
        slot_bytes=tuple(c.slot_bytes for c in classes),
        num_spare=num_spare,
        experts_total=sum(c.num_experts for c in classes),
        smallest_budget_bytes=-(-least // 1024**2) * 1024**2,
    )


def _share(total: int, rooms: Sequence[int]) -> Sequence[int]:
    """In proportion to rooms; none gets more than its room."""
    if total >= sum(rooms):
        return rooms
    ends = [total * room // sum(rooms) for room in itertools.accumulate(rooms)]
    return [end - start for start, end in itertools.pairwise([0, *ends])]


def _refuse_too_small(plans: Sequence[DevicePlan], wishes: Sequence[Wish]) -> None:
    """Of several plans the arithmetic of all, up to the first one that cannot work."""
    for number, (plan, wish) in enumerate(zip(plans, wishes, strict=True)):
        needed = [n for n, _ in wish.fewest.slots]
        if all(map(operator.ge, plan.slots_per_class, needed)):
            continue
        why = _WHY_OTHERS if number else _WHY_FIRST
        arithmetic = "\n".join(each.arithmetic() for each in plans[: number + 1])
        raise BudgetError(
            f"the model will not fit into vram={format_bytes(plan.budget_bytes)} of {plan.name}:\n"
            f"{arithmetic}\n"
            f"{why}; the smallest budget that works is {format_bytes(plan.smallest_budget_bytes)}"
        )
