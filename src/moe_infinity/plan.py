"""A plan: where every byte of the memory budget goes, and what it has room for."""

from __future__ import annotations

from dataclasses import dataclass

from moe_infinity.config import format_bytes
from moe_infinity.device_plan import DevicePlan
from moe_infinity.errors import PlanExceededError
from moe_infinity.product_speed import BEYOND_CACHES_BYTES


@dataclass(frozen=True)
class Plan:
    """Where every byte of the budget goes. All sizes in bytes."""

    budget_bytes: int
    dense_bytes: int
    dense_read_bytes: int  # of them, what one token reads: a row of the embedding, not all
    kv_bytes: int
    workspace_bytes: int
    kept_bytes: int  # freed by passes, and kept by the allocator
    staging_bytes: int
    runtime_bytes: int
    slots_per_class: tuple[int, ...]
    slot_bytes: tuple[int, ...]
    class_of_layer: tuple[int, ...]
    experts_total: int
    expert_bytes_total: int
    bytes_per_token: int  # expert weights one token uses in one pass
    read_bytes_per_token: int  # what reading all of them moves, alignment included
    working_set: int  # experts one token uses in one pass
    max_context: int
    max_batch: int
    smallest_budget_bytes: int
    num_early: int = 0  # slots of RAM beside those, into which compiled code reads early
    looked_up_bytes: int = 0  # of the embedding, left on disk
    device: DevicePlan | None = None  # where dense weights and KV cache are, if not in RAM
    others: tuple[DevicePlan, ...] = ()  # devices beside that one, with experts only

    @property
    def num_slots(self) -> int:
        return sum(self.slots_per_class)

    @property
    def devices(self) -> tuple[DevicePlan, ...]:
        return () if self.device is None else (self.device, *self.others)

    @property
    def top_slots(self) -> tuple[int, ...]:
        """By class, of the tier that is computed from: all devices', or else RAM's."""
        each = [device.slots_per_class for device in self.devices] or [self.slots_per_class]
        return tuple(map(sum, zip(*each, strict=True)))

    @property
    def cache_bytes(self) -> int:
        sizes = zip(self.slots_per_class, self.slot_bytes, strict=True)
        return sum((n + self.num_early) * size for n, size in sizes)

    @property
    def share_resident(self) -> float:
        return self.num_slots / self.experts_total

    @property
    def holds_working_set(self) -> bool:
        return self.num_slots >= self.working_set

    @property
    def used_bytes(self) -> int:
        return self.cache_bytes + self.fixed_bytes

    @property
    def looks_up(self) -> bool:
        """Whether the embedding stays on disk, and its rows are read as tokens want them."""
        return self.looked_up_bytes > 0

    @property
    def fixed_bytes(self) -> int:
        """Of RAM, beside expert slots."""
        beside = self.staging_bytes + self.runtime_bytes
        if self.device is not None:
            return beside
        computing = self.workspace_bytes + self.kept_bytes
        return self.dense_bytes + self.kv_bytes + computing + beside

    @property
    def passing_bytes(self) -> int:
        """Of RAM, what is free between two requests: for a pass, or for measuring speeds."""
        passes = 0 if self.device is not None else self.workspace_bytes + self.kept_bytes
        return max(passes, BEYOND_CACHES_BYTES)

    def require(self, rows: int, length: int, what: str) -> None:
        """Raise PlanExceededError for more rows or a longer context than there is memory for."""
        if rows > self.max_batch:
            raise PlanExceededError(
                f"batch: got {rows} rows, expected at most the planned {self.max_batch}; open the "
                f"model with max_batch={rows}"
            )
        if length > self.max_context:
            raise PlanExceededError(
                f"context: got {length} tokens ({what}), expected at most the planned "
                f"{self.max_context}; open the model with max_context={length} "
                f"(--max-context), or ask for fewer tokens"
            )

    def require_room(self, needed_bytes: int, what: str) -> None:
        """Raise PlanExceededError if one pass needs more than its workspace and what is left."""
        where = self.device or self  # of the two memories, the one that is computed in
        room = where.workspace_bytes + max(0, where.budget_bytes - where.used_bytes)
        if needed_bytes > room:
            raise PlanExceededError(
                f"{what}: one pass needs {format_bytes(needed_bytes)} for activations and logits, "
                f"expected at most {format_bytes(room)}; pass logits_to_keep=1, fewer tokens, or "
                f"open with more ram"
            )

    def arithmetic(self) -> str:
        """One line per term, for people."""
        on_disk = f" ({format_bytes(self.looked_up_bytes)} looked up)" if self.looks_up else ""
        spare = f" and {self.num_early} spare" if self.num_early else ""
        dense = [
            (f"dense weights{on_disk}", self.dense_bytes),
            (f"KV cache ({self.max_batch} x {self.max_context} tokens)", self.kv_bytes),
            ("activations and logits", self.workspace_bytes),
            ("what the allocator keeps of them", self.kept_bytes),
        ]
        rows = [
            *(dense if self.device is None else []),
            ("prediction, staging and measuring", self.staging_bytes),
            ("runtime", self.runtime_bytes),
            (f"expert slots ({self.num_slots} of {self.experts_total}{spare})", self.cache_bytes),
        ]
        lines = [f"  {name:<40} {format_bytes(size):>12}" for name, size in rows]
        lines.append(
            f"  {'sum, of ' + format_bytes(self.budget_bytes):<40} "
            f"{format_bytes(self.used_bytes):>12}"
        )
        return "\n".join([*lines, *(device.arithmetic() for device in self.devices)])
