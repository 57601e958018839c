"""Errors as clients of OpenAI's and Anthropic's APIs expect them, and what ours become."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from moe_infinity.errors import (
    CancelledError,
    ConfigError,
    MoEInfinityError,
    PlanExceededError,
)

_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "timeout_error",
    413: "request_too_large",
    415: "invalid_request_error",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}


@dataclass
class ApiError(Exception):
    """A request that is answered with an error. param: the field that is to blame."""

    status: int
    message: str
    param: str | None = None
    code: str | None = None
    retry_after_s: int | None = None

    def __str__(self) -> str:
        return self.message

    @property
    def type(self) -> str:
        return _TYPES.get(self.status, "server_error" if self.status >= 500 else _TYPES[400])

    @property
    def headers(self) -> dict[str, str]:
        found = {} if self.retry_after_s is None else {"retry-after": str(self.retry_after_s)}
        return found | ({"www-authenticate": "Bearer"} if self.status == 401 else {})

    def openai(self) -> dict[str, Any]:
        """The body that OpenAI's clients read."""
        fields = {"message": self.message, "type": self.type, "param": self.param}
        return {"error": fields | {"code": self.code}}

    def anthropic(self) -> dict[str, Any]:
        """The body that Anthropic's clients read."""
        kind = "api_error" if self.type == "server_error" else self.type
        return {"type": "error", "error": {"type": kind, "message": self.message}}


def unsupported(param: str, why: str) -> ApiError:
    """A value that OpenAI's API knows and this server does not."""
    return ApiError(400, f"{param}: {why}", param, "unsupported_value")


def too_long(num_tokens: int, max_context: int, param: str, is_all: bool = True) -> ApiError:
    """is_all: they are all that were given, not as many as were counted."""
    got = f"{'' if is_all else 'more than '}{num_tokens}"
    return ApiError(
        400,
        f"{param}: got {got} tokens, expected fewer than the {max_context} that this server "
        f"has planned memory for; shorten it, or start the server with a larger --max-context",
        param,
        "context_length_exceeded",
    )


def of_engine(error: Exception) -> ApiError:
    """What the engine failed with. Its own errors explain themselves; of others the log says more
    than a client should know."""
    name = type(error).__name__
    if isinstance(error, PlanExceededError):
        return ApiError(400, str(error), None, "context_length_exceeded")
    if isinstance(error, CancelledError):
        return ApiError(503, "the request was cancelled", None, "cancelled")
    if isinstance(error, ConfigError):
        return ApiError(400, str(error), None, name)
    if isinstance(error, MoEInfinityError):
        return ApiError(500, f"{name}: {error}", None, name)
    return ApiError(500, f"{name}: the server failed; its log says why", None, name)
