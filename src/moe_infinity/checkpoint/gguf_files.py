"""Which files a GGUF model lies in."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moe_infinity.errors import CheckpointNotFoundError, CorruptCheckpointError

_SPLIT = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf")


def files_of(path: Path) -> list[Path]:
    """All files of the model, in order."""
    if path.is_dir():
        path = _one_in(path)
    match = _SPLIT.fullmatch(path.name)
    if match is None:
        return [path]
    stem, number, count = match.groups()
    if not 1 <= int(number) <= int(count):
        raise CheckpointNotFoundError(
            f"{path}: is number {int(number)} of {int(count)} by its name, expected one of as many"
        )
    files = [path.with_name(f"{stem}-{n:05}-of-{count}.gguf") for n in range(1, int(count) + 1)]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise CorruptCheckpointError(
            f"{path.parent}: {len(missing)} of {len(files)} files are missing "
            f"({', '.join(missing[:3])}); download them again"
        )
    return files


def _one_in(folder: Path) -> Path:
    found = sorted(folder.glob("*.gguf"))
    first = [f for f in found if (m := _SPLIT.fullmatch(f.name)) is None or int(m[2]) == 1]
    if len(first) != 1:
        names = ", ".join(file.name for file in first) or "none that begins a model"
        raise CheckpointNotFoundError(
            f"{folder}: got {len(first)} GGUF models ({names}), expected one; name the file"
        )
    return first[0]


def require_all(files: tuple[Path, ...], values: Mapping[str, Any]) -> None:
    count = values.get("split.count", 1) or 1
    if count != len(files):
        raise CorruptCheckpointError(
            f"{files[0]}: is one of {count} files by its header and of {len(files)} by its name, "
            f"expected the names that the splitting tool gave"
        )
