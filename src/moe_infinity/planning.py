"""Will it fit, and how fast: the arithmetic of a memory budget, from headers and config alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from moe_infinity.config import (
    MAX_DEFAULT_CONTEXT,
    EngineConfig,
    format_bytes,
)
from moe_infinity.device_plan import (
    NUM_SPARE,
    DeviceFacts,
    DeviceNeeds,
    Fewest,
    Wish,
    device_budget,
    plan_devices,
)
from moe_infinity.errors import BudgetError
from moe_infinity.heap import can_trim
from moe_infinity.machine import available_bytes, resident_bytes
from moe_infinity.mapped_code import code_bytes
from moe_infinity.model.config_values import first_number
from moe_infinity.model.kv_shape import KvShape
from moe_infinity.model.loading import Anatomy
from moe_infinity.model.workspace import visit_bytes, workspace_bytes
from moe_infinity.plan import Plan
from moe_infinity.predictors import AUTO_PREFETCH, find_predictor
from moe_infinity.product_speed import BEYOND_CACHES_BYTES
from moe_infinity.size_classes import SizeClass, divide, size_classes, smallest_cache
from moe_infinity.types import ExpertSpec

# Beyond what is resident when planning starts: what the library imports later, thread stacks, the
# allocator's and oneDNN's own buffers, Python objects of a long run. Measured: 26 MiB with
# widened16 in 4 bit within 1.1 GB. More where the allocator cannot be asked to give back what it
# keeps (heap.py).
RUNTIME_MARGIN_BYTES = (48 if can_trim() else 112) * 1024**2
# Of libraries' code, what a run uses: 36 to 38 MiB measured with widened16 in 4 bit, prompts and
# sampling included. mapped_code.py lets go of the rest; a GPU's driver has code of its own.
CODE_BYTES = 40 * 1024**2
# A tokenizer is loaded when it is first asked for, a server's grammars over it later still:
# measured for a BPE of 151,000 tokens, 331 and 100 MB. Plans are made before its file is there.
_TOKENIZER_BYTES_PER_ID = 3000
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
# Between two looks of heap.py, a layer apart, the allocator keeps so much of a pass's workspace
# that is in use no more. Measured: 80 MiB of 213 (widened16, 2,000 tokens, AVX2). No tensor of more
# than 32 MiB is kept, which large workspaces mostly are of.
_KEPT_SHARE, _MOST_KEPT_BYTES = 0.4, 256 * 1024**2
# Scratch of the threads that read dense tensors while a model opens. What the allocator keeps of
# it at the top of a thread's own arena cannot be given back.
_TRANSFER_BYTES = 32 * 1024**2


class _Needs:
    """What a model takes beside its expert slots, as a function of the context."""

    def __init__(
        self, anatomy: Anatomy, config: EngineConfig, facts: Sequence[DeviceFacts]
    ) -> None:
        self._facts = facts
        self._prediction_bytes = _prediction_bytes(anatomy, config)
        self.dense_bytes = _dense_bytes(anatomy)
        vocab_size = first_number(anatomy.config.get_text_config(), "vocab_size") or 0
        self.runtime_bytes = resident_bytes() + CODE_BYTES + RUNTIME_MARGIN_BYTES
        self.runtime_bytes -= 0 if facts else code_bytes()
        self.runtime_bytes += vocab_size * _TOKENIZER_BYTES_PER_ID
        self.runtime_bytes += sum(each.host_bytes for each in facts)
        self.kv = KvShape.of(anatomy.meta)
        self._anatomy = anatomy
        self._rows = config.max_batch

    def kv_bytes(self, context: int) -> int:
        return self.kv.num_bytes(context, self._anatomy.dtype.itemsize) * self._rows

    def workspace_bytes(self, context: int) -> int:
        return workspace_bytes(self._anatomy.meta, context, self._rows, self._anatomy.dtype)

    def kept_bytes(self, context: int) -> int:
        if self._facts:
            return 0
        return min(_MOST_KEPT_BYTES, int(self.workspace_bytes(context) * _KEPT_SHARE))

    def staging_bytes(self, context: int) -> int:
        """For prediction, for what is read through, and beyond the workspace for measuring."""
        passes = 0 if self._facts else self.workspace_bytes(context)
        # Between requests: so much for the disk's buffers, then for products, then for reading.
        return max(_TRANSFER_BYTES, BEYOND_CACHES_BYTES - passes) + self._prediction_bytes

    def computing(self, context: int) -> DeviceNeeds:
        """What lies where products are computed."""
        growing = (self.kv_bytes(context), self.workspace_bytes(context))
        return DeviceNeeds(self.dense_bytes, *growing)

    def visiting(self, context: int) -> DeviceNeeds:
        """What lies where experts are computed only."""
        anatomy = self._anatomy
        return DeviceNeeds(0, 0, visit_bytes(anatomy.meta, context, self._rows, anatomy.dtype))

    def total(self, context: int) -> int:
        """In RAM."""
        beside = self.staging_bytes(context) + self.runtime_bytes
        if self._facts:
            return beside
        return self.computing(context).total + self.kept_bytes(context) + beside

    @property
    def is_on_device(self) -> bool:
        return bool(self._facts)

    def beside_slots(self, context: int) -> int:
        """In the memory that the context has to fit into."""
        if not self._facts:
            return self.total(context)
        return self.computing(context).total + self._facts[0].runtime_bytes

    def at_opening(self) -> int:
        """In RAM, before slots are used: dense weights pass through it on their way to a device."""
        return self.dense_bytes + _TRANSFER_BYTES + self._prediction_bytes + self.runtime_bytes


def make_plan(anatomy: Anatomy, config: EngineConfig, *facts: DeviceFacts) -> Plan:
    """Divide the budget, and those of devices if there are any, the model's own first. Raises
    BudgetError with the arithmetic if it cannot work."""
    budget = config.ram_bytes or _auto_budget()
    device_bytes = [*map(device_budget, facts, config.vram_bytes)]
    needs = _Needs(anatomy, config, facts)
    classes, class_of_layer = size_classes(anatomy)
    smallest = smallest_cache(anatomy, classes)
    cache_bytes = sum(n * c.slot_bytes for n, c in smallest)
    contexts = _contexts(anatomy, config, needs, (device_bytes or [budget])[0], classes)
    context, shortest = contexts
    slots = divide(budget - needs.total(context), smallest, config.ram_slots)
    num_spare = 0 if sum(slots) >= anatomy.shape.num_total else NUM_SPARE
    wishes = _wishes(needs, contexts, list(zip(facts, device_bytes, strict=True)), smallest)
    devices = plan_devices(wishes, config.vram_slots, num_spare) if wishes else ()
    plan = Plan(
        budget_bytes=budget,
        dense_bytes=needs.dense_bytes,
        dense_read_bytes=needs.dense_bytes - _looked_up_bytes(anatomy),
        kv_bytes=needs.kv_bytes(context),
        workspace_bytes=needs.workspace_bytes(context),
        kept_bytes=needs.kept_bytes(context),
        staging_bytes=needs.staging_bytes(context),
        runtime_bytes=needs.runtime_bytes,
        slots_per_class=slots,
        slot_bytes=tuple(c.slot_bytes for c in classes),
        class_of_layer=class_of_layer,
        experts_total=anatomy.shape.num_total,
        expert_bytes_total=sum(s.weight_bytes for s in anatomy.specs.values()),
        bytes_per_token=_per_token(anatomy, lambda spec: spec.weight_bytes),
        read_bytes_per_token=_per_token(anatomy, lambda spec: spec.read_bytes),
        working_set=anatomy.shape.working_set,
        max_context=context,
        max_batch=config.max_batch,
        smallest_budget_bytes=_smallest(needs, shortest, cache_bytes),
        device=devices[0] if devices else None,
        others=devices[1:],
    )
    _refuse_too_small(plan, smallest, config, needs)
    return plan


def _wishes(
    needs: _Needs,
    contexts: tuple[int, int],
    devices: list[tuple[DeviceFacts, int]],
    smallest: list[tuple[int, SizeClass]],
) -> list[Wish]:
    """Of each device. The model's own has to be able to do without the others' slots."""
    one_each = [(1, size_class) for _, size_class in smallest]
    wishes = []
    for number, (facts, budget_bytes) in enumerate(devices):
        beside, slots = (needs.visiting, one_each) if number else (needs.computing, smallest)
        at_context, at_shortest = map(beside, contexts)
        wishes.append(Wish(facts, budget_bytes, at_context, Fewest(slots, at_shortest)))
    return wishes


def _contexts(
    anatomy: Anatomy,
    config: EngineConfig,
    needs: _Needs,
    budget: int,
    classes: list[SizeClass],
) -> tuple[int, int]:
    """The context to plan for, and the shortest that would do. budget: of the memory it is in,
    with the fewest slots."""
    num_spare = NUM_SPARE if needs.is_on_device else 0
    fewest = smallest_cache(anatomy, classes)
    room = budget - sum((n + num_spare) * c.slot_bytes for n, c in fewest)
    context = _context(anatomy, config, needs.kv, budget)
    shortest = config.max_context or min(context, _SHORTEST_CONTEXT)
    while context > shortest and needs.beside_slots(context) > room:
        context = max(shortest, context // 2)
    return context, shortest


def _refuse_too_small(
    plan: Plan, smallest: list[tuple[int, SizeClass]], config: EngineConfig, needs: _Needs
) -> None:
    can_open = needs.at_opening() <= plan.budget_bytes
    for slots, (needed, _) in zip(plan.slots_per_class, smallest, strict=True):
        if slots >= needed and can_open:
            continue
        if config.ram_slots is not None and config.ram_slots < sum(n for n, _ in smallest):
            raise BudgetError(
                f"ram_slots: got {config.ram_slots}, expected at least "
                f"{sum(n for n, _ in smallest)}: one token's experts of one layer"
            )
        raise BudgetError(
            f"the model will not fit into ram={format_bytes(plan.budget_bytes)}:\n"
            f"{plan.arithmetic()}\n"
            f"at least {needed} expert slots are needed (one token's experts of one layer)"
            f"{', and dense weights pass through RAM' if plan.device else ''}; the "
            f"smallest budget that works is {format_bytes(plan.smallest_budget_bytes)}"
            + ("" if config.max_context is None else "; a smaller max_context needs less")
        )


def _smallest(needs: _Needs, context: int, cache_bytes: int) -> int:
    return _round_up(max(needs.total(context) + cache_bytes, needs.at_opening()))


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
