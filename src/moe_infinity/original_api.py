"""The original package's configuration keys, translated or named as having no meaning here."""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path
from typing import Any

from moe_infinity.errors import ConfigError

_WITHOUT_MEANING = {
    "offload_path": "experts are read from the checkpoint itself, nothing is copied",
    "host_memory_ratio": "ram='8GiB' bounds the whole process",
    "trace_capacity": "the size of the trace collection is fixed",
    "trace_path": "traces are kept in the state directory",
    "prefetch": "prefetch='<predictor>' names one",
    "num_threads": "num_read_threads sets the readers",
}
_warned: set[str] = set()


def translate(config: dict[str, Any] | str | os.PathLike[str] | None) -> dict[str, Any]:
    """Options of ``MoE`` for the original's dictionary, or a JSON file that holds one.

    What has no meaning here warns once, by name. device_memory_ratio is a share of the GPU's
    memory, or of RAM where there is no GPU. Raises ConfigError for what is no dictionary, and for
    a ratio outside 0 to 1.
    """
    options: dict[str, Any] = {}
    for key, value in _as_dict(config).items():
        if key == "device_memory_ratio":
            options["ram"] = _share_of_ram(value)
        elif key == "prefetch" and isinstance(value, str):
            options["prefetch"] = value
        elif key != "prefetch" or value:
            _warn_once(key)
    return options


def _as_dict(config: dict[str, Any] | str | os.PathLike[str] | None) -> dict[str, Any]:
    found: Any = config
    if isinstance(config, (str, os.PathLike)):
        try:
            found = json.loads(Path(config).read_text())
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"config: got {str(config)!r}, expected a dictionary or a JSON file ({error})"
            ) from error
    if found is not None and not isinstance(found, dict):
        raise ConfigError(f"config: got {found!r:.80}, expected a dictionary of options")
    return found or {}


def _share_of_ram(ratio: Any) -> int:
    import psutil

    if isinstance(ratio, bool) or not isinstance(ratio, (int, float)) or not 0 < ratio <= 1:
        raise ConfigError(f"device_memory_ratio: got {ratio!r}, expected a number in (0, 1]")
    return int(psutil.virtual_memory().total * ratio)


def _warn_once(key: str) -> None:
    if key in _warned:
        return
    _warned.add(key)
    reason = _WITHOUT_MEANING.get(key, "unknown key")
    warnings.warn(f"MoE config key {key!r} has no meaning here: {reason}", stacklevel=4)
