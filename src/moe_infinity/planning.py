"""Will it fit, and how fast: the arithmetic of a memory budget, from headers and config alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from moe_infinity.config import (
    MAX_DEFAULT_CONTEXT,
    EngineConfig,
    format_bytes,
)
from moe_infinity.errors import BudgetError, PlanExceededError
from moe_infinity.machine import available_bytes, resident_bytes
from moe_infinity.model.config_values import first_number
from moe_infinity.model.kv_cache import KvShape
from moe_infinity.model.loading import Anatomy
from moe_infinity.model.workspace import workspace_bytes
from moe_infinity.predictors import AUTO_PREFETCH, find_predictor
from moe_infinity.size_classes import SizeClass, divide, size_classes, smallest_cache
from moe_infinity.types import ExpertSpec

# Beyond what is resident when planning starts: thread stacks, the allocator's and oneDNN's own
# buffers, Python objects of a long run. Measured: 60-110 MB on models of 0.03 to 13 GB.
RUNTIME_MARGIN_BYTES = 128 * 1024**2
# With "auto" the system keeps this much, or a tenth of what is available, whichever is more.
_AUTO_RESERVE_BYTES = 1024**3
_AUTO_RESERVE_SHARE = 0.1
_KV_SHARE = 0.25
_SHORTEST_CONTEXT = 512
# Encoder-decoder models with relative positions name no limit; this is what T5's were trained with.
_ENCODER_CONTEXT = 512
# `plan` and the run it is asked for are two processes, not resident with the same bytes: measured
# 0.4 MB apart. The smallest budget that is printed has to work in both.
_BUDGET_SLACK_BYTES = 8 * 1024**2
_TRANSFER_BYTES = 32 * 1024**2  # scratch of the readers of dense tensors


@dataclass(frozen=True)
class Plan:
    """Where every byte of the budget goes. All sizes in bytes."""

    budget_bytes: int
    dense_bytes: int
    dense_read_bytes: int  # of them, what one token reads: a row of the embedding, not all
    kv_bytes: int
    workspace_bytes: int
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

    @property
    def num_slots(self) -> int:
        return sum(self.slots_per_class)

    @property
    def cache_bytes(self) -> int:
        return sum(n * b for n, b in zip(self.slots_per_class, self.slot_bytes, strict=True))

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
    def fixed_bytes(self) -> int:
        return (
            self.dense_bytes
            + self.kv_bytes
            + self.workspace_bytes
            + self.staging_bytes
            + self.runtime_bytes
        )

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
        room = self.workspace_bytes + max(0, self.budget_bytes - self.used_bytes)
        if needed_bytes > room:
            raise PlanExceededError(
                f"{what}: one pass needs {format_bytes(needed_bytes)} for activations and logits, "
                f"expected at most {format_bytes(room)}; pass logits_to_keep=1, fewer tokens, or "
                f"open with more ram"
            )

    def arithmetic(self) -> str:
        """One line per term, for people."""
        rows = [
            ("dense weights", self.dense_bytes),
            (f"KV cache ({self.max_batch} x {self.max_context} tokens)", self.kv_bytes),
            ("activations and logits", self.workspace_bytes),
            ("transfer staging and prediction", self.staging_bytes),
            ("runtime", self.runtime_bytes),
            (f"expert slots ({self.num_slots} of {self.experts_total})", self.cache_bytes),
        ]
        lines = [f"  {name:<40} {format_bytes(size):>12}" for name, size in rows]
        lines.append(
            f"  {'sum, of ' + format_bytes(self.budget_bytes):<40} "
            f"{format_bytes(self.used_bytes):>12}"
        )
        return "\n".join(lines)


class _Needs:
    """What a model takes beside its expert slots, as a function of the context."""

    def __init__(self, anatomy: Anatomy, config: EngineConfig) -> None:
        self.staging_bytes = _TRANSFER_BYTES + _prediction_bytes(anatomy, config)
        self.dense_bytes = _dense_bytes(anatomy)
        self.runtime_bytes = resident_bytes() + RUNTIME_MARGIN_BYTES
        self.kv = KvShape.of(anatomy.meta)
        self._anatomy = anatomy
        self._rows = config.max_batch

    def kv_bytes(self, context: int) -> int:
        return self.kv.num_bytes(context, self._anatomy.dtype.itemsize) * self._rows

    def workspace_bytes(self, context: int) -> int:
        return workspace_bytes(self._anatomy.meta, context, self._rows, self._anatomy.dtype)

    def total(self, context: int) -> int:
        growing = self.kv_bytes(context) + self.workspace_bytes(context)
        return self.dense_bytes + growing + self.staging_bytes + self.runtime_bytes


def make_plan(anatomy: Anatomy, config: EngineConfig) -> Plan:
    """Divide the budget. Raises BudgetError with the arithmetic if it cannot work."""
    budget = config.ram_bytes or _auto_budget()
    needs = _Needs(anatomy, config)
    classes, class_of_layer = size_classes(anatomy)
    smallest = smallest_cache(anatomy, classes)
    cache_bytes = sum(n * c.slot_bytes for n, c in smallest)
    context = _context(anatomy, config, needs.kv, budget)
    shortest = config.max_context or min(context, _SHORTEST_CONTEXT)
    while context > shortest and needs.total(context) + cache_bytes > budget:
        context = max(shortest, context // 2)
    plan = Plan(
        budget_bytes=budget,
        dense_bytes=needs.dense_bytes,
        dense_read_bytes=needs.dense_bytes - _looked_up_bytes(anatomy),
        kv_bytes=needs.kv_bytes(context),
        workspace_bytes=needs.workspace_bytes(context),
        staging_bytes=needs.staging_bytes,
        runtime_bytes=needs.runtime_bytes,
        slots_per_class=divide(budget - needs.total(context), smallest, config.ram_slots),
        slot_bytes=tuple(c.slot_bytes for c in classes),
        class_of_layer=class_of_layer,
        experts_total=anatomy.shape.num_total,
        expert_bytes_total=sum(s.weight_bytes for s in anatomy.specs.values()),
        bytes_per_token=_per_token(anatomy, lambda spec: spec.weight_bytes),
        read_bytes_per_token=_per_token(anatomy, lambda spec: spec.read_bytes),
        working_set=anatomy.shape.working_set,
        max_context=context,
        max_batch=config.max_batch,
        smallest_budget_bytes=_round_up(needs.total(shortest) + cache_bytes),
    )
    _refuse_too_small(plan, smallest, config)
    return plan


def _refuse_too_small(
    plan: Plan, smallest: list[tuple[int, SizeClass]], config: EngineConfig
) -> None:
    for slots, (needed, _) in zip(plan.slots_per_class, smallest, strict=True):
        if slots >= needed:
            continue
        if config.ram_slots is not None and config.ram_slots < sum(n for n, _ in smallest):
            raise BudgetError(
                f"ram_slots: got {config.ram_slots}, expected at least "
                f"{sum(n for n, _ in smallest)}: one token's experts of one layer"
            )
        raise BudgetError(
            f"the model will not fit into ram={format_bytes(plan.budget_bytes)}:\n"
            f"{plan.arithmetic()}\n"
            f"at least {needed} expert slots are needed (one token's experts of one layer); the "
            f"smallest budget that works is {format_bytes(plan.smallest_budget_bytes)}"
            + ("" if config.max_context is None else "; a smaller max_context needs less")
        )


def _round_up(budget: int) -> int:
    """Whole MiB, so that what is printed is what is meant."""
    return -(-(budget + _BUDGET_SLACK_BYTES) // 1024**2) * 1024**2


def _auto_budget() -> int:
    """What the machine can spare, this process's present size included."""
    available = available_bytes()
    reserve = max(_AUTO_RESERVE_BYTES, int(available * _AUTO_RESERVE_SHARE))
    return max(available - reserve, available // 2) + resident_bytes()


def _dense_bytes(anatomy: Anatomy) -> int:
    """Dense weights in the computation's dtype or as they were packed, tied ones once."""
    owned = {id(p) for module in anatomy.experts for p in module.module.parameters(recurse=False)}
    plain = (
        p.numel() * anatomy.dtype.itemsize
        for name, p in anatomy.meta.named_parameters()
        if id(p) not in owned and name not in anatomy.coded
    )
    total: int = sum(plain) + sum(linear.num_bytes for linear in anatomy.coded.values())
    return total


def _prediction_bytes(anatomy: Anatomy, config: EngineConfig) -> int:
    """What the predictor learns and is shown; "auto" may turn out to need less."""
    name = AUTO_PREFETCH if config.prefetch == "auto" else config.prefetch
    hidden_size = first_number(anatomy.config.get_text_config(), "hidden_size", "d_model") or 0
    return find_predictor(name).memory.num_bytes(anatomy.shape, hidden_size)


def _looked_up_bytes(anatomy: Anatomy) -> int:
    """The input embedding, unless it is the output's matrix as well. A packed copy may be that."""
    meta: Any = anatomy.meta
    table, head = meta.get_input_embeddings(), meta.get_output_embeddings()
    weight = getattr(table, "weight", None)
    has_copy = bool(anatomy.coded.keys() - dict(meta.named_parameters()).keys())
    if weight is None or (getattr(head, "weight", None) is weight and not has_copy):
        return 0
    return int(weight.numel() * anatomy.dtype.itemsize)


def _per_token(anatomy: Anatomy, size: Callable[[ExpertSpec], int]) -> int:
    """Sum over layers of the largest expert's bytes, times top-k."""
    largest = [0] * anatomy.shape.num_layers
    for key, spec in anatomy.specs.items():
        largest[key.layer] = max(largest[key.layer], size(spec))
    return sum(largest) * anatomy.shape.top_k


def _context(anatomy: Anatomy, config: EngineConfig, kv: KvShape, budget: int) -> int:
    if config.max_context is not None:
        return config.max_context
    limit = first_number(anatomy.config.get_text_config(), "max_position_embeddings", "n_positions")
    unlimited = _ENCODER_CONTEXT if anatomy.config.is_encoder_decoder else MAX_DEFAULT_CONTEXT
    context = min(limit or unlimited, MAX_DEFAULT_CONTEXT)
    per_token = kv.bytes_per_token(anatomy.dtype.itemsize) * config.max_batch
    affordable = int(budget * _KV_SHARE) // per_token if per_token else context
    return max(min(context, affordable), min(context, _SHORTEST_CONTEXT))
