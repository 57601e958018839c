"""MoE-Infinity: Mixture-of-Experts models that do not fit, run exactly, from SSD and RAM."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moe_infinity.checkpoint.hub import bundled_model_path
    from moe_infinity.engine import MoE
    from moe_infinity.errors import MoEInfinityError
    from moe_infinity.stats import Stats

__all__ = ["MoE", "MoEInfinityError", "Stats", "bundled_model_path"]

_HOMES = {
    "MoE": "engine",
    "MoEInfinityError": "errors",
    "Stats": "stats",
    "bundled_model_path": "checkpoint.hub",
}


def __getattr__(name: str) -> Any:
    """Import on first use: the simulator and the policies must not pay for torch."""
    if name not in _HOMES:
        raise AttributeError(f"module 'moe_infinity' has no attribute {name!r}")
    import importlib

    if name == "MoE":
        from moe_infinity.config import keep_kernel_caches_small, let_idle_threads_sleep

        let_idle_threads_sleep()
        keep_kernel_caches_small()
    return getattr(importlib.import_module(f"moe_infinity.{_HOMES[name]}"), name)
