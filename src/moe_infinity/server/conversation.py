"""What endpoints of conversations do alike: messages and tools to a prompt, then its parser."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

from moe_infinity.server.chat_bodies import Tools
from moe_infinity.server.grammars import Grammars
from moe_infinity.server.parts import AnswerParser, ForcedCall
from moe_infinity.server.prompts import Prompt, Rendering
from moe_infinity.server.service import Service, in_thread


class ConversationBody(Protocol):
    """A request's body. goes_on: its last message begins the answer."""

    def plain_messages(self) -> list[dict[str, Any]]: ...
    def template_values(self) -> dict[str, Any]: ...
    def grammar(self, grammars: Grammars) -> str | None: ...
    @property
    def goes_on(self) -> bool: ...


class Prepared(NamedTuple):
    """prompt: what the model reads; grammar: what lets through what it may say."""

    prompt: Prompt
    grammar: str | None

    @classmethod
    async def of(
        cls, service: Service, body: ConversationBody, tools: Tools, param: str = "messages"
    ) -> Prepared:
        """Raises ApiError for what the template, the grammar library or the plan refuses; param:
        the field with the messages."""
        ready: Prepared = await in_thread(cls._of, service, body, tools, param)
        return ready

    @classmethod
    def _of(cls, service: Service, body: ConversationBody, tools: Tools, param: str) -> Prepared:
        how, grammar = rendering_of(service, body, tools)
        return cls(service.prompts.of_messages(body.plain_messages(), how, param), grammar)

    def parser(self, service: Service, tools: Tools) -> AnswerParser | ForcedCall:
        """For one answer to this prompt."""
        if tools.is_forced:
            return ForcedCall()
        offered = tools.offered
        with_calls = bool(offered)
        response = None if self.grammar else service.prompts.format.reading(with_calls=with_calls)
        return AnswerParser(response, self.prompt.begun, offered)


def rendering_of(
    service: Service, body: ConversationBody, tools: Tools
) -> tuple[Rendering, str | None]:
    """How the body's messages become a prompt, and the grammar of the answer."""
    forced = tools.grammar(service.grammars) if tools.is_forced else None
    grammar = forced or body.grammar(service.grammars)
    how = Rendering(
        tools=tools.offered or None,
        says_json="call" if forced else "answer" if grammar else "",
        goes_on=body.goes_on and grammar is None,
        values=body.template_values(),
    )
    return how, grammar
