"""Text as a model says it, apart into answer, reasoning and tool calls, while it comes."""

from __future__ import annotations

import json
import re
import uuid
from dataclasses import dataclass
from typing import Any

from transformers.utils.chat_parsing import ResponseParser

_NAME = re.compile(
    r'\s*\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"(?:arguments|parameters)"\s*:\s*'
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
            None if response is None else ResponseParser(response, prefix=prefix, tools=tools)
        )
        self._calls = _Calls()
        self._raw = ""  # of the open call

    @property
    def num_calls(self) -> int:
        return self._calls.number

    def feed(self, text: str) -> list[Part]:
        """What the text adds."""
        if self._parser is None:
            return [Content(text)] if text else []
        try:
            return self._parts(self._parser.feed(text))
        except (ValueError, KeyError) as error:  # a call that is no JSON, or lacks what it needs
            return self._give_up(error)

    def end(self) -> list[Part]:
        """What was held back, when no more text comes."""
        if self._parser is None:
            return []
        try:
            return self._parts(self._parser.finalize()[1])
        except (ValueError, KeyError) as error:
            return self._give_up(error)

    def _give_up(self, error: Exception) -> list[Part]:
        self._parser = None
        raw, self._raw = self._raw, ""
        return [Content(raw)] if raw and not self._calls.is_open else []

    def _parts(self, events: list[dict[str, Any]]) -> list[Part]:
        found: list[Part] = []
        for event in events:
            kind, field = event["type"], event["field"]
            if field == "tool_calls":
                found += self._call_parts(kind, event)
            elif kind == "region_chunk" and event["text"]:
                is_said = field == "content"
                found.append((Content if is_said else Reasoning)(event["text"]))
        return found

    def _call_parts(self, kind: str, event: dict[str, Any]) -> list[Part]:
        if kind == "region_chunk":
            self._raw += event["text"]
            return self._calls.feed(event["text"])
        if kind == "region_close":
            self._raw = ""
            return self._calls.close(event["value"])
        self._calls.begin()
        return []


class ForcedCall:
    """Reads an answer that is one call as JSON and nothing else, as its grammar made sure."""

    def __init__(self) -> None:
        self._calls = _Calls()
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

    def __init__(self) -> None:
        self.number = 0  # of calls that were told
        self.is_open = False  # a call was told, and its arguments may go on
        self._text = ""
        self._end = _ValueEnd()

    def begin(self) -> None:
        self._text, self._end, self.is_open = "", _ValueEnd(), False

    def feed(self, text: str) -> list[Part]:
        if self.is_open:
            return self._more(text)
        self._text += text
        match = _NAME.match(self._text)
        if match is None:
            return []
        self.is_open = True
        call = self._told(json.loads(match[1]))
        return [call, *self._more(self._text[match.end() :])]

    def close(self, value: Any) -> list[Part]:
        """value: of one call, or a list of them, as the format's transform made it."""
        if self.is_open:
            self.is_open = False
            return []
        found: list[Part] = []
        for each in value if isinstance(value, list) else [value]:
            function = each["function"]
            given = function.get("arguments", function.get("parameters", {}))
            found.append(self._told(str(function["name"])))
            text = given if isinstance(given, str) else json.dumps(given, ensure_ascii=False)
            found.append(Arguments(self.number - 1, text))
        return found

    def _told(self, name: str) -> Call:
        self.number += 1
        return Call(self.number - 1, f"call_{uuid.uuid4().hex[:24]}", name)

    def _more(self, text: str) -> list[Part]:
        text = self._end.cut(text)
        return [Arguments(self.number - 1, text)] if text else []


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
