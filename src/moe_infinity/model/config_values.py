"""Reading a model's config, whose words differ from family to family."""

from __future__ import annotations

from typing import Any, TypeGuard


def first_number(config: Any, *names: str) -> int | None:
    """The first of these attributes that is a number; of a list (one per layer), the largest."""
    for name in names:
        try:
            value = getattr(config, name, None)
        except Exception:  # heterogeneous configs refuse to name one value for all layers
            value = [getattr(layer, name, None) for layer in _layers(config)]
        if isinstance(value, (list, tuple)):
            value = max((v for v in value if _is_count(v)), default=None)
        if _is_count(value):
            return value
    return None


def _layers(config: Any) -> list[Any]:
    layers = getattr(config, "per_layer_config", None) or []
    return list(layers.values()) if isinstance(layers, dict) else list(layers)


def _is_count(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0
