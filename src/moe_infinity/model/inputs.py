"""What a caller hands in: token ids and their shape, the context they take, the tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from moe_infinity.errors import CheckpointNotFoundError, ConfigError


def as_batch(input_ids: Any) -> torch.Tensor:
    """[rows, length] int64 of a tensor or nested list of token ids; one row may come flat."""
    ids = torch.as_tensor(input_ids, dtype=torch.long)
    ids = ids[None] if ids.dim() == 1 else ids
    if ids.dim() != 2 or not ids.numel():
        raise ConfigError(f"input_ids: got shape {list(ids.shape)}, expected [rows, length]")
    return ids


def context_tokens(config: Any, ids: torch.Tensor, max_new_tokens: int, options: Any) -> int:
    """Tokens of context that generating takes; encoder and decoder have a context each.

    options: the other arguments of ``generate``; ``decoder_input_ids`` may start the decoder's.
    """
    if not config.is_encoder_decoder:
        return ids.shape[1] + max_new_tokens
    start = options.get("decoder_input_ids")
    num_start = 1 if start is None else as_batch(start).shape[1]
    return max(ids.shape[1], num_start + max_new_tokens)


def load_tokenizer(path: Path) -> Any:
    """The checkpoint's tokenizer. Raises CheckpointNotFoundError if it has none to load."""
    import transformers

    try:
        return transformers.AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointNotFoundError(
            f"{path}: has no tokenizer that can be loaded "
            f"({str(error).strip().splitlines()[0][:120]}); pass token ids instead"
        ) from error
