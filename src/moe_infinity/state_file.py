"""The one file a run writes: measured bandwidths, by device. Written on close, atomically."""

from __future__ import annotations

import json
import logging
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

from moe_infinity.config import state_dir
from moe_infinity.durable import write_atomically
from moe_infinity.machine import Bandwidths

_VERSION = 3  # how to read, too
_log = logging.getLogger(__name__)


class StateFile:
    """Bandwidths measured before, per storage device. A file it cannot read is measured anew."""

    def __init__(self, path: Path | None = None) -> None:
        self.path = path or state_dir() / "machine.json"
        self.bytes_written = 0
        self._known: dict[str, dict[str, Any]] = self._read()
        self._changed = False

    def bandwidths(self, device: str) -> Bandwidths | None:
        """What was measured for a device, named by ``device_of``."""
        entry = self._known.get(device)
        try:
            return Bandwidths(**entry) if entry else None
        except (TypeError, ValueError):
            return None

    def set_bandwidths(self, device: str, measured: Bandwidths) -> None:
        self._known[device] = asdict(measured)
        self._changed = True

    def save(self) -> None:
        """Write what changed. A state directory that cannot be written costs only the memory."""
        if not self._changed:
            return
        text = json.dumps({"version": _VERSION, "bandwidths": self._known}, indent=1)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(self.path, text.encode())
        except OSError as error:
            _log.warning("state file %s not written: %s", self.path, error)
            return
        self.bytes_written += len(text)
        self._changed = False

    def _read(self) -> dict[str, dict[str, Any]]:
        try:
            raw = json.loads(self.path.read_text())
            return dict(raw["bandwidths"]) if raw["version"] == _VERSION else {}
        except (OSError, ValueError, KeyError, TypeError):
            return {}


def device_of(path: Path, read_bytes: int) -> str:
    """Name of the storage device a file lies on and of the size of reads, to a power of two.

    Small reads are slower: what was measured for one model says little of another's.
    """
    return f"{os.stat(path).st_dev}:{1 << (read_bytes - 1).bit_length()}"
