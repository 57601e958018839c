"""How model families carry their routed experts; a family's own adapter is found by its name."""

from __future__ import annotations

import sys

from moe_infinity.model.adapters._interface import InterfaceAdapter
from moe_infinity.model.adapters.base import Adapter
from moe_infinity.registry import find_class, member_names


def find_adapter(model_type: str) -> Adapter:
    """The adapter ``<model_type>.py`` where there is one, else that of the experts interface."""
    package = sys.modules[__name__]
    name = model_type.replace("-", "_")
    if name not in member_names(package):
        return InterfaceAdapter()
    return find_class(package, name, "Adapter", Adapter)()  # type: ignore[type-abstract]
