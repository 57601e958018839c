"""How models mark reasoning and tool calls in what they say, by what their chat template writes.

Templates here are transformers' response templates; a tokenizer that brings one along is believed.
"""

# ruff: noqa: RUF001 - DeepSeek writes its marks with such bars

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

_THINK = {
    "open_pattern": r"<think>\s*",
    "close_pattern": r"\s*</think>\s*",
    "content": "text",
    "repeats": True,
    "join": "",
}
_MISTRAL_THINK = _THINK | {
    "open_pattern": r"\[THINK\]\s*",
    "close_pattern": r"\s*\[/THINK\]\s*",
}
_CALL = {"repeats": True}
MARKS = "marks"  # a field that nobody is told of
REST = "rest"  # a field of what is in no other, where content has marks itself
_NAMED = {"type": "function", "function": {"name": "{name}", "arguments": "{content}"}}
_WHOLE = {"type": "function", "function": "{content}"}


@dataclass(frozen=True)
class AnswerFormat:
    """response: for transformers' ResponseParser, None: everything is the answer. keeps_special:
    its marks are special tokens. answer_prefix: what has to be said before an answer that is
    nothing but JSON. call_prefix: the same before a forced call as JSON. shows_tools: the chat
    template can tell the model of tools."""

    name: str
    response: dict[str, Any] | None
    keeps_special: bool = False
    answer_prefix: str = ""
    call_prefix: str = ""
    shows_tools: bool = True

    def reading(self, with_calls: bool) -> dict[str, Any] | None:
        """The response template for an answer; where no tools were offered, calls are content."""
        if self.response is None or with_calls or self.name == "harmony":
            return self.response
        fields = {
            k: v for k, v in self.response["fields"].items() if k not in ("tool_calls", MARKS)
        }
        return self.response | {"fields": fields}


def format_of(tokenizer: Any) -> AnswerFormat:
    """The format of what a model with this tokenizer says."""
    template = getattr(tokenizer, "chat_template", None) or ""
    template = template if isinstance(template, str) else "".join(map(str, template.values()))
    own = getattr(tokenizer, "response_template", None)
    if own:
        return AnswerFormat("own", own, keeps_special=True, shows_tools="tools" in template)
    for mark, found in _BY_MARK:
        if mark in template:
            return found
    return _PLAIN


def _response(
    call: dict[str, Any], think: dict[str, Any] = _THINK, marks: str | None = None
) -> dict[str, Any]:
    """marks: what stands around calls, and is no part of the answer."""
    fields = {
        "reasoning_content": think,
        "tool_calls": _CALL | call,
        "content": {"content": "text"},
    }
    if marks is not None:
        fields[MARKS] = {"open_pattern": marks, "close_pattern": r"(?s)(?=.)", "content": "text"}
        fields[MARKS] |= {"repeats": True}
    # The parser is shown only what the template wrote of the answer.
    return {"start_anchor": "\0", "fields": fields}


_HERMES_CALL = {
    "open_pattern": r"\s*<tool_call>",
    "close": "</tool_call>",
    "content": "json",
    "transform": _WHOLE,
}
_HERMES = AnswerFormat(
    "hermes", _response(_HERMES_CALL), keeps_special=True, call_prefix="<tool_call>\n"
)
# No tools in the template: they are told in a system message, and special tokens hold no marks.
_PLAIN = AnswerFormat(
    "plain", _response(_HERMES_CALL), call_prefix="<tool_call>\n", shows_tools=False
)
_QWEN_XML = AnswerFormat(
    "qwen_xml",
    _response(
        {
            "open_pattern": r"\s*<tool_call>\s*<function=(?P<name>[^>\n]+)>",
            "close_pattern": r"</function>\s*</tool_call>",
            "content": "xml-inline",
            "content_args": {
                "tag_pattern": r"<parameter=(?P<key>[^>\n]+)>\n?(?P<value>.*?)\n?</parameter>"
            },
            "transform": _NAMED,
        }
    ),
    keeps_special=True,
)
_GLM = AnswerFormat(
    "glm",
    _response(
        {
            "open_pattern": r"\s*<tool_call>(?P<name>[^\s<]+)\s*",
            "close": "</tool_call>",
            "content": "xml-inline",
            "content_args": {
                "tag_pattern": r"<arg_key>(?P<key>.*?)</arg_key>\s*"
                r"<arg_value>(?P<value>.*?)</arg_value>"
            },
            "transform": _NAMED,
        }
    ),
    keeps_special=True,
)
_DEEPSEEK = AnswerFormat(
    "deepseek",
    _response(
        {
            "open_pattern": r"\s*(?:<｜tool▁calls▁begin｜>)?\s*<｜tool▁call▁begin｜>"
            r"(?:function<｜tool▁sep｜>(?P<name>[^\n<]+)\n```json\n"
            r"|(?!function<｜tool▁sep｜>)(?P<name>[^\n<]+)<｜tool▁sep｜>)",
            "close_pattern": r"(?:\n```)?\s*<｜tool▁call▁end｜>",
            "content": "json",
            "transform": _NAMED,
        },
        marks=r"\s*<｜tool▁calls▁end｜>\s*",
    ),
    keeps_special=True,
)
_MISTRAL_ARGS = AnswerFormat(
    "mistral_args",
    _response(
        {
            "open_pattern": r"\s*\[TOOL_CALLS\](?P<name>[\w.-]+)(?:\[CALL_ID\]\w+)?\[ARGS\]",
            "close_pattern": r"(?=\[TOOL_CALLS\])",
            "content": "json",
            "transform": _NAMED,
        },
        _MISTRAL_THINK,
    ),
    keeps_special=True,
)
_MISTRAL = AnswerFormat(
    "mistral",
    _response(
        {
            "open_pattern": r"\s*\[TOOL_CALLS\]\s*",
            "content": "json",
            "transform": {
                "type": "function",
                "function": {"name": "{name}", "arguments": "{arguments}"},
            },
            "transform_each": True,
        },
        _MISTRAL_THINK,
    ),
    keeps_special=True,
)
_HARMONY = AnswerFormat(
    "harmony",
    {
        "start_anchor": "\0",
        "fields": {
            "reasoning_content": {
                "open_pattern": r"(?:<\|start\|>assistant)?<\|channel\|>analysis<\|message\|>",
                "close_pattern": r"<\|end\|>|<\|return\|>",
                "content": "text",
                "repeats": True,
                "join": "\n",
            },
            "tool_calls": _CALL
            | {
                "open_pattern": r"(?:<\|start\|>assistant)?"
                r"(?:<\|channel\|>(?:commentary|analysis))?"
                r"\s*to=functions\.(?P<name>[\w.-]+)\s*(?:<\|channel\|>(?:commentary|analysis))?"
                r"\s*(?:<\|constrain\|>)?(?:json)?\s*<\|message\|>",
                "close_pattern": r"<\|call\|>|<\|end\|>|<\|return\|>",
                "content": "json",
                "transform": _NAMED,
            },
            "content": {
                "open_pattern": r"(?:<\|start\|>assistant)?<\|channel\|>(?:final|commentary)"
                r"\s*(?:<\|constrain\|>\w+)?<\|message\|>",
                "close_pattern": r"<\|end\|>|<\|return\|>",
                "content": "text",
                "repeats": True,
                "join": "\n",
            },
            REST: {"content": "text"},
        },
    },
    keeps_special=True,
    answer_prefix="<|channel|>final<|message|>",
    call_prefix="<|channel|>final<|message|>",
)
# The first mark that a template holds tells its format: the more special ones come first.
_BY_MARK = (
    ("<|channel|>", _HARMONY),
    ("<｜tool▁call▁begin｜>", _DEEPSEEK),
    ("<arg_key>", _GLM),
    ("<function=", _QWEN_XML),
    ("<tool_call>", _HERMES),
    ("[ARGS]", _MISTRAL_ARGS),
    ("[TOOL_CALLS]", _MISTRAL),
)
