"""Answers that keep to a JSON schema: llguidance says which tokens may come next."""

from __future__ import annotations

import json
import threading
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from llguidance import LLMatcher, LLTokenizer
from llguidance.hf import from_tokenizer
from llguidance.numpy import allocate_token_bitmask, fill_next_token_bitmask
from transformers import LogitsProcessor

from moe_infinity.server.problems import ApiError

# A model in doubt says white space for ever where a grammar lets it, and tokens are dear here.
_JSON: Any = {"whitespace_pattern": " ?"}


class Grammars:
    """Grammars over one model's tokens.

    vocab_size: as many scores as the model gives, which may be more than there are tokens.
    """

    def __init__(self, tokenizer: Any, vocab_size: int, eos_ids: list[int]) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._eos_ids = eos_ids
        self._making = threading.Lock()
        self._made: LLTokenizer | ApiError | None = None

    @property
    def tokens(self) -> LLTokenizer:
        """Made once, when first asked for: it takes about a second, and memory, for a large
        vocabulary.

        Raises ApiError where the model's tokenizer is of a kind that cannot be read.
        """
        self.prepare()
        if isinstance(self._made, ApiError):
            raise replace(self._made)  # one that was raised before would keep growing
        assert self._made is not None
        return self._made

    def prepare(self) -> None:
        """Make ``tokens``, or find that it cannot be."""
        with self._making:
            if self._made is None:
                self._made = self._make()

    def _make(self) -> LLTokenizer | ApiError:
        try:
            return from_tokenizer(self._tokenizer, self._vocab_size, eos_token=self._eos_ids)
        except Exception as error:  # a Rust library's own
            return ApiError(
                400,
                f"this model's tokenizer cannot be constrained ({error}); ask without "
                f"response_format, and without a tool_choice that forces a call",
                "response_format",
                "unsupported_value",
            )

    def of_schema(self, schema: dict[str, Any], param: str) -> str:
        """The grammar of a JSON schema. Raises ApiError for one that cannot be kept to."""
        try:
            grammar = LLMatcher.grammar_from_json_schema(json.dumps(schema), overrides=_JSON)
            problem = LLMatcher.validate_grammar(grammar, self.tokens)
        except (ValueError, RecursionError) as error:
            problem = str(error)
        if problem:
            raise ApiError(
                400, f"{param}: got a schema that cannot be kept to: {problem:.500}", param,
                "invalid_schema",
            )  # fmt: skip
        return grammar

    def matcher(self, grammar: str) -> LLMatcher:
        return LLMatcher(self.tokens, grammar)


class GrammarProcessor(LogitsProcessor):  # type: ignore[misc]
    """Leaves only tokens that may come next; the end, where the answer is complete."""

    def __init__(self, matcher: LLMatcher, prompt_length: int) -> None:
        self._matcher = matcher
        self._num_seen = prompt_length

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        for token in input_ids[0, self._num_seen :].tolist():
            self._matcher.consume_token(token)
        self._num_seen = input_ids.shape[1]
        mask = allocate_token_bitmask(1, scores.shape[-1])
        fill_next_token_bitmask(self._matcher, mask)
        if self._matcher.is_error():
            raise ValueError(self._matcher.get_error())
        bits = np.unpackbits(mask.view(np.uint8), bitorder="little")[: scores.shape[-1]]
        allowed = torch.from_numpy(bits.astype(bool)).to(scores.device)
        return scores.masked_fill(~allowed, -torch.inf)
