"""Tries of the parts that a service is made of, in words for an operator."""

from __future__ import annotations

import re
import secrets
from typing import TYPE_CHECKING

from store.errors import QueueUnavailable

if TYPE_CHECKING:
    from store.inference import Mailbox
    from store.objects import Objects


def try_objects(objects: Objects) -> None:
    """Write an object, read it and delete it.

    Raises:
        StorageUnavailable: If one of these fails.
    """
    key = f"check/{secrets.token_hex(8)}"
    objects.ping()
    objects.put_bytes(key, b"check")
    objects.get_bytes(key)
    objects.delete(key)


def try_broker(mailbox: Mailbox) -> None:
    """Ask the broker for an answer.

    Raises:
        QueueUnavailable: If it gives none; with the driver's words, and what to do.
    """
    try:
        mailbox.ping()
    except QueueUnavailable as error:
        words = str(error.__cause__).rstrip(".")
        advice = "check the host and port in GRIT_BROKER_URL, and that Redis or Valkey runs there"
        if re.search(r"(?i)auth|username-password|permission", words):
            advice = "check the user in GRIT_BROKER_URL and its password"
        elif re.search(r"(?i)DB index", words):
            advice = "check the number at the end of GRIT_BROKER_URL"
        raise QueueUnavailable(f"The broker does not answer: {words} ({advice})") from error
