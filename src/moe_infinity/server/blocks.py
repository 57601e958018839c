"""Parts of an answer as blocks in a row, for APIs that announce where each begins and ends."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from moe_infinity.server.parts import Arguments, Call, Content, Part

Event = dict[str, Any]


class Blocks(ABC):
    """Reasoning, text and calls: one is open at a time; a part of another kind ends it."""

    def __init__(self) -> None:
        self._open: object = None

    def add(self, part: Part) -> list[Event]:
        """What is to be told of a part."""
        kind = part.number if isinstance(part, (Call, Arguments)) else type(part)
        events = []
        if kind != self._open:
            events += self.finish()
            self._open = kind
            events += self.begin(part)
        if not isinstance(part, Call) and part.text:
            events += self.more(part.text)
        return events

    def finish(self) -> list[Event]:
        """The open block ends, if there is one."""
        if self._open is None:
            return []
        self._open = None
        return self.end()

    @abstractmethod
    def begin(self, part: Part) -> list[Event]:
        """A block of this part's kind begins; its text is told by ``more``."""

    @abstractmethod
    def more(self, text: str) -> list[Event]:
        """Text, reasoning or arguments of the open block."""

    @abstractmethod
    def end(self) -> list[Event]:
        """The open block is complete."""


def kind_of(part: Part) -> str:
    """call, text or reasoning."""
    if isinstance(part, (Call, Arguments)):
        return "call"
    return "text" if isinstance(part, Content) else "reasoning"
