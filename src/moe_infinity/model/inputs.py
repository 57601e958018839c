"""What a caller hands in: token ids and their shape, the context they take, the tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from moe_infinity.errors import CheckpointNotFoundError, ConfigError

_TOKENIZER_FILES = ("tokenizer*", "vocab*", "*.model", "*.tiktoken", "merges.txt")


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


def num_rows(defaults: Any, ids: torch.Tensor, options: Any) -> int:
    """Rows that generating computes at once: every beam, every sequence to return.

    options: the other arguments of ``generate``; defaults: the model's generation config.
    """
    config = options.get("generation_config") or defaults
    names = ("num_beams", "num_return_sequences")
    return ids.shape[0] * max(options.get(n) or getattr(config, n, None) or 1 for n in names)


def tokens_left(ids: torch.Tensor, cache: Any) -> int:
    """Tokens of the prompt that the KV cache does not hold yet, the last one at least."""
    return max(1, ids.shape[1] - (cache.get_seq_length() if cache is not None else 0))


def load_tokenizer(path: Path) -> Any:
    """The checkpoint's tokenizer. Raises CheckpointNotFoundError if it has none to load."""
    import transformers

    # Without any file the library makes up an empty tokenizer of the model's type.
    if not any(file for pattern in _TOKENIZER_FILES for file in path.glob(pattern)):
        raise CheckpointNotFoundError(
            f"{path}: has no tokenizer, expected files such as tokenizer.json; pass token ids "
            f"instead"
        )
    try:
        return transformers.AutoTokenizer.from_pretrained(path)
    except Exception as error:  # tokenizers raises bare Exceptions
        reason = " ".join(str(error).split()) or type(error).__name__
        raise CheckpointNotFoundError(
            f"{path}: has no tokenizer that can be loaded ({reason[:200]}); pass token ids instead"
        ) from error
