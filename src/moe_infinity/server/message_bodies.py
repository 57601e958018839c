"""Bodies of Anthropic's /v1/messages, as the messages and tools that chat templates know."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from moe_infinity.server.bodies import Body, Items, StopText
from moe_infinity.server.chat_bodies import Tools
from moe_infinity.server.grammars import Grammars
from moe_infinity.server.problems import unsupported
from moe_infinity.server.sampling import Sampling

_NAME = r"^[a-zA-Z0-9_.-]{1,128}$"


class Block(Body):
    """Part of a message, of any type; which ones can be read is checked when they are."""

    type: str
    text: str | None = None
    thinking: str | None = None
    id: str | None = None
    name: str | None = None
    input: dict[str, Any] | None = None
    tool_use_id: str | None = None
    content: str | Items[Block] | None = None


class Turn(Body):
    role: Literal["user", "assistant", "system"]
    content: str | Items[Block]


class ToolDefinition(Body):
    name: str = Field(pattern=_NAME)
    type: str | None = None
    description: str | None = None
    input_schema: dict[str, Any] | None = None


class ToolChoice(Body):
    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class Thinking(Body):
    type: Literal["enabled", "disabled", "adaptive"]


class CountBody(Body):
    """POST /v1/messages/count_tokens."""

    model: str | None = None
    messages: Items[Turn] = Field(min_length=1)
    system: str | Items[Block] | None = None
    tools: Items[ToolDefinition] | None = None
    tool_choice: ToolChoice | None = None
    thinking: Thinking | None = None

    def tool_choices(self) -> Tools:
        """Raises ApiError for tools that would have to run here."""
        choice = self.tool_choice
        wanted: Any = {"any": "required", "none": "none"}.get(choice.type) if choice else None
        if choice is not None and choice.type == "tool":
            wanted = {"name": choice.name or ""}
        return Tools([_tool(tool) for tool in self.tools or []], wanted)

    def plain_messages(self) -> list[dict[str, Any]]:
        """For the chat template. Raises ApiError for blocks that are neither text nor tools."""
        found: list[dict[str, Any]] = []
        if self.system:
            found.append({"role": "system", "content": _text(self.system, "system")})
        for number, turn in enumerate(self.messages):
            found += _messages(turn, f"messages.{number}.content")
        return found

    def template_values(self) -> dict[str, Any]:
        """Variables of the chat template."""
        return (
            {} if self.thinking is None else {"enable_thinking": self.thinking.type != "disabled"}
        )

    def grammar(self, grammars: Grammars) -> str | None:
        """This API asks for no form of the answer."""
        return None

    @property
    def goes_on(self) -> bool:
        """Whether the last message begins the answer."""
        return self.messages[-1].role == "assistant"


class MessagesBody(CountBody):
    """POST /v1/messages."""

    max_tokens: int = Field(ge=1, le=2**31)
    stream: bool | None = None
    stop_sequences: Items[StopText] | None = Field(None, max_length=16)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, ge=0, le=1)
    top_k: int | None = Field(None, ge=-1, le=2**31)

    def sampling(self, grammar: str | None) -> Sampling:
        return Sampling(
            max_tokens=self.max_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=None if self.top_k is None else max(0, self.top_k),
            stop=tuple(self.stop_sequences or ()),
            grammar=grammar,
        )


def _tool(tool: ToolDefinition) -> dict[str, Any]:
    if tool.type not in (None, "custom"):
        raise unsupported("tools", f"got one of type {tool.type!r:.60}, which this server lacks")
    function: dict[str, Any] = {"name": tool.name}
    if tool.description:
        function["description"] = tool.description
    function["parameters"] = tool.input_schema or {"type": "object", "properties": {}}
    return {"type": "function", "function": function}


def _messages(turn: Turn, where: str) -> list[dict[str, Any]]:
    """One turn: results of tools are messages of their own, before what else it says."""
    if isinstance(turn.content, str):
        return [{"role": turn.role, "content": turn.content}]
    results = [
        {
            "role": "tool",
            "tool_call_id": block.tool_use_id or "",
            "content": _text(block.content or "", where),
        }
        for block in turn.content
        if block.type == "tool_result"
    ]
    rest = [block for block in turn.content if block.type != "tool_result"]
    return results + ([_message(turn.role, rest, where)] if rest or not results else [])


def _message(role: str, blocks: list[Block], where: str) -> dict[str, Any]:
    said = [b for b in blocks if b.type not in ("tool_use", "thinking", "redacted_thinking")]
    found: dict[str, Any] = {"role": role, "content": _text(said, where)}
    calls = [block for block in blocks if block.type == "tool_use"]
    if calls:
        found["tool_calls"] = [
            {
                "id": call.id,
                "type": "function",
                "function": {"name": call.name or "", "arguments": call.input or {}},
            }
            for call in calls
        ]
    thoughts = "".join(block.thinking or "" for block in blocks if block.type == "thinking")
    return found | ({"reasoning_content": thoughts} if thoughts else {})


def _text(content: str | list[Block], where: str) -> str:
    if isinstance(content, str):
        return content
    for block in content:
        if block.type != "text":
            raise unsupported(
                where, f"got a block of type {block.type!r:.40}, expected text: this server reads "
                f"no images or documents",
            )  # fmt: skip
    return "".join(block.text or "" for block in content)
