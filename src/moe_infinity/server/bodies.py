"""What requests have in common, checked: bodies as OpenAI's and Anthropic's clients send them.

Unknown fields are let in. Values that this server cannot honour are refused where they are read.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from moe_infinity.server.problems import ApiError
from moe_infinity.server.sampling import Sampling

_MAX_CHOICES = 32
_MAX_STOPS = 16
_SEEDS = 2**63
# pydantic puts the name of a union's member into the path of what is wrong: str, list[Tool]...
_UNION_PART = re.compile(
    r"(str|int|float|bool)$|(list|dict|literal|constrained|function|fail)\W|[A-Z]"
)

Model = TypeVar("Model", bound=BaseModel)
Item = TypeVar("Item")
Items = Annotated[
    list[Item], Field(fail_fast=True)
]  # a million wrong ones cost no more than the first
StopText = Annotated[str, Field(min_length=1, max_length=1000)]


class Body(BaseModel):
    """Numbers are numbers, texts are texts; nothing is converted."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)


class StreamOptions(Body):
    include_usage: bool | None = None


class SamplingBody(Body):
    """The fields that say how tokens are chosen, alike in all of OpenAI's generating endpoints."""

    model: str | None = None
    stream: bool | None = None
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, ge=0, le=1)
    top_k: int | None = Field(None, ge=-1, le=2**31, description="-1 and 0: all tokens.")
    min_p: float | None = Field(None, ge=0, le=1)
    seed: int | None = Field(None, ge=-_SEEDS, lt=_SEEDS)
    ignore_eos: bool | None = None
    cache_prompt: bool | None = Field(
        None, description="false: the prompt is computed anew, whatever is kept of it."
    )

    def common(self) -> dict[str, Any]:
        """What these fields are in a ``Sampling``."""
        return {
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": None if self.top_k is None else max(0, self.top_k),
            "min_p": self.min_p,
            "seed": None if self.seed is None else self.seed % _SEEDS,
            "ignore_eos": bool(self.ignore_eos),
            "cache_prompt": self.cache_prompt is not False,
        }


class OpenAIBody(SamplingBody):
    """What chat and plain completions share."""

    stream_options: StreamOptions | None = None
    stop: StopText | Items[StopText] | None = Field(None, max_length=_MAX_STOPS)
    max_tokens: int | None = Field(None, ge=1, le=2**31)
    n: int | None = Field(None, ge=1, le=_MAX_CHOICES)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    repetition_penalty: float | None = Field(None, ge=0.01, le=10)
    logit_bias: dict[str, float] | None = None
    return_progress: bool | None = Field(
        None, description="Streamed chunks say how much of the prompt was read (prompt_progress)."
    )

    @field_validator("stop", mode="before")
    @classmethod
    def _one_stop_is_a_list(cls, stop: Any) -> Any:
        return [stop] if isinstance(stop, str) else stop

    @field_validator("logit_bias", mode="before")
    @classmethod
    def _first_wrong_bias(cls, bias: Any) -> Any:
        for token, value in bias.items() if isinstance(bias, dict) else ():
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise ValueError(f"token {token!r:.40} has a bias that is no number")
        return bias

    @property
    def wants_usage(self) -> bool:
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    def sampling(
        self,
        num_ids: int,
        default_max_tokens: int | None,
        num_logprobs: int | None,
        grammar: str | None = None,
    ) -> Sampling:
        """num_ids: how many tokens the model knows. Raises ApiError for a bias on another."""
        stop = self.stop or []
        return Sampling(
            max_tokens=self.limit or default_max_tokens,
            presence_penalty=self.presence_penalty or 0.0,
            frequency_penalty=self.frequency_penalty or 0.0,
            repetition_penalty=self.repetition_penalty,
            logit_bias=_bias(self.logit_bias or {}, num_ids),
            num_logprobs=num_logprobs,
            stop=(stop,) if isinstance(stop, str) else tuple(stop),
            grammar=grammar,
            **self.common(),
        )

    @property
    def limit(self) -> int | None:
        """Tokens an answer may have."""
        return self.max_tokens


def read(model: type[Model], raw: bytes) -> Model:
    """The body of a request. Raises ApiError that names the first field that is wrong."""
    try:
        return model.model_validate_json(raw)
    except ValidationError as error:
        found = error.errors(include_url=False, include_context=False)
        if found[0]["type"] == "json_invalid":
            raise ApiError(400, f"body: {found[0]['msg']}", None, "invalid_json") from error
        where, wrong = _nearest(found)
        got = f", got {wrong['input']!r:.80}" if wrong["type"] != "missing" else ""
        message = f"{where or 'body'}: {wrong['msg']}{got}"
        raise ApiError(400, _printable(message), where or None, "invalid_value") from error


def _nearest(found: list[Any]) -> tuple[str, Any]:
    """The first error and where it is. Of a value of several types there is one for each: the
    deepest is of the type that was meant."""
    places = [tuple(p for p in map(str, e["loc"]) if not _UNION_PART.match(p)) for e in found]
    same = [n for n, place in enumerate(places) if place[: len(places[0])] == places[0]]
    number = max(same, key=lambda n: len(places[n]))
    return ".".join(places[number]), found[number]


def _bias(given: dict[str, float], num_ids: int) -> tuple[tuple[int, float], ...]:
    found = []
    for text, value in given.items():
        token = int(text) if text.isascii() and text.isdigit() and len(text) < 10 else -1
        if not 0 <= token < num_ids:
            raise ApiError(
                400, f"logit_bias: got token {text!r:.40}, expected 0 to {num_ids - 1}",
                "logit_bias", "invalid_value",
            )  # fmt: skip
        if not -100 <= value <= 100:
            raise ApiError(
                400, f"logit_bias: got {value} for token {token}, expected -100 to 100",
                "logit_bias", "invalid_value",
            )  # fmt: skip
        found.append((token, value))
    return tuple(found)


def _printable(text: str) -> str:
    return text.encode(errors="replace").decode()
