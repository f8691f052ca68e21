"""Ids that carry their kind and sort by time: `job_` and 26 characters of Crockford's base 32.

The 128 bits are a ULID: 48 bits of milliseconds, 80 bits of randomness. Ids of one process are
strictly increasing, also within a millisecond.
"""

import re
import secrets
import threading
import time
from typing import Final

ALPHABET: Final = "0123456789abcdefghjkmnpqrstvwxyz"
KINDS: Final = frozenset({"job", "att", "ds", "adp", "key", "wrk", "inf", "aud"})
_PATTERN: Final = re.compile(rf"({'|'.join(sorted(KINDS))})_[0-7][{ALPHABET}]{{25}}")
_RANDOM_BITS: Final = 80

_lock = threading.Lock()
_last = 0


def new_id(kind: str) -> str:
    """Return a fresh id of a kind, above every id that this process made before.

    Raises:
        ValueError: If the kind is not one of `KINDS`.
    """
    if kind not in KINDS:
        raise ValueError(f"unknown kind of id {kind!r}; one of {', '.join(sorted(KINDS))}")
    global _last  # noqa: PLW0603 - the last value is what makes ids monotonic
    value = (time.time_ns() // 1_000_000) << _RANDOM_BITS | secrets.randbits(_RANDOM_BITS)
    with _lock:
        value = max(value, _last + 1)
        _last = value
    return f"{kind}_{_encode(value)}"


def is_id(text: str, kind: str) -> bool:
    """Tell whether a text is a well-formed id of a kind."""
    found = _PATTERN.fullmatch(text)
    return found is not None and found[1] == kind


def _encode(value: int) -> str:
    return "".join(ALPHABET[value >> shift & 31] for shift in range(125, -1, -5))
