"""What huggingface_hub raises, turned into one error that says what to do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from moe_infinity.checkpoint.download import connection_errors
from moe_infinity.errors import CheckpointNotFoundError


@contextmanager
def explained(model: str | Path) -> Iterator[None]:
    """Turn what huggingface_hub raises into one error that says what to do."""
    try:
        yield
    except connection_errors() as error:
        raise CheckpointNotFoundError(f"{model}: {reason_of(error)}") from error


def reason_of(error: Exception) -> str:
    from huggingface_hub import errors

    if isinstance(error, errors.LocalEntryNotFoundError) and isinstance(error.__cause__, Exception):
        error = error.__cause__
    said = f"{type(error).__name__}: {error}".splitlines()[0]
    log_in = "log in with 'hf auth login' or set HF_TOKEN"
    if isinstance(error, errors.GatedRepoError):
        return f"the model is gated; accept its terms on its page on the hub, then {log_in}"
    if isinstance(error, errors.RevisionNotFoundError):
        return "the hub has this model but not this revision; expected a branch, tag or commit"
    if isinstance(error, errors.HFValidationError):
        return f"neither a folder here nor a possible hub id ({said})"
    if isinstance(error, errors.HfHubHTTPError):
        status = error.response.status_code
        if isinstance(error, errors.RepositoryNotFoundError) or status in (401, 404):
            return (
                f"neither a folder here nor a model on the hub that you may read; check the "
                f"spelling, and if the model is private {log_in}"
            )
        return f"the hub answered {status} ({said}); try again later"
    if isinstance(error, (OSError, ValueError)) and not isinstance(error, ConnectionError):
        return f"the download failed ({said}); solve this and run again: it goes on from there"
    return (
        f"no folder of this name here, no complete earlier download, and no connection to the hub "
        f"({said}); check it and run again: a download goes on where it stopped"
    )
