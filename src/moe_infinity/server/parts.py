"""Text as a model says it, apart into answer, reasoning and tool calls, while it comes."""

from __future__ import annotations

import json
import re
import uuid
from dataclasses import dataclass
from typing import Any

from transformers.utils.chat_parsing import ResponseParser

from moe_infinity.server.formats import MARKS, REST

_NAME = re.compile(
    r'\s*\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\{)'
)


@dataclass(frozen=True, slots=True)
class Content:
    text: str


@dataclass(frozen=True, slots=True)
class Reasoning:
    text: str


@dataclass(frozen=True, slots=True)
class Call:
    """A tool call begins; ``number`` counts those of an answer."""

    number: int
    id: str
    name: str


@dataclass(frozen=True, slots=True)
class Arguments:
    """More of a call's arguments, as JSON text."""

    number: int
    text: str


Part = Content | Reasoning | Call | Arguments


class AnswerParser:
    """Reads one answer by its format. What does not keep to it is handed on as content."""

    def __init__(
        self, response: dict[str, Any] | None, prefix: str, tools: list[dict[str, Any]] | None
    ) -> None:
        """response: see AnswerFormat. prefix: what the chat template began the answer with."""
        self._parser = (
            None if response is None else _Forgiving(response, prefix=prefix, tools=tools)
        )
        fields = {} if response is None else response["fields"]
        call = fields.get("tool_calls", {}).get("transform")
        self._calls = _Calls(is_whole=isinstance(call, dict) and call["function"] == "{content}")

    @property
    def num_calls(self) -> int:
        return self._calls.number

    def feed(self, text: str) -> list[Part]:
        """What the text adds."""
        if self._parser is None:
            return [Content(text)] if text else []
        return self._parts(self._parser.feed(text))

    def end(self) -> list[Part]:
        """What was held back, when no more text comes."""
        return [] if self._parser is None else self._parts(self._parser.finalize()[1])

    def _parts(self, events: list[dict[str, Any]]) -> list[Part]:
        found: list[Part] = []
        for event in events:
            kind, field = event["type"], event["field"]
            if field == "tool_calls":
                found += self._call_parts(kind, event)
            elif kind == "region_chunk" and field != MARKS:
                is_said = field in ("content", REST)
                found.append((Content if is_said else Reasoning)(event["text"]))
        return found

    def _call_parts(self, kind: str, event: dict[str, Any]) -> list[Part]:
        if kind == "region_chunk":
            return self._calls.feed(event["text"])
        if kind == "region_close":
            return self._calls.close(event["value"], event["raw"])
        self._calls.begin()
        return []


class _Forgiving(ResponseParser):  # type: ignore[misc]
    """Where the content of a region is not what its format says, the closing event has no value.

    ``raw`` of closing events: the region as it was said, its marks included.
    """

    _opened_at = 0

    def _open_explicit(self, events: list[dict[str, Any]], field: str, match: Any) -> None:
        self._opened_at = match.start()
        super()._open_explicit(events, field, match)

    def _close_current(self, events: list[dict[str, Any]]) -> None:
        number, field = len(events), self._current
        try:
            super()._close_current(events)
        except Exception:  # whatever parsers say of whatever models say
            events.append({"type": "region_close", "field": field, "value": None})
            self._reset_to_implicit()
        for event in events[number:]:
            event["raw"] = self._buffer[self._opened_at : self._pos]


class ForcedCall:
    """Reads an answer that is one call as JSON and nothing else, as its grammar made sure."""

    def __init__(self) -> None:
        self._calls = _Calls(is_whole=True)
        self._calls.begin()

    @property
    def num_calls(self) -> int:
        return self._calls.number

    def feed(self, text: str) -> list[Part]:
        return self._calls.feed(text)

    def end(self) -> list[Part]:
        return []


class _Calls:
    """Calls of one answer. Those that are JSON objects of name and arguments are told as they
    come, others when they are complete."""

    def __init__(self, is_whole: bool) -> None:
        """is_whole: what is read of a call is such an object."""
        self.number = 0  # of calls that were told
        self._is_whole = is_whole
        self._is_open = False  # a call was told, and its arguments may go on
        self._text = ""
        self._end = _ValueEnd()

    def begin(self) -> None:
        self._text, self._end, self._is_open = "", _ValueEnd(), False

    def feed(self, text: str) -> list[Part]:
        if self._is_open:
            return self._more(text)
        self._text += text
        match = _NAME.match(self._text) if self._is_whole else None
        name = None if match is None else _decoded(match[1])
        if match is None or name is None:
            return []
        self._is_open = True
        return [self._told(name), *self._more(self._text[match.end() :])]

    def close(self, value: Any, raw: str) -> list[Part]:
        """value: of one call, or a list of them, as the format's transform made it; anything else
        is no call, and ``raw`` is what was said."""
        if self._is_open:
            self._is_open = False
            return []
        functions = [_function(each) for each in (value if isinstance(value, list) else [value])]
        if not all(functions):
            return [Content(raw)]
        found: list[Part] = []
        for name, arguments in filter(None, functions):
            found += [self._told(name), Arguments(self.number - 1, arguments)]
        return found

    def _told(self, name: str) -> Call:
        self.number += 1
        return Call(self.number - 1, f"call_{uuid.uuid4().hex[:24]}", name)

    def _more(self, text: str) -> list[Part]:
        text = self._end.cut(text)
        return [Arguments(self.number - 1, text)] if text else []


def _decoded(quoted: str) -> str | None:
    try:
        return str(json.loads(quoted))
    except ValueError:  # an escape that JSON does not know
        return None


def _function(call: Any) -> tuple[str, str] | None:
    """Its name, and its arguments as JSON text; None of what is no call."""
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        return None
    given = function.get("arguments", function.get("parameters", {}))
    if isinstance(given, dict):
        given = json.dumps(given, ensure_ascii=False)
    return (function["name"], given) if isinstance(given, str) else None


class _ValueEnd:
    """Finds where a JSON object ends that is read piece by piece."""

    def __init__(self) -> None:
        self._depth = 0
        self._in_string = self._is_escaped = self._is_over = False

    def cut(self, text: str) -> str:
        """As much of the next piece as belongs to the object."""
        if self._is_over:
            return ""
        if self._depth == 0:
            text = text.lstrip()  # between the colon and the object
        for at, char in enumerate(text):
            self._step(char)
            if self._is_over:
                return text[: at + 1]
        return text

    def _step(self, char: str) -> None:
        if self._in_string:
            if self._is_escaped:
                self._is_escaped = False
            elif char == "\\":
                self._is_escaped = True
            elif char == '"':
                self._in_string = False
        elif char == '"':
            self._in_string = True
        elif char in "{[":
            self._depth += 1
        elif char in "}]":
            self._depth -= 1
            self._is_over = self._depth <= 0
