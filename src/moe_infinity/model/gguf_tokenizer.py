"""A GGUF file's tokenizer, by transformers' own conversion."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import transformers

_SPECIAL = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}


def gguf_tokenizer(values: Mapping[str, Any]) -> Any:
    """values: a file's own. Raises whatever the library does for a kind that it cannot build."""
    from tokenizers.processors import TemplateProcessing
    from transformers.integrations.gguf import GGUF_TOKENIZER_MAPPING, convert_gguf_tokenizer

    words = GGUF_TOKENIZER_MAPPING["tokenizer"]
    described = {
        name: _plain(values[f"tokenizer.{key}"])
        for key, name in words.items()
        if f"tokenizer.{key}" in values
    }
    backend, _ = convert_gguf_tokenizer(values["general.architecture"], described)
    tokens, key = values["tokenizer.ggml.tokens"], "tokenizer.ggml.{}_token_id"
    special = {
        f"{ours}_token": tokens[values[key.format(theirs)]]
        for ours, theirs in _SPECIAL.items()
        if values.get(key.format(theirs)) is not None
    }
    is_spm = values.get("tokenizer.ggml.model") == "llama"
    bos = special.get("bos_token")
    if bos is not None and values.get("tokenizer.ggml.add_bos_token", is_spm):
        backend.post_processor = TemplateProcessing(
            single=f"{bos} $A",
            pair=f"{bos} $A {bos}:1 $B:1",
            special_tokens=[(bos, values["tokenizer.ggml.bos_token_id"])],
        )
    found = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **special)
    found.chat_template = values.get("tokenizer.chat_template")
    return found


def _plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, np.ndarray) else value
