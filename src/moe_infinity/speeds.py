"""How fast this machine reads and computes for one checkpoint: remembered, checked, or measured."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from moe_infinity.machine import Bandwidths, disk_gbps, measure
from moe_infinity.state_file import StateFile, device_of

_CHECK_S = 0.1
_FAR_OFF = 2.0  # as a factor: a slower or faster disk, and no noise of a shared one


class Speeds:
    """Of the device that ``files`` lie on, in reads of experts of ``expert_bytes``."""

    def __init__(self, files: Sequence[Path], expert_bytes: int) -> None:
        self._files, self._expert_bytes = files, expert_bytes
        self._state = StateFile()
        self._device = device_of(files[0], expert_bytes)
        self.remembered = self._state.bandwidths(self._device)  # may be of another day
        self._checked: Bandwidths | None = None

    @property
    def bytes_written(self) -> int:
        return self._state.bytes_written

    def ask(self, may_measure: bool) -> Bandwidths | None:
        """What is so today. Takes a tenth of a second the first time, or two where nothing is
        remembered or the disk is another; None if that may not be measured now."""
        if self._checked is None and may_measure:
            self._checked = self._check()
        return self._checked or self.remembered

    def _check(self) -> Bandwidths:
        known = self.remembered
        if known is not None:
            reading = (known.read_threads, known.read_chunk_bytes)
            now = disk_gbps(self._files, *reading, seconds=_CHECK_S)
            if 1 / _FAR_OFF < now / known.disk_gbps < _FAR_OFF:
                return known
        found = measure(self._files, self._expert_bytes)
        self._state.set_bandwidths(self._device, found)
        self._state.save()
        return found

    def save(self) -> None:
        """Write what could not be written when it was measured."""
        self._state.save()
