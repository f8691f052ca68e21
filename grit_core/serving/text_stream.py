"""An answer's text while it grows: pieces that are final, and where it has to end."""

from collections.abc import Sequence
from typing import Any, Final

UNFINISHED: Final = "\ufffd"
"""What a tokenizer writes for bytes that are no whole character yet."""


class TextStream:
    """Turns the tokens of one answer into text. The pieces, joined, are `text`.

    The text has no white space at its ends and ends before the first stop text. What might still
    turn out to be either, or is half a character, is held back until later tokens tell.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str] = ()) -> None:
        """Begin an answer."""
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._ids: list[int] = []
        self._settled = 0
        """Tokens whose text can no longer change."""
        self._window = 0
        """Tokens from which is decoded: a word may depend on the token before it."""
        self._words = ""
        """All text decoded so far, without white space at its start."""
        self._sent = 0
        self.stopped = False
        """A stop text has come."""
        self._end: int | None = None

    @property
    def text(self) -> str:
        """What has been given out."""
        return self._words[: self._sent]

    def add(self, token: int) -> str:
        """Take the next token and return the piece of text that is final now."""
        self._ids.append(token)
        before = self._decoded(self._window, self._settled)
        after = self._decoded(self._window, len(self._ids))
        if len(after) <= len(before) or after.endswith(UNFINISHED):
            return ""
        self._take(after[len(before) :])
        self._window, self._settled = self._settled, len(self._ids)
        return self._send(self._held_back())

    def finish(self) -> str:
        """Return what was held back and is part of the answer after all."""
        if self._end is None:
            before = self._decoded(self._window, self._settled)
            self._take(self._decoded(self._window, len(self._ids))[len(before) :])
        end = len(self._words) if self._end is None else self._end
        return self._send(len(self._words[:end].rstrip()))

    def _take(self, more: str) -> None:
        self._words = (self._words + more) if self._words else more.lstrip()
        ends = [found for stop in self._stop if (found := self._words.find(stop)) >= 0]
        if ends and self._end is None:
            self._end, self.stopped = min(ends), True

    def _held_back(self) -> int:
        """Where the part begins that may still go."""
        if self._end is not None:
            return len(self._words[: self._end].rstrip())
        words, held = self._words, 0
        for stop in self._stop:
            for length in range(min(len(stop) - 1, len(words)), held, -1):
                if words.endswith(stop[:length]):
                    held = length
                    break
        return len(words[: len(words) - held].rstrip())

    def _send(self, until: int) -> str:
        piece = self._words[self._sent : until]
        self._sent = max(self._sent, until)
        return piece

    def _decoded(self, start: int, end: int) -> str:
        return str(self._tokenizer.decode(self._ids[start:end], skip_special_tokens=True))
