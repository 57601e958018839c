"""Finding a policy or predictor by its file name, or by 'package.module:Class'."""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
import sys
import traceback
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

    Raises UnknownNameError where there is none, ConfigError for one that cannot be imported or is
    no such class.
    """
    family = class_name.lower()
    module_name, _, attribute = name.partition(":")
    if attribute:
        if not _is_module(module_name):
            why = f" (no module {module_name!r} in this folder or installed)" if module_name else ""
            raise UnknownNameError(family, name, member_names(package), why)
    elif name in member_names(package):
        module_name, attribute = f"{package.__name__}.{name}", class_name
    else:
        raise UnknownNameError(family, name, member_names(package))
    found = getattr(_imported(family, name, module_name), attribute, None)
    if not (isinstance(found, type) and issubclass(found, base)):
        raise ConfigError(
            f"{family} {name!r}: got {found!r}, expected a subclass of "
            f"{base.__module__}.{base.__name__}"
        )
    return found


def make(found: type[_T], *arguments: object) -> _T:
    """An object of a member's class. Raises ConfigError that names what is wrong with it."""
    try:
        return found(*arguments)
    except Exception as error:  # of any kind: it may be the user's own code
        raise ConfigError(
            f"{found.__module__}:{found.__name__}: cannot be made ({_reason(error)}), expected a "
            f"class like those of moe_infinity.policies and predictors"
        ) from error


def _is_module(name: str) -> bool:
    if not name or name.startswith("."):
        return False
    if name in sys.modules:  # __main__ too, which has no spec
        return True
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError as error:
        # Only where a part of the name itself is missing; what a parent imports is its affair.
        return not (error.name is not None and f"{name}.".startswith(f"{error.name}."))
    except Exception:  # its parent's own, which importing tells
        return True


def _imported(family: str, name: str, module_name: str) -> ModuleType:
    try:
        return importlib.import_module(module_name)
    except Exception as error:  # of any kind: it may be the user's own code
        raise ConfigError(
            f"{family} {name!r}: its module cannot be imported ({_reason(error)})"
        ) from error


def _reason(error: Exception) -> str:
    """With the innermost line that is to blame."""
    frames = traceback.extract_tb(error.__traceback__)
    last = frames[-1] if frames else None
    where = f", {last.filename}:{last.lineno}" if last else ""
    return f"{type(error).__name__}: {error}{where}"
