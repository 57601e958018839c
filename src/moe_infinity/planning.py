"""Will it fit, and how fast: the arithmetic of a memory budget, from headers and config alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from moe_infinity.cache.early_reads import NUM_EARLY
from moe_infinity.config import (
    MAX_DEFAULT_CONTEXT,
    EngineConfig,
    format_bytes,
)
from moe_infinity.device_plan import (
    NUM_SPARE,
    DeviceFacts,
    Fewest,
    Wish,
    device_budget,
    plan_devices,
)
from moe_infinity.errors import BudgetError
from moe_infinity.machine import available_bytes, resident_bytes
from moe_infinity.model.config_values import first_number
from moe_infinity.model.dense_sizes import dense_bytes, embedding_bytes
from moe_infinity.model.kv_shape import KvShape
from moe_infinity.model.loading import Anatomy
from moe_infinity.model.looked_up import is_only_looked_up
from moe_infinity.needs import Needs
from moe_infinity.plan import Plan
from moe_infinity.size_classes import SizeClass, divide, size_classes, smallest_cache
from moe_infinity.types import ExpertSpec

# With "auto" the system keeps this much, or a tenth of what is available, whichever is more.
_AUTO_RESERVE_BYTES = 1024**3
_AUTO_RESERVE_SHARE = 0.1
# Rows of an embedding are read from disk, token by token, if that leaves so much more to experts.
_WORTH_LOOKING_UP_BYTES = 16 * 1024**2
_KV_SHARE = 0.25
_SHORTEST_CONTEXT = 512
_FEWEST_TO_SPARE = 64  # slots, from which on some may be spare
# Encoder-decoder models with relative positions name no limit; this is what T5's were trained with.
_ENCODER_CONTEXT = 512
# `plan` and the run it is asked for are two processes, not resident with the same bytes: measured
# 0.4 MB apart. The smallest budget that is printed has to work in both.
_BUDGET_SLACK_BYTES = 8 * 1024**2


def make_plan(anatomy: Anatomy, config: EngineConfig, *facts: DeviceFacts) -> Plan:
    """Divide the budget, and those of devices if there are any, the model's own first. Raises
    BudgetError with the arithmetic if it cannot work."""
    budget = config.ram_bytes or _auto_budget()
    classes = size_classes(anatomy)
    smallest = smallest_cache(anatomy, classes[0])
    needs = Needs(anatomy, config, facts)
    plan = _divide(anatomy, config, budget, needs, facts, classes)
    saved = 0 if facts or config.ram_slots is not None else _saved_by_looking_up(anatomy)
    if saved:
        less = needs.looking_up(saved)
        with_less = _divide(anatomy, config, budget, less, facts, classes)
        if plan.num_slots == plan.experts_total:
            plan = replace(plan, smallest_budget_bytes=with_less.smallest_budget_bytes)
        else:
            plan, needs = with_less, less
    _refuse_too_small(plan, smallest, config, needs)
    return plan


def _saved_by_looking_up(anatomy: Anatomy) -> int:
    """Bytes that an embedding on disk leaves to experts; 0 where it had better be in memory."""
    if anatomy.looked_up is None:
        return 0
    saved = anatomy.looked_up.saved_bytes(anatomy.dtype)
    is_worth_it = saved >= _WORTH_LOOKING_UP_BYTES
    return saved if is_worth_it and is_only_looked_up(anatomy.meta, anatomy.looked_up) else 0


def _divide(
    anatomy: Anatomy,
    config: EngineConfig,
    budget: int,
    needs: Needs,
    facts: Sequence[DeviceFacts],
    sizes: tuple[list[SizeClass], tuple[int, ...]],
) -> Plan:
    device_bytes = [*map(device_budget, facts, config.vram_bytes)]
    classes, class_of_layer = sizes
    smallest = smallest_cache(anatomy, classes)
    cache_bytes = sum(n * c.slot_bytes for n, c in smallest)
    contexts = _contexts(anatomy, config, needs, (device_bytes or [budget])[0], classes)
    context, shortest = contexts
    room = budget - needs.total(context)
    slots = divide(room, smallest, config.ram_slots)
    fits = bool(facts) or sum(slots) >= anatomy.shape.num_total
    num_early = 0 if fits else _num_early(room, smallest, config)
    slots = divide(room - num_early * classes[0].slot_bytes, smallest, config.ram_slots)
    num_spare = 0 if sum(slots) >= anatomy.shape.num_total else NUM_SPARE
    wishes = _wishes(needs, contexts, list(zip(facts, device_bytes, strict=True)), smallest)
    devices = plan_devices(wishes, config.vram_slots, num_spare) if wishes else ()
    return Plan(
        budget_bytes=budget,
        dense_bytes=needs.dense_bytes,
        looked_up_bytes=needs.looked_up_bytes,
        dense_read_bytes=dense_bytes(anatomy) - embedding_bytes(anatomy),
        kv_bytes=needs.kv_bytes(context),
        workspace_bytes=needs.workspace_bytes(context),
        kept_bytes=needs.kept_bytes(context),
        staging_bytes=needs.staging_bytes(context),
        runtime_bytes=needs.runtime_bytes,
        slots_per_class=slots,
        num_early=num_early,
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


def _num_early(room: int, smallest: list[tuple[int, SizeClass]], config: EngineConfig) -> int:
    """Slots that are kept beside those of the directory to read into early: where all are of one
    size, and there is room for so many that two more or less make no difference."""
    is_by_kernel = config.num_read_threads is None
    slots = divide(room, smallest, None)
    is_worth_it = len(slots) == 1 and slots[0] >= _FEWEST_TO_SPARE
    return NUM_EARLY if is_by_kernel and is_worth_it else 0


def _wishes(
    needs: Needs,
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
    needs: Needs,
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
    plan: Plan, smallest: list[tuple[int, SizeClass]], config: EngineConfig, needs: Needs
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
            f"{_what_is_needed(smallest) if slots < needed else 'opening it takes more'}"
            f"{', and dense weights pass through RAM' if plan.device else ''}; the "
            f"smallest budget that works is {format_bytes(plan.smallest_budget_bytes)}"
            + ("" if config.max_context is None else "; a smaller max_context needs less")
        )


def _what_is_needed(smallest: list[tuple[int, SizeClass]]) -> str:
    sizes = "" if len(smallest) == 1 else f", in each of {len(smallest)} sizes of experts"
    slots = sum(needed for needed, _ in smallest)
    return f"at least {slots} expert slots are needed (one token's experts of one layer{sizes})"


def _smallest(needs: Needs, context: int, cache_bytes: int) -> int:
    return _round_up(max(needs.total(context) + cache_bytes, needs.at_opening()))


def _round_up(budget: int) -> int:
    """Whole MiB, so that what is printed is what is meant."""
    return -(-(budget + _BUDGET_SLACK_BYTES) // 1024**2) * 1024**2


def _auto_budget() -> int:
    """What the machine can spare, this process's present size included."""
    available = available_bytes()
    reserve = max(_AUTO_RESERVE_BYTES, int(available * _AUTO_RESERVE_SHARE))
    return max(available - reserve, available // 2) + resident_bytes()


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
