"""What is sent of an answer while it grows: its pieces, or that it grows."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Final

from store.errors import QueueUnavailable

if TYPE_CHECKING:
    from store.inference import Mailbox

LUMP_SECONDS: Final = 0.02
"""Pieces that come within so long of the last one wait for each other."""
NEWS_SECONDS: Final = 10.0
"""How often the caller of a whole answer hears that it grows."""


class AnswerStream:
    """Sends pieces of text in order, at once when they are rare, else in lumps. Of one thread."""

    def __init__(self, mailbox: Mailbox, request_id: str) -> None:
        self._mailbox = mailbox
        self._request_id = request_id
        self._waiting = ""
        self._num_sent = 0
        self._sent_at = -LUMP_SECONDS

    def add(self, text: str) -> None:
        """Take a piece, and send it unless another one was sent just now."""
        self._waiting += text
        self.flush_due()

    def flush_due(self) -> None:
        """Send what has waited long enough for more.

        A broker that does not answer keeps nobody from generating: the last message of an answer
        holds all of its text, and so whatever could not be sent before.
        """
        if not self._waiting or time.monotonic() - self._sent_at < LUMP_SECONDS:
            return
        self._sent_at = time.monotonic()
        message = {"delta": self._waiting, "at": self._num_sent}
        self._num_sent, self._waiting = self._num_sent + len(self._waiting), ""
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

    def flush_due(self) -> None:
        """Do nothing: no piece waits."""
