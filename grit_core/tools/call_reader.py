"""Reads calls out of an answer while it grows."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum, auto
from string import ascii_letters, digits
from typing import Final

from grit_core.tools.call_format import ID_MARK, NAME_PATTERN, CallFormat, pattern
from grit_core.tools.definitions import WrittenCall

_NAME_CHARACTERS: Final = f"{ascii_letters}{digits}_-"


@dataclass(frozen=True, slots=True)
class CallPiece:
    """More of one call."""

    index: int
    """Of the call in its answer, from 0."""
    name: str
    arguments: str
    """What is new; empty in a call's first piece."""


class _State(Enum):
    TEXT = auto()
    NAME = auto()
    ARGUMENTS = auto()
    AFTER = auto()
    END = auto()


class CallReader:
    """Splits one answer into its text and its calls.

    The pieces of text, joined, are `text`; those of a call are its arguments. A marker that is
    not whole yet, and white space before it, are held back.
    """

    def __init__(
        self, call_format: CallFormat, *, forced: bool, only_at_start: bool = False
    ) -> None:
        """Begin an answer.

        Args:
            call_format: How calls are written.
            forced: Whether the answer begins with a call, as its grammar demands.
            only_at_start: Whether an answer that does not begin with a call has none: one that is
                held to a schema may hold whatever begins a call in its texts.
        """
        self._format = call_format
        self._at_start = not forced and (only_at_start or not call_format.marker)
        name = f"(?P<name>{NAME_PATTERN}){pattern(call_format.middle)}"
        first = call_format.after_marker
        if forced:
            first = (call_format.lead + call_format.first).lstrip()
        elif self._at_start:
            first = call_format.first.lstrip()
        # White space at the start of an answer may be the template's, and left out.
        blank = r"\s*" if forced or self._at_start else ""
        self._first = re.compile(blank + pattern(first) + name)
        self._next = re.compile(f"{pattern(call_format.between or '')}{name}")
        self._state = _State.NAME if forced else _State.TEXT
        self._waiting = ""
        """Read and not given out."""
        self._texts: list[str] = []
        self._calls: list[tuple[str, list[str]]] = []
        self._num_whole = 0
        self._depth, self._in_string, self._escaped = 0, False, False

    @property
    def text(self) -> str:
        """The answer's text given out so far."""
        return "".join(self._texts)

    @property
    def calls(self) -> tuple[WrittenCall, ...]:
        """The calls so far; the last one may not be whole."""
        return tuple(
            WrittenCall(name=name, arguments="".join(pieces)) for name, pieces in self._calls
        )

    @property
    def is_whole(self) -> bool:
        """Whether there are calls, all of them with the last of their arguments."""
        return 0 < len(self._calls) == self._num_whole

    def add(self, piece: str) -> Iterator[str | CallPiece]:
        """Take more of the answer and yield what it adds to its text and its calls."""
        self._waiting += piece
        while (state := self._state) is not _State.END:
            if state is _State.TEXT:
                yield from self._read_text()
            elif state is _State.NAME:
                yield from self._read_name(self._first)
            elif state is _State.ARGUMENTS:
                yield from self._read_arguments()
            elif self._format.between is None:
                self._state = _State.END
            else:
                yield from self._read_name(self._next)
            if self._state is state:
                return

    def finish(self) -> Iterator[str | CallPiece]:
        """Yield what was held back and is text after all."""
        if self._state is _State.TEXT and self._waiting:
            yield self._give(self._waiting)
        self._state, self._waiting = _State.END, ""

    def _read_text(self) -> Iterator[str]:
        if self._at_start:
            yield from self._read_start()
            return
        marker = self._format.marker
        at = self._waiting.find(marker)
        if at >= 0:
            text = self._waiting[:at].rstrip()
            self._waiting, self._state = self._waiting[at + len(marker) :], _State.NAME
        else:
            text = _without_start(self._waiting, marker).rstrip()
            self._waiting = self._waiting[len(text) :]
        if text:
            yield self._give(text)

    def _read_start(self) -> Iterator[str]:
        """Read an answer whose first characters tell whether it is a call."""
        first, begun = self._format.first.lstrip(), self._waiting.lstrip()
        if not self._texts and begun.startswith(first):
            self._state = _State.NAME
        elif self._waiting and (self._texts or not first.startswith(begun)):
            yield self._give_all()

    def _read_name(self, written: re.Pattern[str]) -> Iterator[str | CallPiece]:
        found = written.match(self._waiting)
        if found is None:
            if self._at_start and not self._calls and not self._may_become_name():
                self._state = _State.TEXT
                yield self._give_all()
            return
        self._waiting = self._waiting[found.end() :]
        self._state, self._depth = _State.ARGUMENTS, 0
        self._calls.append((found["name"], []))
        yield CallPiece(len(self._calls) - 1, found["name"], "")

    def _may_become_name(self) -> bool:
        """Whether what waits can still go on as a call: a JSON answer may have a `name` as well."""
        begun = self._waiting.lstrip().removeprefix(self._format.first.lstrip())
        rest = begun.lstrip(_NAME_CHARACTERS)
        middle = self._format.middle
        return ID_MARK in middle or middle.startswith(rest) or rest.startswith(middle)

    def _read_arguments(self) -> Iterator[CallPiece]:
        end = self._end_of_arguments()
        more = self._waiting[:end]
        self._waiting = self._waiting[len(more) :]
        if end is not None:
            self._num_whole += 1
            self._state = _State.AFTER
        if more:
            name, pieces = self._calls[-1]
            pieces.append(more)
            yield CallPiece(len(self._calls) - 1, name, more)

    def _end_of_arguments(self) -> int | None:
        """Follow the JSON object through what waits; return where it ends."""
        for index, character in enumerate(self._waiting):
            if self._in_string:
                closes = character == '"' and not self._escaped
                self._escaped = character == "\\" and not self._escaped
                self._in_string = not closes
            elif character == '"':
                self._in_string = True
            elif character in "{[":
                self._depth += 1
            elif character in "}]":
                self._depth -= 1
                if self._depth == 0:
                    return index + 1
        return None

    def _give_all(self) -> str:
        waiting, self._waiting = self._waiting, ""
        return self._give(waiting)

    def _give(self, text: str) -> str:
        self._texts.append(text)
        return text


def _without_start(text: str, marker: str) -> str:
    """Return the text without the beginning of a marker at its end."""
    for length in range(min(len(marker) - 1, len(text)), 0, -1):
        if text.endswith(marker[:length]):
            return text[:-length]
    return text
