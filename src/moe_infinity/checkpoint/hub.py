"""From what the user named to a folder on disk: a path, or a hub id that is downloaded first."""

from __future__ import annotations

import re
from pathlib import Path

from moe_infinity.errors import CheckpointNotFoundError

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_WANTED = ["*.json", "*.safetensors", "*.jinja", "tokenizer*", "*.model", "*.txt"]
_HEADERS_ONLY = ["*.json", "*.jinja", "tokenizer*"]


def bundled_model_path() -> Path:
    """Folder of the small trained Qwen3-MoE that ships with the package."""
    return Path(__file__).resolve().parent.parent / "bundled"


def resolve(model: str | Path) -> Path:
    """The checkpoint's folder; a hub id is downloaded (resuming) into the hub's own cache.

    Raises CheckpointNotFoundError for what is neither a folder nor a reachable hub id.
    """
    path = Path(model).expanduser()
    if path.exists():
        return path
    if not _HUB_ID.fullmatch(str(model)):
        raise CheckpointNotFoundError(
            f"{model}: got neither an existing folder nor a hub id, expected a checkpoint's folder "
            f"or an id such as Qwen/Qwen3-30B-A3B"
        )
    return _download(str(model))


def _download(model: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    try:
        return Path(snapshot_download(model, allow_patterns=_WANTED))
    except (HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError) as error:
        raise CheckpointNotFoundError(
            f"{model}: no such folder here, and as a hub id it cannot be downloaded "
            f"({str(error).strip().splitlines()[0]}); check the name, the connection, and the "
            f"token if the model is gated"
        ) from error


def is_hub_id(model: str | Path) -> bool:
    """Whether this is no path here but has the form of a hub id."""
    return not Path(model).expanduser().exists() and bool(_HUB_ID.fullmatch(str(model)))


def headers_only(model: str, folder: Path) -> Path:
    raise NotImplementedError
