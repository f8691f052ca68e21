"""Keeps secrets out of what is logged, whoever wrote the line.

Nothing here should ever have to act: secrets are not logged in the first place. It is the second
wall, for the words of drivers and of callers, which may hold what we would not have said.
"""

import json
import re
from collections.abc import Callable, Iterable
from typing import Final
from urllib.parse import quote, unquote, urlsplit

HIDDEN: Final = "***"
_LEAST_CHARACTERS: Final = 8
"""A shorter secret is not looked for: it might be a word of every line."""
_SHAPES: Final = (
    (re.compile(r"grit_[0-9a-f]{12}_[A-Za-z0-9_-]{8,}"), f"grit_{HIDDEN}"),
    (re.compile(r"(?i)\b(bearer|basic)(?:\s|%20|\+)+[\w.~+/=-]{8,}"), rf"\1 {HIDDEN}"),
    (re.compile(r"(?<=://)([^\s/:@\"'\\]*):[^\s/@\"'\\]+(?=@)"), rf"\1:{HIDDEN}"),
    # What PostgreSQL tells of the row that it refused.
    (re.compile(r"(DETAIL|CONTEXT):\s+(?:[^\\\"\n]|\\[^n\n])*"), rf"\1: {HIDDEN}"),
)

Redaction = Callable[[str], str]
"""Returns a text without its secrets."""


def redaction_of(secrets: Iterable[str] = ()) -> Redaction:
    """Return what hides the shapes of secrets, and these very ones."""
    spelled = {form for each in secrets for form in _spellings(each)}
    known = sorted((each for each in spelled if len(each) >= _LEAST_CHARACTERS), key=len)
    found = re.compile("|".join(map(re.escape, reversed(known)))) if known else None

    def redact(text: str) -> str:
        if found is not None:
            text = found.sub(HIDDEN, text)
        for shape, shown in _SHAPES:
            text = shape.sub(shown, text)
        return text

    return redact


def _spellings(secret: str) -> list[str]:
    """Return a secret as it is, and as URLs, `repr` and lines of JSON write it."""
    written = [secret, quote(secret, safe=""), quote(secret), repr(secret)[1:-1]]
    return [*written, *(json.dumps(each)[1:-1] for each in written)]


def password_of(url: str) -> str | None:
    """Return the password in a URL, if it has one."""
    try:
        found = urlsplit(url).password
    except ValueError:  # not a URL; whoever opens it says so
        return None
    return None if found is None else unquote(found)
