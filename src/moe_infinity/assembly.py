"""Puts an opened checkpoint, a plan and the chosen policy together into a running cache."""

from __future__ import annotations

from pathlib import Path

from moe_infinity.cache.ram import RamHierarchy
from moe_infinity.cache.slots import SlotArena
from moe_infinity.cache.transfer import TransferEngine
from moe_infinity.checkpoint.base import Checkpoint
from moe_infinity.checkpoint.safetensors import SafetensorsCheckpoint
from moe_infinity.config import EngineConfig
from moe_infinity.errors import ConfigError
from moe_infinity.model.loading import Anatomy, read_config
from moe_infinity.model.rules import MissRule
from moe_infinity.planning import Plan
from moe_infinity.policies import find_policy
from moe_infinity.policies.base import CachePolicy
from moe_infinity.predictors import find_predictor
from moe_infinity.predictors.base import ExpertPredictor
from moe_infinity.residency.directory import Directory
from moe_infinity.residency.planner import PrefetchPlanner
from moe_infinity.residency.residency import Residency
from moe_infinity.residency.runner import EventRunner
from moe_infinity.stats import Counters


def open_checkpoint(path: Path) -> Checkpoint:
    """The checkpoint in a folder. Its config is read first: it explains more than missing files."""
    read_config(path)
    return SafetensorsCheckpoint(path)


def find_choices(config: EngineConfig) -> tuple[type[CachePolicy], type[ExpertPredictor]]:
    """The policy and predictor that were named. Raises UnknownNameError or ConfigError."""
    policy, predictor = find_policy(config.policy), find_predictor(config.prefetch)
    _refuse_unrecorded(policy, predictor)
    return policy, predictor


def build_hierarchy(
    checkpoint: Checkpoint,
    anatomy: Anatomy,
    plan: Plan,
    config: EngineConfig,
    miss_rule: MissRule,
) -> RamHierarchy:
    """The cache of ``plan`` over the checkpoint's experts, with its reader threads started."""
    policy_class, predictor_class = find_choices(config)
    policy = policy_class(anatomy.shape, plan.num_slots, config.seed)
    predictor = predictor_class(anatomy.shape, config.seed)
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
    return RamHierarchy(
        store,
        runner,
        SlotArena(plan.slots_per_class, plan.slot_bytes),
        TransferEngine(store, config.num_read_threads),
    )


def _refuse_unrecorded(policy: type[CachePolicy], predictor: type[ExpertPredictor]) -> None:
    """Raise ConfigError for a member that needs what events do not carry yet."""
    asks = {
        policy: policy.needs_router_logits,
        predictor: predictor.needs_router_logits or predictor.needs_router_input,
    }
    for member, needs in asks.items():
        if needs:
            raise ConfigError(
                f"{member.__module__}.{member.__name__} needs router logits or inputs, which this "
                f"version does not record; choose another"
            )
