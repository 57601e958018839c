"""Bodies of OpenAI's /v1/responses, as the messages and tools that chat templates know."""

from __future__ import annotations

import json
from typing import Any, Literal

from pydantic import Field

from moe_infinity.server.bodies import Body, Items, SamplingBody
from moe_infinity.server.chat_bodies import MAX_TOP_LOGPROBS, Tools
from moe_infinity.server.grammars import Grammars
from moe_infinity.server.problems import ApiError, unsupported
from moe_infinity.server.sampling import Sampling

_TEXTS = ("input_text", "output_text", "text", "refusal", "reasoning_text", "summary_text")


class ItemPart(Body):
    type: str
    text: str | None = None
    refusal: str | None = None


class Item(Body):
    """Of the input, of any type; which ones can be read is checked when they are."""

    type: str = "message"
    role: Literal["user", "assistant", "system", "developer"] | None = None
    content: str | Items[ItemPart] | None = None
    summary: Items[ItemPart] | None = None
    call_id: str | None = None
    name: str | None = None
    arguments: str | None = None
    output: str | Items[ItemPart] | None = None


class FunctionTool(Body):
    type: str
    name: str | None = Field(None, pattern=r"^[a-zA-Z0-9_.-]{1,128}$")
    description: str | None = None
    parameters: dict[str, Any] | None = None


class NamedChoice(Body):
    type: str
    name: str | None = None


class TextFormat(Body):
    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")


class TextOptions(Body):
    format: TextFormat | None = None


class ReasoningOptions(Body):
    effort: str | None = None


class ResponseBody(SamplingBody):
    """POST /v1/responses."""

    input: str | Items[Item]
    instructions: str | None = None
    max_output_tokens: int | None = Field(None, ge=1, le=2**31)
    tools: Items[FunctionTool] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedChoice | None = None
    parallel_tool_calls: bool | None = None
    text: TextOptions | None = None
    reasoning: ReasoningOptions | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS)
    include: Items[str] | None = None
    metadata: dict[str, str] | None = Field(None, max_length=16, description="Is given back.")
    previous_response_id: str | None = None
    conversation: Any = None
    background: bool | None = None
    prompt: Any = None

    def refuse_unsupported(self) -> None:
        """Raises ApiError for what would have to be ignored."""
        if self.previous_response_id is not None:
            raise unsupported(
                "previous_response_id", "answers are not kept here; send the conversation as input"
            )
        if self.conversation is not None:
            raise unsupported("conversation", "conversations are not kept here; send it as input")
        if self.background:
            raise unsupported("background", "answers are given while the client waits")
        if self.prompt is not None:
            raise unsupported("prompt", "there are no stored prompts here")

    def tool_choices(self) -> Tools:
        """Raises ApiError for tools that would have to run here."""
        choice: Any = self.tool_choice
        if isinstance(choice, NamedChoice):
            if choice.type != "function":
                raise unsupported("tool_choice", f"got type {choice.type!r:.40}, not function")
            choice = {"name": choice.name or ""}
        return Tools([_tool(tool) for tool in self.tools or []], choice)

    def sampling(self, limit: int | None, grammar: str | None) -> Sampling:
        wants_logprobs = "message.output_text.logprobs" in (self.include or [])
        return Sampling(
            max_tokens=self.max_output_tokens or limit,
            num_logprobs=(self.top_logprobs or 0) if wants_logprobs else None,
            grammar=grammar,
            **self.common(),
        )

    @property
    def goes_on(self) -> bool:
        """Every message is complete."""
        return False

    def template_values(self) -> dict[str, Any]:
        effort = self.reasoning.effort if self.reasoning else None
        values: dict[str, Any] = {} if effort is None else {"reasoning_effort": effort}
        return values | ({"enable_thinking": False} if effort in ("none", "minimal") else {})

    def grammar(self, grammars: Grammars) -> str | None:
        """What text.format asks for. Raises ApiError for a schema that cannot be kept to."""
        wanted = self.text.format if self.text else None
        if wanted is None or wanted.type == "text":
            return None
        if wanted.type == "json_object":
            return grammars.of_schema({"type": "object"}, "text.format")
        if wanted.schema_ is None:
            raise ApiError(400, "text.format.schema: missing", "text.format.schema")
        return grammars.of_schema(wanted.schema_, "text.format.schema")

    def plain_messages(self) -> list[dict[str, Any]]:
        """For the chat template. Raises ApiError for items that are neither text nor calls."""
        found: list[dict[str, Any]] = []
        if self.instructions:
            found.append({"role": "system", "content": self.instructions})
        if isinstance(self.input, str):
            return [*found, {"role": "user", "content": self.input}]
        for number, item in enumerate(self.input):
            _add(found, item, f"input.{number}")
        if not found:
            raise ApiError(400, "input: got no item, expected at least one", "input")
        return found


def _tool(tool: FunctionTool) -> dict[str, Any]:
    if tool.type != "function" or not tool.name:
        raise unsupported("tools", f"got one of type {tool.type!r:.60}, expected named functions")
    function: dict[str, Any] = {"name": tool.name}
    if tool.description:
        function["description"] = tool.description
    function["parameters"] = tool.parameters or {"type": "object", "properties": {}}
    return {"type": "function", "function": function}


def _add(found: list[dict[str, Any]], item: Item, where: str) -> None:
    """One item; calls and reasoning belong to the assistant's message they come with."""
    if item.type == "message" and item.role is not None:
        role = "system" if item.role == "developer" else item.role
        text = _text(item.content, where)
        if role == "assistant" and found and "content" not in found[-1]:
            found[-1]["content"] = text  # its reasoning came before
        else:
            found.append({"role": role, "content": text})
    elif item.type == "function_call":
        if not found or found[-1]["role"] != "assistant":
            found.append({"role": "assistant", "content": ""})
        found[-1].setdefault("content", "")
        found[-1].setdefault("tool_calls", []).append(_call(item, where))
    elif item.type == "function_call_output":
        text = _text(item.output, where)
        found.append({"role": "tool", "tool_call_id": item.call_id or "", "content": text})
    elif item.type == "reasoning":
        found.append({"role": "assistant", "reasoning_content": _text(item.content, where)})
    else:
        raise unsupported(
            where, f"got an item of type {item.type!r:.40}, expected message, function_call, "
            f"function_call_output or reasoning",
        )  # fmt: skip


def _call(item: Item, where: str) -> dict[str, Any]:
    try:
        arguments = json.loads(item.arguments or "{}")
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"{where}.arguments: no JSON ({error})", where) from error
    function = {"name": item.name or "", "arguments": arguments}
    return {"id": item.call_id, "type": "function", "function": function}


def _text(content: str | list[ItemPart] | None, where: str) -> str:
    if not isinstance(content, list):
        return content or ""
    for part in content:
        if part.type not in _TEXTS:
            raise unsupported(
                where, f"got a part of type {part.type!r:.40}, expected text: this server reads no "
                f"images, sounds or files",
            )  # fmt: skip
    return "".join(part.text or part.refusal or "" for part in content)
