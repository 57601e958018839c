"""What a caller hands in: token ids and their shape, the context they take, the tokenizer."""

from __future__ import annotations

from collections.abc import Callable
from numbers import Integral
from typing import Any

import torch

from moe_infinity.checkpoint.base import Checkpoint
from moe_infinity.errors import CheckpointNotFoundError, ConfigError
from moe_infinity.model.cache_name import CACHE, name_cache
from moe_infinity.model.gguf_tokenizer import gguf_tokenizer


def as_batch(input_ids: Any, num_ids: int | None = None) -> torch.Tensor:
    """[rows, length] int64 of a tensor or nested list of token ids; one row may come flat.

    num_ids: how many the model knows. Raises ConfigError for anything else.
    """
    try:
        ids = torch.as_tensor(input_ids)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConfigError(
            f"input_ids: got {input_ids!r:.80}, expected rows of token ids of one length "
            f"({error}); pad shorter ones on the left and pass attention_mask"
        ) from error
    ids = ids[None] if ids.dim() == 1 else ids
    if ids.dim() != 2 or not ids.numel():
        raise ConfigError(f"input_ids: got shape {list(ids.shape)}, expected [rows, length]")
    if ids.is_floating_point() or ids.is_complex():
        raise ConfigError(f"input_ids: got {ids.dtype} numbers, expected whole ones")
    ids = ids.long()
    if num_ids is not None and not 0 <= int(ids.min()) <= int(ids.max()) < num_ids:
        raise ConfigError(
            f"input_ids: got {int(ids.min())} to {int(ids.max())}, expected 0 to {num_ids - 1}"
        )
    return ids


def placed(given: Any, device: torch.device) -> Any:
    """What was given, its tensors, in lists and tables too, on the device the model computes on."""
    if isinstance(given, torch.Tensor):
        return given.to(device)
    if type(given) is dict:
        return {name: placed(value, device) for name, value in given.items()}
    if type(given) in (list, tuple):
        return type(given)(placed(value, device) for value in given)
    return given


def may_be_padded(defaults: Any, ids: torch.Tensor) -> bool:
    """Whether the library has to infer what is padding. defaults: the generation config."""
    pad = defaults.pad_token_id
    return pad is not None and bool((ids == pad).any())


def take_cache(defaults: Any, options: dict[str, Any], new: Callable[[], Any]) -> Any:
    """The cache that ``generate`` is to run with, by its name among the options; a new one, of the
    plan, where none is given and the library is to make none. Returns it, or None."""
    name_cache(options)
    if CACHE not in options and _wants_our_cache(defaults, options):
        options[CACHE] = new()
    return options.get(CACHE)


def _wants_our_cache(defaults: Any, options: Any) -> bool:
    """Both at once would be wrong."""
    config = options.get("generation_config") or defaults
    uses_cache = options.get("use_cache", getattr(config, "use_cache", True))
    named = options.get("cache_implementation") or getattr(config, "cache_implementation", None)
    return uses_cache is not False and named is None


def context_tokens(config: Any, ids: torch.Tensor, max_new_tokens: int, options: Any) -> int:
    """Tokens of context that generating takes; encoder and decoder have a context each.

    options: the other arguments of ``generate``; ``decoder_input_ids`` may start the decoder's.
    """
    if not isinstance(max_new_tokens, Integral) or max_new_tokens < 1:
        raise ConfigError(
            f"max_new_tokens: got {max_new_tokens!r}, expected a whole number of at least 1"
        )
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
    """Tokens of the prompt that the KV cache does not hold yet. Raises ConfigError if there are
    none: the library would take them all for new ones, or fail where nobody understands it."""
    num_held = cache.get_seq_length() if cache is not None else 0
    if num_held >= ids.shape[1]:
        raise ConfigError(
            f"input_ids: got {ids.shape[1]} tokens, expected more than the {num_held} that "
            f"past_key_values holds; pass all tokens of the conversation so far, or a new cache"
        )
    return int(ids.shape[1]) - int(num_held)


def load_tokenizer(checkpoint: Checkpoint) -> Any:
    """The checkpoint's tokenizer. Raises CheckpointNotFoundError if it has none to load."""
    import transformers

    path = checkpoint.path
    values = checkpoint.tokenizer_values
    if not checkpoint.has_tokenizer and path.is_file():
        raise CheckpointNotFoundError(
            f"{path}: has no tokenizer in its metadata, expected tokenizer.ggml.*; put it into a "
            f"folder with a tokenizer.json and name that, or pass token ids (run --ids)"
        )
    # Without any file the library makes up an empty tokenizer of the model's type.
    if not checkpoint.has_tokenizer:
        raise CheckpointNotFoundError(
            f"{path}: has no tokenizer, expected files such as tokenizer.json; pass token ids "
            f"instead (run --ids)"
        )
    try:
        if values is not None:
            return gguf_tokenizer(values)
        return transformers.AutoTokenizer.from_pretrained(path)
    except Exception as error:  # tokenizers raises bare Exceptions
        reason = " ".join(str(error).split()) or type(error).__name__
        raise CheckpointNotFoundError(
            f"{path}: has no tokenizer that can be loaded ({reason[:200]}); pass token ids instead"
        ) from error
