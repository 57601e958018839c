"""Replacement policies, one file each; a new file is found by its name."""

from __future__ import annotations

import sys

from moe_infinity.policies.base import CachePolicy
from moe_infinity.registry import find_class, member_names


def policy_names() -> list[str]:
    return member_names(sys.modules[__name__])


def find_policy(name: str) -> type[CachePolicy]:
    """The policy class of that name or 'package.module:Class'; raises UnknownNameError."""
    return find_class(sys.modules[__name__], name, "Policy", CachePolicy)  # type: ignore[type-abstract]
