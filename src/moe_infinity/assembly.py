"""Puts an opened checkpoint, a plan and the chosen policy together into a running cache."""

from __future__ import annotations

import contextlib
from pathlib import Path

from moe_infinity.cache.ram import RamHierarchy
from moe_infinity.cache.slots import SlotArena
from moe_infinity.cache.transfer import CHUNK_BYTES, READ_THREADS, TransferEngine
from moe_infinity.checkpoint.base import Checkpoint
from moe_infinity.checkpoint.gguf import GgufCheckpoint
from moe_infinity.checkpoint.hub_names import is_gguf
from moe_infinity.checkpoint.packed import PackedCheckpoint, is_packed
from moe_infinity.checkpoint.safetensors import SafetensorsCheckpoint
from moe_infinity.config import EngineConfig
from moe_infinity.errors import ConfigError
from moe_infinity.machine import Bandwidths
from moe_infinity.model.loading import Anatomy, read_config
from moe_infinity.model.routers import has_routers
from moe_infinity.model.rules import MissRule
from moe_infinity.planning import Plan
from moe_infinity.policies import find_policy
from moe_infinity.policies._guarded import GuardedPolicy
from moe_infinity.policies.base import CachePolicy
from moe_infinity.predictors import AUTO_PREFETCH, find_predictor
from moe_infinity.predictors._guarded import GuardedPredictor
from moe_infinity.predictors.base import ExpertPredictor
from moe_infinity.registry import make
from moe_infinity.residency.directory import Directory
from moe_infinity.residency.meters import PaysMeter
from moe_infinity.residency.planner import PrefetchPlanner
from moe_infinity.residency.residency import Residency
from moe_infinity.residency.room import FEWEST_SLOTS
from moe_infinity.residency.runner import EventRunner
from moe_infinity.stats import Counters

_TRIAL_PASSES = 8  # of looking ahead, and of doing without


def open_checkpoint(path: Path) -> Checkpoint:
    """The checkpoint in a folder or GGUF file. Its config is read first: it explains more than
    missing files."""
    if is_gguf(path):
        return GgufCheckpoint(path)
    read_config(path)
    return PackedCheckpoint(path) if is_packed(path) else SafetensorsCheckpoint(path)


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
    if plan.num_slots >= anatomy.shape.num_total or max(plan.slots_per_class) < FEWEST_SLOTS:
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


def build_hierarchy(
    checkpoint: Checkpoint,
    anatomy: Anatomy,
    plan: Plan,
    config: EngineConfig,
    prefetch: str,
    miss_rule: MissRule,
    reading: tuple[int, int],
) -> RamHierarchy:
    """The cache of ``plan`` over the checkpoint's experts, with its reader threads started.
    reading: how many they are, and bytes of one read."""
    policy_class, predictor_class = find_policy(config.policy), find_predictor(prefetch)
    policy = GuardedPolicy(make(policy_class, anatomy.shape, plan.num_slots, config.seed))
    predictor = GuardedPredictor(make(predictor_class, anatomy.shape, config.seed))
    directory = Directory(anatomy.shape, plan.slots_per_class, plan.class_of_layer)
    store = checkpoint.expert_store(anatomy.specs)
    layer_bytes = [0] * anatomy.shape.num_layers
    for key, spec in anatomy.specs.items():
        layer_bytes[key.layer] = max(layer_bytes[key.layer], spec.read_bytes)
    runner = EventRunner(
        Residency(directory, policy, Counters(layer_bytes)),
        PrefetchPlanner(predictor, directory),
        miss_rule.load if miss_rule.lossy else None,
    )
    tries = config.prefetch == "auto" and predictor_class.foresight is not None
    pays = PaysMeter(_TRIAL_PASSES * anatomy.shape.num_layers) if tries else None
    with contextlib.ExitStack() as undo:
        arena = SlotArena(plan.slots_per_class, plan.slot_bytes)
        undo.callback(arena.close)
        engine = TransferEngine(store, *reading)
        undo.callback(engine.close)
        hierarchy = RamHierarchy(store, runner, arena, engine, pays)
        undo.pop_all()
    return hierarchy


def _refuse_oracles(predictor: type[ExpertPredictor]) -> None:
    """Raise ConfigError for a predictor that only a recorded trace can serve."""
    if predictor.needs_future:
        raise ConfigError(
            f"prefetch: {predictor.__module__} knows the future, expected a predictor that does "
            f"not; it is for moe-infinity simulate"
        )
