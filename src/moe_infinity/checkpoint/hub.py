"""From what the user named to a folder on disk: a path, or a hub id that is downloaded first.

Knows files, sizes and the hub's protocol (through huggingface_hub); nothing about tensors.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath

import huggingface_hub  # loads its parts on first use: commands that need no hub do not pay

from moe_infinity.checkpoint.download import (
    TIMEOUT_S,
    Progress,
    connection_errors,
    extend,
    num_bytes_of,
    sha256_of,
)
from moe_infinity.checkpoint.hub_errors import explained, reason_of
from moe_infinity.config import format_bytes
from moe_infinity.errors import (
    CheckpointError,
    CheckpointNotFoundError,
    CorruptCheckpointError,
    DiskSpaceError,
)

_log = logging.getLogger(__name__)

_HUB_ID = re.compile(r"([A-Za-z0-9][\w.-]*/[\w.-]+)(?:@([\w./-]+))?", re.ASCII)
_SMALL_FILE = re.compile(
    r"[^/]+\.(json|jinja|model|tiktoken|txt)|tokenizer[^/]*|additional_chat_templates/[^/]+\.jinja"
)
_INDEX = "model.safetensors.index.json"
_DESCRIPTION = ("config.json", "generation_config.json", _INDEX)
_MAX_HEADER_BYTES = 100_000_000  # the safetensors format's own limit
_MAX_HTTP_BYTES = 50_000_000_000  # the hub serves larger files by its own protocol only


@dataclass(frozen=True)
class _Listing:
    """What the hub says a model consists of at one commit."""

    repo: str
    revision: str | None
    commit: str
    sizes: dict[str, int]  # bytes of each file
    etags: dict[str, str]  # hashes of the contents

    def url(self, name: str) -> str:
        return huggingface_hub.hf_hub_url(self.repo, name, revision=self.commit)


# ---- what others call ------------------------------------------------------------------------


def bundled_model_path() -> Path:
    """Folder of the small trained Qwen3-MoE that ships with the package."""
    return Path(__file__).resolve().parent.parent / "bundled"


def is_hub_id(model: str | Path) -> bool:
    """Whether this is no path here but has the form of a hub id, ``@revision`` included."""
    return _local(model) is None and bool(_HUB_ID.fullmatch(str(model)))


def resolve(model: str | Path) -> Path:
    """The checkpoint's folder; ``org/name`` or ``org/name@revision`` is downloaded first.

    Downloads go to the hub's own cache and go on where an earlier one stopped. When the hub
    cannot be reached, a complete earlier download is used as it is.

    Raises CheckpointNotFoundError for what is neither a folder nor a model on the hub that can
    be reached and read, DiskSpaceError before a download that would not fit.
    """
    local = _local(model)
    if local is not None and local.is_dir():
        return local
    with explained(model):
        found = _ask(*_parse(model))
        return found if isinstance(found, Path) else _download(found)


def headers_only(model: str, folder: Path) -> Path:
    """A folder that describes a hub model without its weights: config, index, tensor headers.

    Its weight files have their true header and length but no data: they are sparse, a few KB on
    disk. Returns ``folder``; or, when the hub cannot be reached, that of a complete earlier
    download. Raises as ``resolve`` does.
    """
    with explained(model):
        found = _ask(*_parse(model))
        if isinstance(found, Path):
            return found
        progress = Progress()
        for name in _DESCRIPTION:
            if name in found.sizes:
                extend(folder / name, found.url(name), found.sizes[name], progress)
        names = _weight_files(found, folder)
        progress.run(partial(_copy_header, found, name, folder, progress) for name in names)
    return folder


# ---- names and listings ----------------------------------------------------------------------


def _local(model: str | Path) -> Path | None:
    """The path, if something is there. A name may be too long for one, or of nobody's home."""
    try:
        path = Path(model).expanduser()
        return path if path.exists() else None
    except (OSError, RuntimeError, ValueError):
        return None


def _parse(model: str | Path) -> tuple[str, str | None]:
    if _local(model) is not None:
        raise CheckpointNotFoundError(
            f"{model}: got a file, expected a checkpoint's folder; name the folder it is in"
        )
    match = _HUB_ID.fullmatch(str(model))
    if match is None:
        raise CheckpointNotFoundError(
            f"{model}: got neither an existing folder nor a hub id, expected a checkpoint's folder "
            f"or an id such as Qwen/Qwen3-30B-A3B or Qwen/Qwen3-30B-A3B@revision"
        )
    return match[1], match[2]


def _ask(repo: str, revision: str | None) -> _Listing | Path:
    """What the hub has; if it does not say, the folder of a complete earlier download."""
    try:
        return _list(repo, revision)
    except connection_errors() as error:
        folder = _downloaded_before(repo, revision)
        if folder is None:
            raise
        _log.warning("%s: %s; using the copy in %s", repo, reason_of(error), folder)
        return folder


def _list(repo: str, revision: str | None) -> _Listing:
    info = huggingface_hub.HfApi().model_info(
        repo, revision=revision, files_metadata=True, timeout=TIMEOUT_S
    )
    sizes, etags = {}, {}
    for file in info.siblings or []:
        name = PurePosixPath(file.rfilename)
        if not name.is_absolute() and ".." not in name.parts:
            sizes[file.rfilename] = file.size or 0
            etags[file.rfilename] = (file.lfs.sha256 if file.lfs else file.blob_id) or ""
    return _Listing(repo, revision, info.sha or "main", sizes, etags)


def _downloaded_before(repo: str, revision: str | None) -> Path | None:
    """The cached folder if it is complete. Weights are linked last, so they tell."""
    try:
        cached = huggingface_hub.snapshot_download(
            repo, revision=revision, local_files_only=True, allow_patterns="config.json"
        )
        folder = Path(cached)
        names = _choose_weights([file.name for file in folder.iterdir()], folder)
    except (OSError, CheckpointError):
        return None
    return folder if names and all((folder / name).exists() for name in names) else None


def _weight_files(listing: _Listing, folder: Path) -> list[str]:
    """The names of the weight files; ``folder`` has the index if there is one."""
    names = _choose_weights(listing.sizes, folder)
    if not names:
        raise CheckpointNotFoundError(
            f"{listing.repo}: got no *.safetensors file on the hub, expected model.safetensors or "
            f"{_INDEX}; choose a repository of this model that has them"
        )
    absent = [name for name in names if name not in listing.sizes]
    if absent:
        raise CorruptCheckpointError(
            f"{listing.repo}: {len(absent)} of the {len(names)} files in {_INDEX} are not on the "
            f"hub (first: {absent[0]}); tell its authors, or choose another revision"
        )
    return names


def _choose_weights(names: Iterable[str], folder: Path) -> list[str]:
    """As SafetensorsCheckpoint chooses: the index's files, else model.safetensors, else all."""
    index = folder / _INDEX
    if index.exists():
        try:
            return sorted(set(map(str, json.loads(index.read_text())["weight_map"].values())))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CorruptCheckpointError(
                f"{index}: got no table 'weight_map' ({error}), expected tensor names and files"
            ) from error
    found = sorted(name for name in names if "/" not in name and name.endswith(".safetensors"))
    return ["model.safetensors"] if "model.safetensors" in found else found


# ---- downloads -------------------------------------------------------------------------------


def _download(listing: _Listing) -> Path:
    """What is small by huggingface_hub alone, then the weights, each linked when it is whole."""
    small = [name for name in listing.sizes if _SMALL_FILE.fullmatch(name)]
    snapshot = huggingface_hub.snapshot_download(
        listing.repo, revision=listing.revision, allow_patterns=small
    )
    folder = Path(snapshot)
    names = _weight_files(listing, folder)
    if not all((folder / name).exists() for name in names):
        _download_weights(listing, names, folder)
    return folder


def _download_weights(listing: _Listing, names: list[str], folder: Path) -> None:
    from huggingface_hub.utils import WeakFileLock, tqdm  # type: ignore[attr-defined]

    storage = folder.parents[1]
    lock = storage.parent / ".locks" / storage.name / "moe-infinity.lock"
    lock.parent.mkdir(parents=True, exist_ok=True)
    with WeakFileLock(lock):
        names = [name for name in names if not (folder / name).exists()]
        total = sum(listing.sizes[name] for name in names)
        done = sum(num_bytes_of(_unfinished(storage, listing.etags[name])) for name in names)
        _require_space(listing.repo, total - done, storage)
        with tqdm(  # type: ignore[no-untyped-call]
            desc="weights", total=total, initial=done, unit="B", unit_scale=True
        ) as bar:
            progress = Progress(bar.update)
            progress.run(partial(_fetch, listing, name, storage, progress) for name in names)


def _require_space(repo: str, needed_bytes: int, folder: Path) -> None:
    free_bytes = shutil.disk_usage(folder).free
    if needed_bytes > free_bytes:
        raise DiskSpaceError(
            f"{repo}: the download needs {format_bytes(needed_bytes)}, got "
            f"{format_bytes(free_bytes)} free in {folder}; free some, or set HF_HOME to a folder "
            f"on a larger disk"
        )


def _fetch(listing: _Listing, name: str, storage: Path, progress: Progress) -> None:
    """Put a weight file into the hub's cache: its content, then the link that names it.

    huggingface_hub forgets what it has of a file when it is interrupted: it downloads to a random
    name. So the content is brought here, resumably, to the place where it then finds it.
    """
    url = listing.url(name)
    remote = huggingface_hub.get_hf_file_metadata(url)
    if remote.etag and remote.size and remote.size <= _MAX_HTTP_BYTES:
        _fetch_content(url, remote.etag, remote.size, storage, progress)
    huggingface_hub.hf_hub_download(listing.repo, name, revision=listing.commit)


def _fetch_content(url: str, etag: str, size_bytes: int, storage: Path, progress: Progress) -> None:
    content, unfinished = storage / "blobs" / etag, _unfinished(storage, etag)
    if content.exists():
        return
    content.parent.mkdir(exist_ok=True)
    resumed = num_bytes_of(unfinished) > 0
    extend(unfinished, url, size_bytes, progress)
    # A power failure may have left holes in what was there; the etag of a large file is its hash.
    if resumed and len(etag) == 64 and sha256_of(unfinished) != etag:
        _log.warning("%s: the interrupted download is damaged, starting it again", unfinished)
        unfinished.unlink()
        extend(unfinished, url, size_bytes, progress)
    unfinished.replace(content)


def _unfinished(storage: Path, etag: str) -> Path:
    return storage / "blobs" / f"{etag}.incomplete"  # `hf cache prune` knows this name


def _copy_header(listing: _Listing, name: str, folder: Path, progress: Progress) -> None:
    """Make a sparse file of the true length that begins with the true header."""
    file, url, size_bytes = folder / name, listing.url(name), listing.sizes[name]
    file.parent.mkdir(parents=True, exist_ok=True)
    extend(file, url, min(8, size_bytes), progress)
    end = 8 + int.from_bytes(file.read_bytes(), "little")
    if end <= min(size_bytes, _MAX_HEADER_BYTES):  # else the reader of headers will complain
        extend(file, url, end, progress)
    os.truncate(file, size_bytes)
