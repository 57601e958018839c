"""What a policy and a predictor have learned of a model: loaded at the start, saved on close."""

from __future__ import annotations

import logging
from pathlib import Path

from moe_infinity.config import learned_path
from moe_infinity.errors import TraceError
from moe_infinity.policies.base import CachePolicy
from moe_infinity.predictors.base import ExpertPredictor

_log = logging.getLogger(__name__)


class Learned:
    """The learned files of one model's chosen policy and predictor, in the state directory.

    A file that cannot be used costs what it taught, not the run: a warning says why, and it is
    replaced when there is something to save.
    """

    def __init__(
        self,
        policy: CachePolicy,
        predictor: ExpertPredictor,
        names: tuple[str, str],
        fingerprint: str,
    ) -> None:
        self.bytes_written = 0
        self._predictor = predictor
        policy.fingerprint = predictor.fingerprint = fingerprint
        self._path = learned_path(fingerprint, names[1])
        _load(policy, learned_path(fingerprint, names[0]))
        _load(predictor, self._path)

    def save(self) -> None:
        """Write what the predictor learned; a directory that refuses costs only the memory."""
        before = _written(self._path)
        try:
            self._predictor.save(self._path)
        except Exception as error:  # a policy of one's own may do anything; closing goes on
            _log.warning("%s not written: %s", self._path, error)
            return
        after = _written(self._path)
        if after != before:
            self.bytes_written += after[1]


def _load(member: CachePolicy | ExpertPredictor, path: Path) -> None:
    if not path.is_file():
        return
    try:
        member.load(path)
    except (TraceError, KeyError, ValueError, OSError) as error:
        _log.warning("starts with nothing learned: %s", error)


def _written(path: Path) -> tuple[int, int]:
    try:
        stat = path.stat()
    except OSError:
        return (0, 0)
    return (stat.st_mtime_ns, stat.st_size)
