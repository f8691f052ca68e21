"""The pieces of one answer on their way to the mailbox: at once when rare, else in lumps."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Final

from store.errors import QueueUnavailable

if TYPE_CHECKING:
    from store.inference import Mailbox

LUMP_SECONDS: Final = 0.02
"""Pieces that come within so long of the last one wait for each other."""


class AnswerStream:
    """Sends pieces of text in order. Of one thread."""

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
