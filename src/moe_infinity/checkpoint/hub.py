"""From what the user named to a folder on disk: a path, or a hub id that is downloaded first.

Knows files, sizes and the hub's protocol (through huggingface_hub); nothing about tensors.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
from functools import partial
from pathlib import Path

import huggingface_hub  # loads its parts on first use: commands that need no hub do not pay

from moe_infinity.checkpoint.download import Progress, extend, num_bytes_of, sha256_of
from moe_infinity.checkpoint.hub_errors import explained
from moe_infinity.checkpoint.hub_names import (
    INDEX,
    Listing,
    ask,
    downloaded_before,
    local_model,
    parse_id,
    weight_files,
)
from moe_infinity.config import format_bytes
from moe_infinity.errors import DiskSpaceError

_log = logging.getLogger(__name__)

_SMALL_FILE = re.compile(
    r"[^/]+\.(json|jinja|model|tiktoken|txt)|tokenizer[^/]*|additional_chat_templates/[^/]+\.jinja"
)
_DESCRIPTION = ("config.json", "generation_config.json", INDEX)
_MAX_HEADER_BYTES = 100_000_000  # the safetensors format's own limit
_MAX_HTTP_BYTES = 50_000_000_000  # the hub serves larger files by its own protocol only


# ---- what others call ------------------------------------------------------------------------


def bundled_model_path() -> Path:
    """Folder of the small trained Qwen3-MoE that ships with the package."""
    return Path(__file__).resolve().parent.parent / "bundled"


def resolve(model: str | Path) -> Path:
    """The checkpoint's folder; ``org/name`` or ``org/name@revision`` is downloaded first.

    Downloads go to the hub's own cache and go on where an earlier one stopped. When the hub
    cannot be reached, a complete earlier download is used as it is.

    Raises CheckpointNotFoundError for what is neither a folder nor a model on the hub that can
    be reached and read, DiskSpaceError before a download that would not fit.
    """
    local = local_model(model)
    if local is not None:
        return local
    with explained(model):
        found = ask(*parse_id(model))
        return found if isinstance(found, Path) else _download(found)


def headers_only(model: str, folder: Path) -> Path:
    """A folder that describes a hub model without its weights: config, index, tensor headers.

    Its weight files have their true header and length but no data: they are sparse, a few KB on
    disk. Returns ``folder``; or, when the hub cannot be reached, that of a complete earlier
    download. Raises as ``resolve`` does.
    """
    with explained(model):
        found = ask(*parse_id(model))
        if isinstance(found, Path):
            return found
        _describe(found, folder)
    return folder


def unless_downloaded(model: str | Path, folder: Path) -> Path | Listing:
    """The folder of a model that is here, or was downloaded before as a whole; else what the hub
    lists, and in ``folder``, which is made, its description (see headers_only) and tokenizer."""
    local = local_model(model)
    if local is not None:
        return local
    with explained(model):
        found = ask(*parse_id(model))
        if isinstance(found, Path):
            return found
        complete = downloaded_before(found.repo, found.commit)
        if complete is not None:
            return complete
        folder.mkdir(parents=True, exist_ok=True)
        _describe(found, folder)
        huggingface_hub.snapshot_download(
            found.repo, revision=found.commit, allow_patterns=_small(found), local_dir=folder
        )
    return found


# ---- downloads -------------------------------------------------------------------------------


def _download(listing: Listing) -> Path:
    """What is small by huggingface_hub alone, then the weights, each linked when it is whole."""
    snapshot = huggingface_hub.snapshot_download(
        listing.repo, revision=listing.revision, allow_patterns=_small(listing)
    )
    folder = Path(snapshot)
    names = weight_files(listing, folder)
    if not all((folder / name).exists() for name in names):
        _download_weights(listing, names, folder)
    return folder


def _small(listing: Listing) -> list[str]:
    return [name for name in listing.sizes if _SMALL_FILE.fullmatch(name)]


def _download_weights(listing: Listing, names: list[str], folder: Path) -> None:
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


def _fetch(listing: Listing, name: str, storage: Path, progress: Progress) -> None:
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


def _copy_header(listing: Listing, name: str, folder: Path, progress: Progress) -> None:
    """Make a sparse file of the true length that begins with the true header."""
    file, url, size_bytes = folder / name, listing.url(name), listing.sizes[name]
    file.parent.mkdir(parents=True, exist_ok=True)
    extend(file, url, min(8, size_bytes), progress)
    end = 8 + int.from_bytes(file.read_bytes(), "little")
    if end <= min(size_bytes, _MAX_HEADER_BYTES):  # else the reader of headers will complain
        extend(file, url, end, progress)
    os.truncate(file, size_bytes)


def _describe(listing: Listing, folder: Path) -> None:
    """Config, index and sparse weight files with their headers."""
    progress = Progress()
    for name in _DESCRIPTION:
        if name in listing.sizes:
            extend(folder / name, listing.url(name), listing.sizes[name], progress)
    names = weight_files(listing, folder)
    progress.run(partial(_copy_header, listing, name, folder, progress) for name in names)
