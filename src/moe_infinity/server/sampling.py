"""How tokens are chosen: a request's wishes as what transformers' ``generate`` takes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import LogitsProcessor, RepetitionPenaltyLogitsProcessor

from moe_infinity.server.grammars import GrammarProcessor, Grammars

# Below it the likeliest token is certain in float32 anyway, and dividing by it may overflow.
_GREEDY_BELOW = 1e-4


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """What a request says about it; None: as the model's generation_config.json says.

    num_logprobs: how many of the likeliest tokens to report beside the chosen one, None: no
    logprobs at all. stop: texts that end the answer, not part of it. cache_prompt: what a kept KV
    cache holds of the prompt is not computed again. grammar: of what ``Grammars`` makes; the answer
    keeps to it.
    """

    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float | None = None
    logit_bias: tuple[tuple[int, float], ...] = ()
    num_logprobs: int | None = None
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    cache_prompt: bool = True
    grammar: str | None = None

    @property
    def goes_on(self) -> bool:
        """Whether an end token is a token like any other. A grammar knows when it is complete."""
        return self.ignore_eos and self.grammar is None

    def options(self, defaults: Any) -> dict[str, Any]:
        """Arguments of ``generate``. defaults: the model's generation config."""
        chosen: dict[str, Any] = {"num_beams": 1, "num_return_sequences": 1}
        chosen["repetition_penalty"] = 1.0  # one of ours
        if self.goes_on:
            chosen["eos_token_id"] = None
        own = defaults.do_sample and defaults.temperature
        temperature = self.temperature if self.temperature is not None else float(own or 1.0)
        if temperature < _GREEDY_BELOW:
            return chosen | {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        chosen |= {"do_sample": True, "temperature": temperature}
        chosen |= {"top_k": 0, "top_p": 1.0} if not defaults.do_sample else {}
        for name in ("top_p", "top_k", "min_p"):
            if getattr(self, name) is not None:
                chosen[name] = getattr(self, name)
        return chosen

    def processors(
        self, prompt_length: int, grammars: Grammars, defaults: Any
    ) -> list[LogitsProcessor]:
        """What changes the model's scores before the library's temperature and cuts. defaults: the
        model's generation config."""
        found: list[LogitsProcessor] = []
        repetition = self.repetition_penalty or defaults.repetition_penalty or 1.0
        if repetition != 1.0:  # the library's own would come before any of ours
            found.append(RepetitionPenaltyLogitsProcessor(float(repetition)))
        if self.logit_bias:
            found.append(BiasProcessor(self.logit_bias))
        if self.presence_penalty or self.frequency_penalty:
            found.append(
                PenaltyProcessor(self.presence_penalty, self.frequency_penalty, prompt_length)
            )
        if self.grammar is not None:
            found.append(GrammarProcessor(grammars.matcher(self.grammar), prompt_length))
        return found


class BiasProcessor(LogitsProcessor):  # type: ignore[misc]
    """OpenAI's logit_bias: added to the scores of single tokens."""

    def __init__(self, bias: tuple[tuple[int, float], ...]) -> None:
        self._ids = torch.tensor([token for token, _ in bias])
        self._bias = torch.tensor([value for _, value in bias], dtype=torch.float32)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        where, bias = self._ids.to(scores.device), self._bias.to(scores)
        return scores.index_add(-1, where, bias.expand(scores.shape[0], -1))


class PenaltyProcessor(LogitsProcessor):  # type: ignore[misc]
    """OpenAI's penalties: tokens of the answer so far lose ``presence`` once, and ``frequency`` as
    often as they were said. The prompt's tokens lose nothing."""

    def __init__(self, presence: float, frequency: float, prompt_length: int) -> None:
        self._presence, self._frequency = presence, frequency
        self._prompt_length = prompt_length

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        said = input_ids[0, self._prompt_length :]
        if not len(said):
            return scores
        counts = torch.bincount(said, minlength=scores.shape[-1]).to(scores)
        return scores - self._frequency * counts - self._presence * (counts > 0)
