"""What every endpoint of one server shares: the model, its queue, its words, its numbers."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Hashable
from typing import Any

from starlette.requests import Request

from moe_infinity.engine import MoE
from moe_infinity.server.exchange import Exchange
from moe_infinity.server.jobs import Job, TokenLogprob
from moe_infinity.server.live_view import LiveView
from moe_infinity.server.metrics import Metrics
from moe_infinity.server.parts import AnswerParser, ForcedCall
from moe_infinity.server.problems import ApiError
from moe_infinity.server.prompts import Prompts
from moe_infinity.server.sampling import Sampling
from moe_infinity.server.settings import ServeConfig
from moe_infinity.server.worker import Worker

_NO_CHANCE = -9999.0  # JSON knows no infinity


class Service:
    """Made by whoever opened the model; ``close`` ends the computing thread, not the model."""

    def __init__(self, moe: MoE, config: ServeConfig, name: str) -> None:
        self.moe = moe
        self.config = config
        self.name = name
        self.created = int(time.time())
        self.metrics = Metrics()
        self.worker = Worker(moe, config.max_waiting)
        self.metrics.watch(self.worker)
        self.prompts = Prompts(moe.tokenizer, moe.plan.max_context)
        self.live = LiveView(name, self.worker, self.metrics)
        self.num_ids = moe.model.get_input_embeddings().num_embeddings

    @property
    def grammars(self) -> Any:
        return self.worker.grammars

    def require_model(self, asked: str | None) -> None:
        """Raises ApiError for a name this model does not go by."""
        names = {self.name, *self.config.names}
        if asked is not None and asked not in names and "*" not in names:
            raise ApiError(
                404,
                f"model: got {asked!r:.200}, expected {' or '.join(sorted(names))}",
                "model",
                "model_not_found",
            )

    def exchange(
        self,
        name: str,
        request: Request,
        prompts: list[list[int]],
        sampling: Sampling,
        parsers: list[AnswerParser | ForcedCall],
        lone_call: bool = False,
    ) -> Exchange:
        """A request for each of the prompts as many answers as there are parsers for it."""
        job = Job(
            f"{_ID_PREFIX.get(name, 'req-')}{uuid.uuid4().hex[:24]}",
            client_of(request),
            prompts,
            sampling,
            len(parsers) // len(prompts),
            keeps_special=self.prompts.format.keeps_special and name != "completions",
        )
        return Exchange(name, self.worker, job, parsers, self.metrics, lone_call)

    def token_text(self, token: int) -> tuple[str, list[int]]:
        """A token's text, and its bytes, which may be a part of a character."""
        try:
            raw = self.grammars.tokens.decode_bytes([token])
        except ApiError:  # a tokenizer that is not a fast one
            raw = self.moe.tokenizer.decode([token]).encode()
        return raw.decode(errors="replace"), list(raw)

    def logprob(self, found: TokenLogprob) -> dict[str, Any]:
        """As chat completions and responses show it."""
        top = [self._logprob(token, value) for token, value in found.top]
        return self._logprob(found.token, found.logprob) | {"top_logprobs": top}

    def _logprob(self, token: int, value: float) -> dict[str, Any]:
        text, raw = self.token_text(token)
        return {"token": text, "logprob": max(value, _NO_CHANCE), "bytes": raw}

    def close(self) -> None:
        self.worker.close(0)


_ID_PREFIX = {"chat": "chatcmpl-", "completions": "cmpl-", "responses": "resp_", "messages": "msg_"}


def client_of(request: Request) -> Hashable:
    """Whose turn it is: by key and address."""
    host = request.client.host if request.client else ""
    return request.headers.get("authorization") or request.headers.get("x-api-key") or "", host


async def in_thread(function: Any, *args: Any) -> Any:
    """Long texts take the tokenizer a while; other requests go on meanwhile."""
    return await asyncio.to_thread(function, *args)
