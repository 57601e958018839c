"""What a model's name stands for: a folder here, a complete earlier download, a list of files on
the hub. Knows huggingface_hub's protocol; nothing about tensors.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import huggingface_hub  # loads its parts on first use: commands that need no hub do not pay

from moe_infinity.checkpoint.download import TIMEOUT_S, connection_errors
from moe_infinity.checkpoint.hub_errors import reason_of
from moe_infinity.errors import CheckpointError, CheckpointNotFoundError, CorruptCheckpointError

_log = logging.getLogger(__name__)

_HUB_ID = re.compile(r"([A-Za-z0-9][\w.-]*/[\w.-]+)(?:@([\w./-]+))?", re.ASCII)
INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class Listing:
    """What the hub says a model consists of at one commit."""

    repo: str
    revision: str | None
    commit: str
    sizes: dict[str, int]  # bytes of each file
    etags: dict[str, str]  # hashes of the contents

    def url(self, name: str) -> str:
        return huggingface_hub.hf_hub_url(self.repo, name, revision=self.commit)


def is_gguf(path: Path) -> bool:
    """Whether a path names a GGUF file, or a folder of one model in no other form."""
    if path.is_dir():
        return not (path / "config.json").exists() and any(path.glob("*.gguf"))
    return path.suffix.lower() == ".gguf" or _begins_as_gguf(path)


def _begins_as_gguf(path: Path) -> bool:
    """Some keep such files under another name."""
    try:
        if not path.is_file():  # a pipe would be waited for
            return False
        with path.open("rb") as file:
            return file.read(4) == b"GGUF"
    except OSError:
        return False


def is_hub_id(model: str | Path) -> bool:
    """Whether this is no path here but has the form of a hub id, ``@revision`` included."""
    return local_path(model) is None and bool(_HUB_ID.fullmatch(str(model)))


def local_path(model: str | Path) -> Path | None:
    """The path, if something is there. A name may be too long for one, or of nobody's home."""
    try:
        path = Path(model).expanduser()
        return path if path.exists() else None
    except (OSError, RuntimeError, ValueError):
        return None


def local_model(model: str | Path) -> Path | None:
    """The folder or GGUF file that is here under this name."""
    path = local_path(model)
    return path if path is not None and (path.is_dir() or is_gguf(path)) else None


def parse_id(model: str | Path) -> tuple[str, str | None]:
    if local_path(model) is not None:
        raise CheckpointNotFoundError(
            f"{model}: got a file, expected a checkpoint's folder, or a .gguf file; name the "
            f"folder it is in"
        )
    match = _HUB_ID.fullmatch(str(model))
    if str(model).lower().endswith(".gguf"):
        raise CheckpointNotFoundError(
            f"{model}: no such file, expected a GGUF file{_others_beside(Path(model))}"
        )
    if match is None:
        raise CheckpointNotFoundError(
            f"{model}: got neither an existing folder nor a hub id, expected a checkpoint's folder "
            f"or an id such as Qwen/Qwen3-30B-A3B or Qwen/Qwen3-30B-A3B@revision"
        )
    return match[1], match[2]


def _others_beside(path: Path) -> str:
    try:
        names = sorted(each.name for each in path.expanduser().parent.glob("*.gguf"))
    except (OSError, RuntimeError):  # a name too long, or of nobody's home
        return ""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"; beside it are {', '.join(names[:3])}{more}" if names else ""


def ask(repo: str, revision: str | None) -> Listing | Path:
    """What the hub has; if it does not say, the folder of a complete earlier download."""
    try:
        return _list(repo, revision)
    except connection_errors() as error:
        folder = downloaded_before(repo, revision)
        if folder is None:
            raise
        _log.warning("%s: %s; using the copy in %s", repo, reason_of(error), folder)
        return folder


def _list(repo: str, revision: str | None) -> Listing:
    info = huggingface_hub.HfApi().model_info(
        repo, revision=revision, files_metadata=True, timeout=TIMEOUT_S
    )
    sizes, etags = {}, {}
    for file in info.siblings or []:
        name = PurePosixPath(file.rfilename)
        if not name.is_absolute() and ".." not in name.parts:
            sizes[file.rfilename] = file.size or 0
            etags[file.rfilename] = (file.lfs.sha256 if file.lfs else file.blob_id) or ""
    return Listing(repo, revision, info.sha or "main", sizes, etags)


def downloaded_before(repo: str, revision: str | None) -> Path | None:
    """The cached folder if it is complete. Weights are linked last, so they tell."""
    try:
        cached = huggingface_hub.snapshot_download(
            repo, revision=revision, local_files_only=True, allow_patterns="config.json"
        )
        folder = Path(cached)
        names = choose_weights([file.name for file in folder.iterdir()], folder)
    except (OSError, CheckpointError):
        return None
    return folder if names and all((folder / name).exists() for name in names) else None


def weight_files(listing: Listing, folder: Path) -> list[str]:
    """The names of the weight files; ``folder`` has the index if there is one."""
    names = choose_weights(listing.sizes, folder)
    if not names:
        raise CheckpointNotFoundError(
            f"{listing.repo}: got no *.safetensors file on the hub, expected model.safetensors or "
            f"{INDEX}; choose a repository of this model that has them"
        )
    absent = [name for name in names if name not in listing.sizes]
    if absent:
        raise CorruptCheckpointError(
            f"{listing.repo}: {len(absent)} of the {len(names)} files in {INDEX} are not on the "
            f"hub (first: {absent[0]}); tell its authors, or choose another revision"
        )
    return names


def choose_weights(names: Iterable[str], folder: Path) -> list[str]:
    """As SafetensorsCheckpoint chooses: the index's files, else model.safetensors, else all."""
    index = folder / INDEX
    if index.exists():
        try:
            return sorted(set(map(str, json.loads(index.read_text())["weight_map"].values())))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CorruptCheckpointError(
                f"{index}: got no table 'weight_map' ({error}), expected tensor names and files"
            ) from error
    found = sorted(name for name in names if "/" not in name and name.endswith(".safetensors"))
    return ["model.safetensors"] if "model.safetensors" in found else found
