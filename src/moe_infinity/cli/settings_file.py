"""Options from a TOML file: what a command takes on its line, by the same names."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import typer

from moe_infinity.errors import ConfigError


def read_settings(context: typer.Context, path: Path | None) -> Path | None:
    """Make the file's values the command's defaults; callback of an eager ``--config``.

    Raises ConfigError if it cannot be read, or names what the command has no option for.
    """
    if path is None:
        return None
    known = {
        parameter.name: parameter
        for parameter in context.command.params
        if parameter.name not in (None, "config", "help")
    }
    found = {key.replace("-", "_"): value for key, value in _parsed(path).items()}
    unknown = sorted(found.keys() - known.keys())
    if unknown:
        raise ConfigError(
            f"{path}: got {', '.join(unknown)}, expected names among {', '.join(sorted(known))}"
        )
    for key, value in found.items():
        _require_plain(path, key, value, known[key].multiple)
    context.default_map = {**(context.default_map or {}), **found}
    return path


def _require_plain(path: Path, key: str, value: Any, is_multiple: bool) -> None:
    """A table means nothing here, and a list only where an option may be repeated."""
    is_list = isinstance(value, list)
    if isinstance(value, dict) or (is_list and not is_multiple):
        raise ConfigError(f"{path}: {key}: got {value!r:.80}, expected one value")
    if is_multiple and not (is_list and all(isinstance(v, str) for v in value)):
        raise ConfigError(f"{path}: {key}: got {value!r:.80}, expected a list of texts")


def _parsed(path: Path) -> dict[str, Any]:
    toml = importlib.import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")
    try:
        found: dict[str, Any] = toml.loads(path.read_text(encoding="utf-8"))
        return found
    except OSError as error:
        raise ConfigError(
            f"--config: cannot read {path} ({error.strerror}), expected a TOML file"
        ) from error
    except ValueError as error:  # TOML's and UTF-8's own errors
        raise ConfigError(f"{path}: is no TOML ({error})") from error
