"""Token ids to text as they come: whole characters only, and nothing behind a stop text."""

from __future__ import annotations

from typing import Any

_UNFINISHED = "\N{REPLACEMENT CHARACTER}"  # of a character whose other bytes are in later tokens
_CHARACTER_BYTES = 4  # of UTF-8's longest ones


class AnswerText:
    """The text of one answer. ``stopped``: a stop text was said; what follows it is not wanted."""

    def __init__(self, tokenizer: Any, stop: tuple[str, ...], keeps_special: bool) -> None:
        """keeps_special: special tokens are text too, for whoever reads a format of them."""
        self._tokenizer = tokenizer
        self._stop = stop
        self._skips = not keeps_special
        self._ids: list[int] = []
        self._start = 0  # from here on tokens are decoded again, for what is before them matters
        self._read = 0  # tokens whose text was taken
        self._held = ""  # text that may be the beginning of a stop text
        self.stop: str | None = None  # the stop text that was said

    @property
    def stopped(self) -> bool:
        return self.stop is not None

    @property
    def may_stop(self) -> bool:
        """Whether there are stop texts: then every token's text has to be looked at."""
        return bool(self._stop)

    def add(self, token: int) -> None:
        """A token whose text is not needed yet: the next one's is both's."""
        self._ids.append(token)

    def put(self, token: int) -> str:
        """What the token, and those added before it, let be said."""
        self._ids.append(token)
        before = self._decode(self._ids[self._start : self._read])
        text = self._decode(self._ids[self._start :])
        read = len(self._ids)
        if text.endswith(_UNFINISHED):
            read, text = self._finished(text)
        if len(text) <= len(before):
            return ""
        self._start, self._read = self._read, read
        return self._admit(text[len(before) :])

    def end(self) -> str:
        """What is left when no more tokens come."""
        before = self._decode(self._ids[self._start : self._read])
        rest = self._decode(self._ids[self._start :])[len(before) :]
        said = self._admit(rest)
        return said if self.stopped else said + self._held

    def _finished(self, text: str) -> tuple[int, str]:
        """Tokens whose text stays as it is, and that text: more bytes than a character has cannot
        all belong to the last one."""
        if len(self._ids) - self._read <= _CHARACTER_BYTES:
            return self._read, ""
        for read in range(len(self._ids) - 1, self._read, -1):
            shorter = self._decode(self._ids[self._start : read])
            if text.startswith(shorter) and len(shorter) < len(text):
                return read, shorter
        return self._read, ""

    def _decode(self, ids: list[int]) -> str:
        text: str = self._tokenizer.decode(
            ids, skip_special_tokens=self._skips, clean_up_tokenization_spaces=False
        )
        return text

    def _admit(self, text: str) -> str:
        if not self._stop:
            return text
        text = self._held + text
        found = [(text.find(stop), stop) for stop in self._stop if stop in text]
        if found:
            (at, self.stop), self._held = min(found), ""
            return text[:at]
        held = max(_overlap(text, stop) for stop in self._stop)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]


def _overlap(text: str, stop: str) -> int:
    """Characters at the end of text that begin the stop text."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
