"""Puts an opened checkpoint, a plan and the chosen policy together into a running cache."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, cast

import torch

from moe_infinity.cache.device_layout import device_layouts
from moe_infinity.cache.device_memory import DeviceMemory
from moe_infinity.cache.device_pool import DevicePool
from moe_infinity.cache.device_slots import DeviceSlots
from moe_infinity.cache.driven import DrivenHierarchy
from moe_infinity.cache.host_tier import HostTier
from moe_infinity.cache.pinned import PinnedArena
from moe_infinity.cache.queued import DEPTH, QueuedTransfers
from moe_infinity.cache.ram import RamHierarchy
from moe_infinity.cache.slots import SlotArena
from moe_infinity.cache.transfer import CHUNK_BYTES, READ_THREADS, TransferEngine
from moe_infinity.cache.vram import VramHierarchy
from moe_infinity.checkpoint.base import Checkpoint, ExpertStore
from moe_infinity.checkpoint.gguf import GgufCheckpoint
from moe_infinity.checkpoint.hub_names import is_gguf
from moe_infinity.checkpoint.kernel_reads import KernelReads
from moe_infinity.checkpoint.packed import PackedCheckpoint, is_packed
from moe_infinity.checkpoint.safetensors import SafetensorsCheckpoint
from moe_infinity.config import EngineConfig
from moe_infinity.device_plan import DeviceFacts
from moe_infinity.devices.base import Device
from moe_infinity.devices.choice import open_devices
from moe_infinity.errors import ConfigError
from moe_infinity.machine import Bandwidths
from moe_infinity.model.loading import Anatomy, read_config
from moe_infinity.model.routers import has_routers
from moe_infinity.plan import Plan
from moe_infinity.planning import make_plan
from moe_infinity.policies import find_policy
from moe_infinity.policies._guarded import GuardedPolicy
from moe_infinity.policies.base import CachePolicy
from moe_infinity.predictors import AUTO_PREFETCH, find_predictor
from moe_infinity.predictors._guarded import GuardedPredictor
from moe_infinity.predictors.base import ExpertPredictor
from moe_infinity.product_speed import measure_matvec_gbps
from moe_infinity.registry import make
from moe_infinity.reporting import DeviceSpeeds
from moe_infinity.residency.directory import Directory
from moe_infinity.residency.meters import PaysMeter
from moe_infinity.residency.miss_split import MissMode, MissSplit
from moe_infinity.residency.planner import PrefetchPlanner
from moe_infinity.residency.residency import Residency
from moe_infinity.residency.room import FEWEST_SLOTS
from moe_infinity.residency.runner import EventRunner
from moe_infinity.residency.shelf import Shelf
from moe_infinity.stats import Counters

_log = logging.getLogger(__name__)
_TRIAL_PASSES = 8  # of looking ahead, and of doing without
_SETTLING_TRIALS = 4  # that nothing is concluded from, all without


def open_checkpoint(path: Path) -> Checkpoint:
    """The checkpoint in a folder or GGUF file. Its config is read first: it explains more than
    missing files."""
    if is_gguf(path):
        return GgufCheckpoint(path)
    read_config(path)
    return PackedCheckpoint(path) if is_packed(path) else SafetensorsCheckpoint(path)


def plan_here(anatomy: Anatomy, config: EngineConfig) -> tuple[tuple[Device, ...], Plan]:
    """The devices that were asked for, opened, and the plan for them and this machine's RAM.

    Raises ConfigError or BudgetError.
    """
    devices = open_devices(config.devices, config.needs_device)
    for device in devices:
        if not device.has_bf16 and anatomy.dtype is torch.bfloat16:
            raise ConfigError(
                f"dtype: got bfloat16, which {device.name} does not compute in (before Ampere), "
                f"expected another; choose dtype float16 or float32"
            )
    plan = make_plan(anatomy, config, *map(facts_of, devices))
    for device, top in zip(devices, plan.devices, strict=True):
        device.limit(top.budget_bytes)
    return devices, plan


def facts_of(device: Device) -> DeviceFacts:
    """What planning needs to know of it."""
    sizes = (device.free_bytes(), device.total_bytes())
    return DeviceFacts(device.name, *sizes, device.runtime_bytes, device.host_bytes)


def find_choices(config: EngineConfig) -> tuple[type[CachePolicy], type[ExpertPredictor]]:
    """The policy and predictor that were named; of "auto" the one it tries first.

    Raises UnknownNameError or ConfigError.
    """
    name = AUTO_PREFETCH if config.prefetch == "auto" else config.prefetch
    policy, predictor = find_policy(config.policy), find_predictor(name)
    _refuse_oracles(predictor)
    return policy, predictor


def choose_prefetch(config: EngineConfig, anatomy: Anatomy, plan: Plan) -> str:
    """The predictor's name. "auto" loads nothing ahead where all experts fit, where there are too
    few slots to spare any, or where the model has no routers that can be asked."""
    if config.prefetch != "auto":
        return config.prefetch
    if sum(plan.top_slots) >= anatomy.shape.num_total or max(plan.top_slots) < FEWEST_SLOTS:
        return "none"
    names = [module.name for module in anatomy.experts]
    return (
        AUTO_PREFETCH
        if has_routers(anatomy.meta, names, anatomy.shape.experts_per_layer)
        else "none"
    )


def reading_of(config: EngineConfig, speeds: Bandwidths | None) -> tuple[int, int]:
    """Reader threads and bytes of one read: as asked for, as measured, or what suits most disks."""
    num_threads, chunk_bytes = READ_THREADS, CHUNK_BYTES
    if speeds is not None:
        num_threads, chunk_bytes = speeds.read_threads, speeds.read_chunk_bytes
    return config.num_read_threads or num_threads, chunk_bytes


class Chosen(NamedTuple):
    """What was decided beside the plan. speeds: of the machine, as far as they are known."""

    prefetch: str
    speeds: Bandwidths | None
    devices: tuple[Device, ...]


def build_hierarchy(
    checkpoint: Checkpoint,
    anatomy: Anatomy,
    plan: Plan,
    config: EngineConfig,
    chosen: Chosen,
) -> DrivenHierarchy:
    """The cache of ``plan`` over the checkpoint's experts, with its reader threads started."""
    store = checkpoint.expert_store(anatomy.specs)
    runner = _runner(anatomy, plan, config, chosen)
    predictor = find_predictor(chosen.prefetch)
    tries = config.prefetch == "auto" and predictor.foresight is not None
    trial_events = _TRIAL_PASSES * anatomy.shape.num_layers
    pays = PaysMeter(trial_events, settling=_SETTLING_TRIALS) if tries else None
    with contextlib.ExitStack() as undo:
        slots = tuple(count + plan.num_early for count in plan.slots_per_class)
        sizes = (slots, plan.slot_bytes)
        arena = PinnedArena(*sizes, chosen.devices[0]) if chosen.devices else SlotArena(*sizes)
        undo.callback(arena.close)
        engine = _transfers(store, config, chosen.speeds)
        undo.callback(engine.close)
        hierarchy: DrivenHierarchy
        if not isinstance(arena, PinnedArena):
            hierarchy = RamHierarchy(store, runner, arena, engine, pays, plan.num_early)
        else:
            host = HostTier(_shelf(anatomy, plan, config), arena, engine)
            memory = _device_memory(store, plan, chosen.devices)
            hierarchy = VramHierarchy(store, runner, host, memory, pays)
            if config.miss != "copy":
                hierarchy.share_misses(_split(anatomy, config, chosen))
        undo.pop_all()
    return hierarchy


def _transfers(
    store: ExpertStore, config: EngineConfig, speeds: Bandwidths | None
) -> TransferEngine:
    """By the kernel, where there are such queues and nobody asked for a number of threads."""
    reading, reads = reading_of(config, speeds), None
    if config.num_read_threads is None:
        try:
            reads = KernelReads(DEPTH)
        except OSError as error:
            _log.info("experts are read by threads: %s", error)
    if reads is None:
        return TransferEngine(store, *reading)
    try:
        return QueuedTransfers(store, *reading, reads)
    except BaseException:
        reads.close()
        raise


def speeds_of(devices: Sequence[Device]) -> DeviceSpeeds | None:
    """What a report needs to know of them: what all deliver that work at once."""
    if not devices:
        return None
    memory = [device.memory_gbps() for device in devices]
    of_all = sum(gbps for gbps in memory if gbps is not None)
    return DeviceSpeeds(
        " + ".join(device.name for device in devices),
        sum(device.link_gbps() for device in devices),
        None if None in memory else of_all,
    )


def _device_memory(
    store: ExpertStore, plan: Plan, devices: Sequence[Device]
) -> DeviceMemory | DevicePool:
    layouts, memories = device_layouts(store.specs), []
    for device, top in zip(devices, plan.devices, strict=True):
        slots = DeviceSlots(device, top.slots_per_class, top.slot_bytes, top.num_spare)
        memories.append(DeviceMemory(layouts, slots, device))
    return memories[0] if len(memories) == 1 else DevicePool(memories)


def _runner(anatomy: Anatomy, plan: Plan, config: EngineConfig, chosen: Chosen) -> EventRunner:
    """Decides on the tier that is computed from."""
    predictor = make(find_predictor(chosen.prefetch), anatomy.shape, config.seed)
    directory = Directory(anatomy.shape, plan.top_slots, plan.class_of_layer)
    policy = _policy(anatomy, sum(plan.top_slots), config)
    layer_bytes = [0] * anatomy.shape.num_layers
    for key, spec in anatomy.specs.items():
        layer_bytes[key.layer] = max(layer_bytes[key.layer], spec.read_bytes)
    return EventRunner(
        Residency(directory, policy, Counters(layer_bytes)),
        PrefetchPlanner(GuardedPredictor(predictor), directory),
    )


def _shelf(anatomy: Anatomy, plan: Plan, config: EngineConfig) -> Shelf:
    """Decides on RAM below a device, by the same policy."""
    directory = Directory(anatomy.shape, plan.slots_per_class, plan.class_of_layer)
    return Shelf(directory, _policy(anatomy, plan.num_slots, config))


def _split(anatomy: Anatomy, config: EngineConfig, chosen: Chosen) -> MissSplit:
    """By the link's speed and what a product of this model's experts reaches on the processor."""
    device_speeds = speeds_of(chosen.devices)
    assert device_speeds is not None, "nothing is beside the processor"
    expert_bytes = next(iter(anatomy.specs.values())).weight_bytes
    speeds = chosen.speeds
    cpu_gbps = speeds.matvec_gbps if speeds else measure_matvec_gbps(expert_bytes)
    mode = cast(MissMode, config.miss)
    return MissSplit(mode, device_speeds.link_gbps, cpu_gbps, anatomy.shape.num_layers)


def _policy(anatomy: Anatomy, num_slots: int, config: EngineConfig) -> CachePolicy:
    return GuardedPolicy(make(find_policy(config.policy), anatomy.shape, num_slots, config.seed))


def _refuse_oracles(predictor: type[ExpertPredictor]) -> None:
    """Raise ConfigError for a predictor that only a recorded trace can serve."""
    if predictor.needs_future:
        raise ConfigError(
            f"prefetch: {predictor.__module__} knows the future, expected a predictor that does "
            f"not; it is for moe-infinity simulate"
        )
