"""How GPU programs are cut, by the GPU's name: data in tuned/*.json. Knows nothing of Triton.

A file has ``gpus``, the names it is for (``default``: all others), and of each way to multiply a
list of entries for up to ``most_tokens`` tokens. The numbers change speed only, not results.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from moe_infinity.errors import ConfigError

FOLDER = Path(__file__).with_name("tuned")
FEW = 8  # tokens of an expert that are multiplied row by row; more go through tl.dot
_LANES = {"few": 256, "tall": 64}  # in which order sums are taken: not to be tuned
_WAYS = ("few", "tall", "many")
_NUMBERS = ("most_tokens", "rows", "num_warps", "num_stages")
_LEAST_OF_DOT = 16  # rows, columns and tokens
_MOST = 1024


class Way(NamedTuple):
    """is_many: tl.dot; else row by row. tokens, rows: of one program; columns: of one step."""

    is_many: bool
    tokens: int
    rows: int
    columns: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class Tuning:
    """Of each way the entries in the order of their tokens; the last one takes all the rest."""

    few: tuple[dict[str, int], ...]
    tall: tuple[dict[str, int], ...]
    many: tuple[dict[str, int], ...]

    def way(self, num_tokens: int, is_tall: bool) -> Way:
        """For an expert of that many tokens; is_tall: neighbours in memory are rows."""
        if num_tokens > FEW:
            best = _first(self.many, num_tokens)
            return _way(best, True, best["tokens"], best["columns"])
        name = "tall" if is_tall else "few"
        best = _first(self.tall if is_tall else self.few, num_tokens)
        return _way(best, False, 1 << (num_tokens - 1).bit_length(), _LANES[name])


def load(gpu: str, folder: Path = FOLDER) -> Tuning:
    """Of this GPU, or of ``default``. Raises ConfigError for a file that means nothing."""
    found: dict[str, Tuning] = {}
    for path in sorted(folder.glob("*.json")):
        names, tuning = _read(path)
        found |= dict.fromkeys(names, tuning)
    if "default" not in found:
        raise ConfigError(
            f"tuning: got {', '.join(sorted(found)) or 'nothing'} in {folder}, expected a file "
            f"with 'default' among its gpus; install the package again"
        )
    return found.get(gpu, found["default"])


def _first(entries: tuple[dict[str, int], ...], num_tokens: int) -> dict[str, int]:
    return next((e for e in entries if num_tokens <= e["most_tokens"]), entries[-1])


def _way(entry: dict[str, int], is_many: bool, tokens: int, columns: int) -> Way:
    rows, num_warps, num_stages = (entry[name] for name in ("rows", "num_warps", "num_stages"))
    return Way(is_many, tokens, rows, columns, num_warps, num_stages)


def _read(path: Path) -> tuple[list[str], Tuning]:
    try:
        raw = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"tuning: {path} is no JSON ({error}); install the package again"
        ) from None
    if not isinstance(raw, dict) or set(raw) != {"gpus", *_WAYS}:
        raise _wrong(path, "keys", sorted(raw), ", ".join(("gpus", *_WAYS)))
    names = raw["gpus"]
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise _wrong(path, "gpus", names, "a list of names")
    ways = {way: tuple(_entry(path, way, each) for each in _list(path, way, raw)) for way in _WAYS}
    return names, Tuning(**ways)


def _list(path: Path, way: str, raw: dict[str, object]) -> list[object]:
    entries = raw[way]
    if not isinstance(entries, list) or not entries:
        raise _wrong(path, way, entries, "a list of entries")
    return entries


def _entry(path: Path, way: str, entry: object) -> dict[str, int]:
    names = {*_NUMBERS, *(("tokens", "columns") if way == "many" else ())}
    if not isinstance(entry, dict) or set(entry) != names:
        raise _wrong(path, f"an entry of {way}", entry, ", ".join(sorted(names)))
    for name, value in entry.items():
        what = f"{name} of {way}"
        if not isinstance(value, int) or not 1 <= value <= _MOST:
            raise _wrong(path, what, value, f"a whole number from 1 to {_MOST}")
        if name in ("tokens", "columns", "rows", "num_warps") and value & (value - 1):
            raise _wrong(path, what, value, "a power of two")
        if way == "many" and name in ("tokens", "rows") and value < _LEAST_OF_DOT:
            raise _wrong(path, what, value, f"at least {_LEAST_OF_DOT}")
        if name == "columns" and value < _LANES["tall"]:
            raise _wrong(path, what, value, f"at least {_LANES['tall']}")
    return entry


def _wrong(path: Path, what: str, got: object, expected: str) -> ConfigError:
    return ConfigError(f"tuning: {what} in {path}: got {got!r}, expected {expected}")
