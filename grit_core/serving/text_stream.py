"""An answer's text while it grows: pieces that are final, and where it has to end."""

from collections.abc import Collection, Sequence
from typing import Any, Final

UNFINISHED: Final = "\ufffd"
"""What a tokenizer writes for bytes that are no whole character yet."""


class TextStream:
    """Turns the tokens of one answer into text. The pieces, joined, are `text`.

    The text is as the model wrote it, white space at its ends included, up to the first stop text.
    What might still turn out to be one, or is half a character, is held back until later tokens
    tell. The blank that a chat template writes before every answer is the template's: it is left
    out, so that an answer reads as the messages that the model was trained on.
    """

    def __init__(
        self,
        tokenizer: Any,
        stop: Sequence[str] = (),
        *,
        blank: str = "",
        hidden: Collection[int] | None = None,
    ) -> None:
        """Begin an answer.

        Args:
            tokenizer: Decodes the tokens.
            stop: Texts that end the answer and are not part of it.
            blank: White space that the chat template writes before an answer, and the model too.
            hidden: Tokens that are left out of the text; those that the tokenizer calls special
                when it is `None`.
        """
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._blank = blank
        self._hidden = hidden
        self._ids: list[int] = []
        self._settled = 0
        """Tokens whose text can no longer change."""
        self._window = 0
        """Tokens from which is decoded: a word may depend on the token before it."""
        self._opening: str | None = ""
        """The first text, as long as it may be the blank; none afterwards."""
        self._words = ""
        """All text decoded so far, without the blank."""
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
            if self._opening:  # less than the blank is not the template's
                self._words, self._opening = self._opening, None
                self._find_stop()
        return self._send(len(self._words) if self._end is None else self._end)

    def _take(self, more: str) -> None:
        if self._opening is not None:
            opening = self._opening + more
            if len(opening) < len(self._blank) and self._blank.startswith(opening):
                self._opening = opening
                return
            self._opening, more = None, opening.removeprefix(self._blank)
        self._words += more
        self._find_stop()

    def _find_stop(self) -> None:
        ends = [found for stop in self._stop if (found := self._words.find(stop)) >= 0]
        if ends and self._end is None:
            self._end, self.stopped = min(ends), True

    def _held_back(self) -> int:
        """Where the part begins that may still go."""
        if self._end is not None:
            return self._end
        words, held = self._words, 0
        for stop in self._stop:
            for length in range(min(len(stop) - 1, len(words)), held, -1):
                if words.endswith(stop[:length]):
                    held = length
                    break
        return len(words) - held

    def _send(self, until: int) -> str:
        piece = self._words[self._sent : until]
        self._sent = max(self._sent, until)
        return piece

    def _decoded(self, start: int, end: int) -> str:
        ids = self._ids[start:end]
        if self._hidden is None:
            return str(self._tokenizer.decode(ids, skip_special_tokens=True))
        kept = [token for token in ids if token not in self._hidden]
        return str(self._tokenizer.decode(kept, skip_special_tokens=False))
