"""What is sent of an answer while it grows: its pieces, or that it grows."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, Final

from store.errors import QueueUnavailable

if TYPE_CHECKING:
    from grit_core.tools.call_reader import CallPiece
    from store.inference import Mailbox

LUMP_SECONDS: Final = 0.02
"""Pieces that come within so long of the last one wait for each other."""
NEWS_SECONDS: Final = 10.0
"""How often the caller of a whole answer hears that it grows."""


class AnswerStream:
    """Sends pieces of text, and of calls after it, in order. Of one thread.

    A piece that comes after a silence is sent at once, others in lumps.
    """

    def __init__(self, mailbox: Mailbox, request_id: str) -> None:
        self._mailbox = mailbox
        self._request_id = request_id
        self._call: CallPiece | None = None
        """The call that the pieces belong to; none for those of the text."""
        self._waiting = ""
        self._begun = False
        """Whether a call has begun, and no message says so yet."""
        self._num_sent = 0
        self._sent_at = -LUMP_SECONDS

    def add(self, text: str) -> None:
        """Take a piece, and send it unless another one was sent just now."""
        self._waiting += text
        self.flush_due()

    def add_call(self, piece: CallPiece) -> None:
        """Likewise with a piece of a call's arguments."""
        if self._call is None or self._call.index != piece.index:
            self._flush()
            self._call, self._begun, self._num_sent = piece, True, 0
        self.add(piece.arguments)

    def flush_due(self) -> None:
        """Send what has waited long enough for more."""
        if time.monotonic() - self._sent_at >= LUMP_SECONDS:
            self._flush()

    def _flush(self) -> None:
        """Send what waits.

        A broker that does not answer keeps nobody from generating: the last message of an answer
        holds all of its text, and so whatever could not be sent before.
        """
        if not (self._waiting or self._begun):
            return
        self._sent_at = time.monotonic()
        message: dict[str, Any] = {"delta": self._waiting, "at": self._num_sent}
        if self._call is not None:
            message["call"] = {"index": self._call.index, "name": self._call.name}
        self._num_sent, self._waiting = self._num_sent + len(self._waiting), ""
        self._begun = False
        try:
            self._mailbox.answer(self._request_id, message)
        except QueueUnavailable:
            return


class WholeAnswer:
    """Sends nothing of an answer but, now and then, that it grows. Of one thread.

    So a long answer is waited for as long as it takes, and one that has stopped growing is not.
    """

    def __init__(self, mailbox: Mailbox, request_id: str, *, every_seconds: float) -> None:
        self._mailbox = mailbox
        self._request_id = request_id
        self._every_seconds = every_seconds
        self._sent_at = time.monotonic()

    def add(self, _text: str) -> None:
        """Take note of a piece."""
        if time.monotonic() - self._sent_at < self._every_seconds:
            return
        self._sent_at = time.monotonic()
        try:
            self._mailbox.answer(self._request_id, {"delta": "", "at": 0})
        except QueueUnavailable:
            return

    def add_call(self, piece: CallPiece) -> None:
        """Take note of a piece of a call."""
        self.add(piece.arguments)

    def flush_due(self) -> None:
        """Do nothing: no piece waits."""
