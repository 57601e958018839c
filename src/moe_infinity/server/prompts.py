"""Messages and tools to token ids, by the model's chat template."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from moe_infinity.server.formats import AnswerFormat, format_of
from moe_infinity.server.problems import ApiError, too_long, unsupported

_CHARS_PER_TOKEN = 8  # more than any language's text has
_TOOL_TEXT = """You may call these functions, each described by a JSON schema:
{tools}
To call one, answer with nothing but
<tool_call>
{{"name": "its name", "arguments": {{...}}}}
</tool_call>"""


@dataclass(frozen=True)
class Prompt:
    """ids: what the model reads. begun: what they end with of the answer itself, text the model did
    not have to say."""

    ids: list[int]
    begun: str


@dataclass(frozen=True, kw_only=True)
class Rendering:
    """How messages become a prompt. says_json: "answer" or "call" where a grammar lets nothing but
    JSON through. goes_on: the last message is an answer to be continued. values: more variables of
    the template."""

    tools: list[dict[str, Any]] | None = None
    says_json: str = ""
    goes_on: bool = False
    values: dict[str, Any] | None = None


class Prompts:
    """Of one model's tokenizer."""

    def __init__(self, tokenizer: Any, max_context: int) -> None:
        self.tokenizer = tokenizer
        self.max_context = max_context
        self.format: AnswerFormat = format_of(tokenizer)

    def of_text(self, text: str, param: str) -> list[int]:
        """Token ids of plain text. Raises ApiError for none, or too many."""
        return self.checked(self._encoded(text, param), param)

    def checked(self, ids: list[int], param: str) -> list[int]:
        if not ids:
            raise ApiError(400, f"{param}: got no token, expected at least one", param)
        if len(ids) >= self.max_context:
            raise too_long(len(ids), self.max_context, param)
        return ids

    def of_messages(
        self, messages: list[dict[str, Any]], how: Rendering, param: str = "messages"
    ) -> Prompt:
        """What the chat template makes of messages. Raises ApiError where it refuses them, or where
        they are too long."""
        text, begun = self._written(messages, how, param)
        ids = self._encoded(text, param, add_special_tokens=False)
        return Prompt(self.checked(ids, param), begun)

    def count(self, messages: list[dict[str, Any]], how: Rendering, param: str = "messages") -> int:
        """Tokens of the prompt that messages are. Of a text that is far too long they are counted
        piece by piece, which may add a few for each. Raises ApiError where the template refuses."""
        text, _ = self._written(messages, how, param)
        _require_encodable(text, param)
        return sum(map(self._count, _pieces(text, self._most_chars)))

    @property
    def _most_chars(self) -> int:
        """More would not fit, whatever the text: a tokenizer takes hundreds of bytes for each
        token."""
        return _CHARS_PER_TOKEN * self.max_context

    def _count(self, text: str) -> int:
        return len(self.tokenizer(text, add_special_tokens=False, verbose=False).input_ids)

    def _written(
        self, messages: list[dict[str, Any]], how: Rendering, param: str
    ) -> tuple[str, str]:
        """The prompt's text, and what it ends with of the answer itself."""
        if not getattr(self.tokenizer, "chat_template", None):
            raise unsupported(param, "this model has no chat template; use /v1/completions")
        if how.tools and not self.format.shows_tools:
            messages = _with_tools_told(messages, how.tools)
        text = self._render(messages, how, param, adds_prompt=not how.goes_on)
        begun = "" if how.goes_on else self._begun(messages, how, param, text)
        added = self._before_json(begun, how.says_json) if how.says_json else ""
        return text + added, begun + added

    def _encoded(self, text: str, param: str, **options: Any) -> list[int]:
        """Token ids. Of a text that is far too long only the beginning is counted."""
        _require_encodable(text, param)
        if len(text) > self._most_chars:
            count = self._count(text[: self._most_chars])
            if count > self.max_context:
                raise too_long(count, self.max_context, param, is_all=False)
        return list(self.tokenizer(text, verbose=False, **options).input_ids)

    def _begun(self, messages: list[dict[str, Any]], how: Rendering, param: str, text: str) -> str:
        """What the template adds for the model to go on from."""
        without = self._render(messages, how, param, adds_prompt=False)
        return text[len(without) :] if text.startswith(without) else ""

    def _before_json(self, begun: str, says_json: str) -> str:
        """A grammar leaves no room for reasoning: one that was begun is ended."""
        is_thinking = begun.rfind("<think>") > begun.rfind("</think>")
        prefix = {"answer": self.format.answer_prefix, "call": self.format.call_prefix}[says_json]
        return ("\n</think>\n\n" if is_thinking else "") + prefix

    def _render(
        self, messages: list[dict[str, Any]], how: Rendering, param: str, adds_prompt: bool
    ) -> str:
        try:
            text: str = self.tokenizer.apply_chat_template(
                messages,
                tools=how.tools if self.format.shows_tools else None,
                add_generation_prompt=adds_prompt,
                continue_final_message=how.goes_on,
                tokenize=False,
                **(how.values or {}),
            )
        except Exception as error:  # templates compute with whatever values they are given
            roles = ", ".join(str(message.get("role")) for message in messages)
            raise ApiError(
                400, f"{param}: the model's chat template refuses messages of {roles:.200} "
                f"({error})", param, "invalid_messages",
            ) from error  # fmt: skip
        return text


def _pieces(text: str, most_chars: int) -> Iterator[str]:
    """Cut in front of a space, where there is one."""
    start = 0
    while start < len(text):
        end = start + most_chars
        if end < len(text):
            space = text.rfind(" ", start + 1, end)
            end = space if space > 0 else end
        yield text[start:end]
        start = end


def _with_tools_told(
    messages: list[dict[str, Any]], tools: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """For templates that know no tools: a system message describes them, calls become text."""
    described = "\n".join(json.dumps(tool.get("function", tool)) for tool in tools)
    told = _TOOL_TEXT.format(tools=described)
    if messages and messages[0]["role"] == "system":
        first = messages[0] | {"content": f"{messages[0]['content']}\n\n{told}"}
        rest = messages[1:]
    else:
        first, rest = {"role": "system", "content": told}, messages
    return [first, *map(_calls_as_text, rest)]


def _calls_as_text(message: dict[str, Any]) -> dict[str, Any]:
    calls = message.get("tool_calls") or []
    texts = [f"<tool_call>\n{json.dumps(call['function'])}\n</tool_call>" for call in calls]
    said = "\n".join(filter(None, [message.get("content") or "", *texts]))
    return {"role": message["role"], "content": said}


def _require_encodable(text: str, param: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ApiError(
            400, f"{param}: got a lone surrogate ({error.reason}), expected text", param
        ) from error
