"""Every error a user can meet.

MoEInfinityError
├── ConfigError              an option has a value that means nothing
│   └── UnknownNameError     no policy, predictor, device... of that name; lists those there are
├── CheckpointError          the weights, or what describes them
│   ├── CheckpointNotFoundError
│   ├── NotAnMoEError
│   ├── UnsupportedModelError    an MoE family or layout this version cannot run
│   ├── CorruptCheckpointError   truncated, missing or contradictory files
│   ├── CheckpointChangedError   files changed after they were opened
│   ├── ReadError                the disk failed or delivered too little
│   ├── DiskSpaceError           a download or a packed model would not fit on the disk
│   └── PackError                a packed folder could not be written
├── BudgetError              the plan does not fit the memory budget
├── PlanExceededError        rows or context beyond what was planned
├── DeviceError              the device that computes was lost in mid-run
├── TraceError               a trace, or state learned from one, cannot be used
└── CancelledError           the request was cancelled
"""

from __future__ import annotations

from collections.abc import Iterable


class MoEInfinityError(Exception):
    """Base of all errors raised on purpose; its message says what was got, expected, and to do."""


class ConfigError(MoEInfinityError, ValueError):
    """An option has a value that means nothing."""


class UnknownNameError(ConfigError):
    """No member of a family has that name."""

    def __init__(self, family: str, got: str, known: Iterable[str], why: str = "") -> None:
        choices = ", ".join(sorted(known))
        super().__init__(
            f"unknown {family} {got!r}{why}; there are: {choices}; "
            f"your own goes in as 'package.module:Class'"
        )


class CheckpointError(MoEInfinityError):
    """The weights, or what describes them, cannot be used."""


class CheckpointNotFoundError(CheckpointError):
    """No such folder, hub id or file."""


class NotAnMoEError(CheckpointError):
    """The model has no routed experts."""


class UnsupportedModelError(CheckpointError):
    """An MoE family, layout or number format this version cannot run."""


class CorruptCheckpointError(CheckpointError):
    """A file is missing, truncated, or contradicts itself."""


class CheckpointChangedError(CheckpointError):
    """A file changed on disk after it was opened."""


class ReadError(CheckpointError):
    """The disk failed or delivered fewer bytes than the file should have."""


class DiskSpaceError(CheckpointError):
    """A download, or a packed model, would not fit on the disk; the message says what is needed
    and free."""


class PackError(CheckpointError):
    """A packed folder could not be written; what is written stays, to go on with."""


class BudgetError(MoEInfinityError):
    """The plan does not fit the memory budget; the message shows the arithmetic."""


class PlanExceededError(MoEInfinityError):
    """More rows or a longer context than the plan holds memory for."""


class DeviceError(MoEInfinityError):
    """The device that computes was lost; what it held is gone, the model has to be opened anew."""


class TraceError(MoEInfinityError):
    """A trace, or state learned from one, is spoiled, of another version or of another model."""


class CancelledError(MoEInfinityError):
    """The request was cancelled by ``MoE.cancel()``."""
