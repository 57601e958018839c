"""Puts an opened checkpoint, a plan and the chosen policy together into a running cache."""

from __future__ import annotations

from pathlib import Path

from moe_infinity.cache.ram import RamHierarchy
from moe_infinity.cache.slots import SlotArena
from moe_infinity.cache.transfer import TransferEngine
from moe_infinity.checkpoint.base import Checkpoint
from moe_infinity.checkpoint.safetensors import SafetensorsCheckpoint
from moe_infinity.config import EngineConfig
from moe_infinity.model.loading import Anatomy, read_config
from moe_infinity.planning import Plan
from moe_infinity.policies import find_policy
from moe_infinity.predictors import find_predictor
from moe_infinity.residency.directory import Directory
from moe_infinity.residency.planner import PrefetchPlanner
from moe_infinity.residency.residency import Residency
from moe_infinity.stats import Counters


def open_checkpoint(path: Path) -> Checkpoint:
    """The checkpoint in a folder. Its config is read first: it explains more than missing files."""
    read_config(path)
    return SafetensorsCheckpoint(path)


def build_hierarchy(
    checkpoint: Checkpoint, anatomy: Anatomy, plan: Plan, config: EngineConfig
) -> RamHierarchy:
    """The cache of ``plan`` over the checkpoint's experts, with its reader threads started."""
    policy = find_policy(config.policy)(anatomy.shape, plan.num_slots, config.seed)
    predictor = find_predictor(config.prefetch)(anatomy.shape, config.seed)
    directory = Directory(anatomy.shape, plan.slots_per_class, plan.class_of_layer)
    store = checkpoint.expert_store(anatomy.specs)
    layer_bytes = [0] * anatomy.shape.num_layers
    for key, spec in anatomy.specs.items():
        layer_bytes[key.layer] = max(layer_bytes[key.layer], spec.read_bytes)
    return RamHierarchy(
        store,
        Residency(directory, policy, Counters(layer_bytes)),
        PrefetchPlanner(predictor, directory),
        SlotArena(plan.slots_per_class, plan.slot_bytes),
        TransferEngine(store, config.num_read_threads),
    )
