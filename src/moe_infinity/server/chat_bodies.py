"""Bodies of /v1/chat/completions and /v1/completions, and what becomes of their fields."""

from __future__ import annotations

import json
from typing import Any, Literal

from pydantic import Field

from moe_infinity.server.bodies import Body, Items, OpenAIBody
from moe_infinity.server.grammars import Grammars
from moe_infinity.server.problems import ApiError, unsupported

_NAME = r"^[a-zA-Z0-9_.-]{1,128}$"
MAX_TOP_LOGPROBS = 20


class FunctionDefinition(Body):
    name: str = Field(pattern=_NAME)
    description: str | None = None
    parameters: dict[str, Any] | None = None


class Tool(Body):
    type: Literal["function"]
    function: FunctionDefinition


class FunctionName(Body):
    name: str


class NamedToolChoice(Body):
    type: Literal["function"]
    function: FunctionName


class JsonSchema(Body):
    name: str | None = None
    schema_: dict[str, Any] = Field(alias="schema")


class ResponseFormat(Body):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class CalledFunction(Body):
    name: str
    arguments: str = "{}"


class ToolCall(Body):
    id: str | None = None
    type: Literal["function"] = "function"
    function: CalledFunction


class ContentPart(Body):
    type: str
    text: str | None = None
    refusal: str | None = None


class Message(Body):
    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | Items[ContentPart] | None = None
    name: str | None = None
    tool_calls: Items[ToolCall] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None


class ChatBody(OpenAIBody):
    """POST /v1/chat/completions."""

    messages: Items[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1, le=2**31)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS)
    tools: Items[Tool] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedToolChoice | None = None
    parallel_tool_calls: bool | None = None
    response_format: ResponseFormat | None = None
    reasoning_effort: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    functions: Any = None
    function_call: Any = None
    modalities: Items[str] | None = None
    audio: Any = None

    @property
    def limit(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    @property
    def num_logprobs(self) -> int | None:
        """Of likeliest tokens beside each chosen one. Raises ApiError where they contradict."""
        if self.top_logprobs is not None and not self.logprobs:
            raise ApiError(
                400, "top_logprobs: got a number without logprobs, expected logprobs: true",
                "top_logprobs", "invalid_value",
            )  # fmt: skip
        return (self.top_logprobs or 0) if self.logprobs else None

    def refuse_unsupported(self) -> None:
        """Raises ApiError for what would have to be ignored."""
        if self.functions or self.function_call:
            raise unsupported("functions", "give tools and tool_choice instead")
        if self.audio is not None or any(m != "text" for m in self.modalities or ()):
            raise unsupported("modalities", "this server answers with text only")

    @property
    def goes_on(self) -> bool:
        """Every message is complete."""
        return False

    def template_values(self) -> dict[str, Any]:
        """Variables of the chat template."""
        effort = self.reasoning_effort
        values: dict[str, Any] = {} if effort is None else {"reasoning_effort": effort}
        if effort in ("none", "minimal"):
            values["enable_thinking"] = False
        given = self.chat_template_kwargs or {}
        taken = {"messages", "tools", "add_generation_prompt", "tokenize", "chat_template"}
        clash = taken & given.keys()
        if clash:
            raise unsupported("chat_template_kwargs", f"{', '.join(sorted(clash))} cannot be set")
        return values | given

    def plain_messages(self) -> list[dict[str, Any]]:
        """Messages as chat templates want them. Raises ApiError for parts that are no text."""
        return [_plain(message, number) for number, message in enumerate(self.messages)]

    def grammar(self, grammars: Grammars) -> str | None:
        """What response_format asks for. Raises ApiError for a schema that cannot be kept to."""
        wanted = self.response_format
        if wanted is None or wanted.type == "text":
            return None
        if wanted.type == "json_object":
            return grammars.of_schema({"type": "object"}, "response_format")
        if wanted.json_schema is None:
            raise ApiError(
                400, "response_format.json_schema: missing, expected {\"schema\": ...}",
                "response_format.json_schema", "invalid_value",
            )  # fmt: skip
        return grammars.of_schema(wanted.json_schema.schema_, "response_format.json_schema.schema")


class CompletionBody(OpenAIBody):
    """POST /v1/completions."""

    prompt: str | Items[str] | Items[int] | Items[Items[int]]
    logprobs: int | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS)
    best_of: int | None = Field(None, ge=1)
    echo: bool | None = None
    suffix: str | None = None

    def refuse_unsupported(self) -> None:
        """Raises ApiError for what would have to be ignored."""
        if self.echo:
            raise unsupported("echo", "the prompt is not repeated; put it before the answer")
        if self.suffix:
            raise unsupported("suffix", "this server does not fill in the middle")
        if (self.best_of or 1) != (self.n or 1) and self.best_of is not None:
            raise unsupported("best_of", "every answer is returned; give n instead")

    def prompts(self) -> list[str | list[int]]:
        """One or several, as text or token ids."""
        given = self.prompt
        if isinstance(given, str):
            return [given]
        if given and isinstance(given[0], int):
            return [given]
        return list(given)  # type: ignore[arg-type]


class Tools:
    """The functions a request offers, and whether one of them has to be called."""

    def __init__(self, offered: list[dict[str, Any]], choice: Any) -> None:
        """choice: none, auto, required, or the name of one as {"name": ...}. Raises ApiError for a
        name that is not offered."""
        self.offered = [] if choice == "none" else offered
        self.is_forced = choice == "required" or isinstance(choice, dict)
        if not offered and self.is_forced:
            raise ApiError(400, "tool_choice: got a call to make without tools", "tool_choice")
        self._callable = self.offered
        if isinstance(choice, dict):
            names = [tool["function"]["name"] for tool in offered]
            self._callable = [t for t in offered if t["function"]["name"] == choice["name"]]
            if not self._callable:
                raise ApiError(
                    400, f"tool_choice: got {choice['name']!r:.80}, expected one of "
                    f"{', '.join(names)}", "tool_choice", "invalid_value",
                )  # fmt: skip

    @classmethod
    def of_chat(cls, body: ChatBody) -> Tools:
        offered = [tool.model_dump(exclude_none=True) for tool in body.tools or []]
        choice: Any = body.tool_choice
        if isinstance(choice, NamedToolChoice):
            choice = {"name": choice.function.name}
        return cls(offered, choice)

    def grammar(self, grammars: Grammars) -> str:
        """Of one call as JSON. Raises ApiError for parameters that are no usable schema."""
        functions = [tool["function"] for tool in self._callable]
        calls = [_call_schema(function) for function in functions]
        schema = calls[0] if len(calls) == 1 else {"anyOf": calls}
        given = {each["name"]: _parameters(each) for each in functions}
        return grammars.of_schema(schema | {"$defs": given}, "tools")


def _call_schema(function: dict[str, Any]) -> dict[str, Any]:
    arguments = {"$ref": f"#/$defs/{function['name']}"}
    return {
        "type": "object",
        "properties": {"name": {"const": function["name"]}, "arguments": arguments},
        "required": ["name", "arguments"],
        "additionalProperties": False,
    }


def _parameters(function: dict[str, Any]) -> dict[str, Any]:
    """Their schema as a part of a larger one."""
    given = function.get("parameters") or {}
    if given.get("type", "object") != "object":
        raise ApiError(
            400, f"tools: got parameters of {function['name']} of type {given['type']!r:.40}, "
            f"expected object", "tools", "invalid_schema",
        )  # fmt: skip
    moved: dict[str, Any] = _moved({"type": "object"} | given, f"#/$defs/{function['name']}")
    return moved


def _moved(schema: Any, to: str) -> Any:
    """References within it lead to where it is now."""
    if isinstance(schema, list):
        return [_moved(each, to) for each in schema]
    if not isinstance(schema, dict):
        return schema
    found = {key: _moved(value, to) for key, value in schema.items()}
    target = found.get("$ref")
    if isinstance(target, str) and target.startswith("#"):
        found["$ref"] = to + target[1:]
    return found


def _plain(message: Message, number: int) -> dict[str, Any]:
    role = {"developer": "system", "function": "tool"}.get(message.role, message.role)
    found: dict[str, Any] = {"role": role, "content": _text(message.content, number)}
    if message.tool_calls:
        found["tool_calls"] = [_called(call, number) for call in message.tool_calls]
    for name in ("name", "tool_call_id", "reasoning_content"):
        if getattr(message, name) is not None:
            found[name] = getattr(message, name)
    return found


def _text(content: str | list[ContentPart] | None, number: int) -> str:
    if isinstance(content, list):
        for at, part in enumerate(content):
            if part.type not in ("text", "refusal"):
                raise unsupported(
                    f"messages.{number}.content.{at}",
                    f"got a part of type {part.type!r:.40}, expected text: this server reads no "
                    f"images, sounds or files",
                )
        return "".join(part.text or part.refusal or "" for part in content)
    return content or ""


def _called(call: ToolCall, number: int) -> dict[str, Any]:
    """Templates want arguments as an object, clients send them as JSON text."""
    try:
        arguments = json.loads(call.function.arguments or "{}")
    except (ValueError, RecursionError) as error:
        raise ApiError(
            400, f"messages.{number}.tool_calls: arguments are no JSON ({error})",
            f"messages.{number}.tool_calls", "invalid_value",
        ) from error  # fmt: skip
    function = {"name": call.function.name, "arguments": arguments}
    return {"id": call.id, "type": "function", "function": function}
