"""Where the text of an answer ends: stop strings (also across token borders) and the border between thinking and
answer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..arguments import describe
from ..errors import ArgumentError

THINK_END = "</think>"


def check_stop(stop: Any) -> tuple[str, ...]:
    """The `stop` argument (None, a string, or several) as a tuple of strings. Raises ArgumentError."""
    if stop is None:
        return ()
    if isinstance(stop, str):
        stop = (stop,)
    if not isinstance(stop, Sequence) or not all(isinstance(s, str) for s in stop):
        raise ArgumentError(f"stop: expected a string or a list of strings, found {describe(stop)}")
    if not all(stop):
        raise ArgumentError("stop: an empty string would stop at once; leave it out")
    return tuple(stop)


class StopStrings:
    """Finds the first stop string in a text that arrives in pieces.

    `push` returns the text that can no longer become part of a stop string. What could (the longest suffix that is a
    proper prefix of a stop string) is held back until the next push or `flush`. After a match `found` is the stop
    string, the text before it has been returned, and `rest` is the text after it.
    """

    def __init__(self, strings: Sequence[str]) -> None:
        self._strings = tuple(strings)
        self._held = ""
        self.found: str | None = None
        self.rest = ""

    def push(self, text: str) -> str:
        """The text that became certain with `text`; ValueError after a stop string was found."""
        if self.found is not None:
            raise ValueError("text was pushed after a stop string was found")
        if not self._strings:
            return text
        text = self._held + text
        # the earliest match wins, then the longest: "</s>" before "<" when both begin at the same place
        matches = [(at, -len(s), s) for s in self._strings if (at := text.find(s)) >= 0]
        if matches:
            at, _, self.found = min(matches)
            self._held, self.rest = "", text[at + len(self.found) :]
            return text[:at]
        keep = max(self._overlap(text, s) for s in self._strings)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    @staticmethod
    def _overlap(text: str, stop: str) -> int:
        """Length of the longest suffix of `text` that is a proper prefix of `stop`."""
        for n in range(min(len(stop) - 1, len(text)), 0, -1):
            if text.endswith(stop[:n]):
                return n
        return 0

    def flush(self) -> str:
        """What was held back, when no more text will come."""
        held, self._held = self._held, ""
        return held


class ReasoningSplit:
    """Splits a text that begins inside thinking at `</think>`, piece by piece.

    `push` and `flush` return (reasoning, answer). The line breaks around the tag belong to the chat template, not to
    either part: trailing ones of the reasoning are held back until something follows, leading ones of the answer are
    dropped.
    """

    def __init__(self, thinking: bool) -> None:
        self.thinking = thinking
        self._tag = StopStrings([THINK_END])
        self._breaks = ""
        self._answer_begun = not thinking

    def push(self, text: str) -> tuple[str, str]:
        """(reasoning, answer) that became certain with `text`."""
        if not self.thinking:
            return "", self._answer(text)
        reasoning = self._breaks + self._tag.push(text)
        self._breaks = ""
        if self._tag.found is not None:
            self.thinking = False
            return reasoning.rstrip("\n"), self._answer(self._tag.rest)
        kept = reasoning.rstrip("\n")
        self._breaks = reasoning[len(kept) :]
        return kept, ""

    def _answer(self, text: str) -> str:
        if not self._answer_begun:
            text = text.lstrip("\n")
            self._answer_begun = bool(text)
        return text

    def flush(self) -> tuple[str, str]:
        """What was held back, when no more text will come."""
        reasoning = self._breaks + self._tag.flush() if self.thinking else ""
        self._breaks = ""
        return reasoning.rstrip("\n"), ""
