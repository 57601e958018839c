"""Finding a policy or predictor by its file name, or by 'package.module:Class'."""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
import sys
from types import ModuleType
from typing import TypeVar

from moe_infinity.errors import ConfigError, UnknownNameError

_T = TypeVar("_T")
_NOT_MEMBERS = {"base"}


def member_names(package: ModuleType) -> list[str]:
    """Names of a family's members: its module files, 'base' and private ones left out."""
    names = [module.name for module in pkgutil.iter_modules(package.__path__)]
    return sorted(n for n in names if n not in _NOT_MEMBERS and not n.startswith("_"))


def find_class(package: ModuleType, name: str, class_name: str, base: type[_T]) -> type[_T]:
    """The class behind ``name``: ``package/<name>.py`` holds it, or it is 'module:Class'.

    Raises UnknownNameError where there is none. An error inside the module itself is not masked.
    """
    family = class_name.lower()
    module_name, _, attribute = name.partition(":")
    if attribute:
        if _find_spec(module_name) is None:
            raise UnknownNameError(family, name, member_names(package))
    elif name in member_names(package):
        module_name, attribute = f"{package.__name__}.{name}", class_name
    else:
        raise UnknownNameError(family, name, member_names(package))
    found = getattr(importlib.import_module(module_name), attribute, None)
    if not (isinstance(found, type) and issubclass(found, base)):
        raise ConfigError(
            f"{family} {name!r}: got {found!r}, expected a subclass of "
            f"{base.__module__}.{base.__name__}"
        )
    return found


def _find_spec(module_name: str) -> object:
    if not module_name or module_name.startswith("."):
        return None
    if module_name in sys.modules:  # __main__ too, which has no spec
        return sys.modules[module_name]
    try:
        return importlib.util.find_spec(module_name)
    except ModuleNotFoundError as error:
        # Only where a part of the name itself is missing; what a parent imports is its affair.
        if error.name is not None and f"{module_name}.".startswith(f"{error.name}."):
            return None
        raise
