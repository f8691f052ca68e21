"""Glob matching of dotted layer names, where `*` stops at a dot.

A pattern is split at its dots, so each part is matched on its own against the part of the name at
the same place. Within a part the pieces between the stars are searched from left to right, each at
its first possible place; taking the first place is never wrong for a glob, so there is no
backtracking and the time is at most the product of the two lengths.
"""

import re
from collections.abc import Sequence
from functools import lru_cache

from grit_core.errors import Fault

MAX_PATTERN_LENGTH = 256

_ALLOWED = re.compile(r"[A-Za-z0-9_.*-]+")


def matches(pattern: str, name: str) -> bool:
    """Tell whether the whole name fits the pattern; `*` stands for any characters but a dot."""
    return _fits(_parts(pattern), _split(name))


def matching(patterns: Sequence[str], names: Sequence[str]) -> dict[str, str]:
    """Which names fit, each with the first pattern that it fits, in the order of `names`."""
    exact = {pattern: pattern for pattern in patterns if "*" not in pattern}
    globs = [(pattern, _parts(pattern)) for pattern in patterns if "*" in pattern]
    found: dict[str, str] = {}
    for name in names:
        split = _split(name)
        hit = exact.get(name) or next((glob for glob, parts in globs if _fits(parts, split)), None)
        if hit is not None:
            found[name] = hit
    return found


def pattern_fault(pattern: object, *, pointer: str) -> Fault | None:
    """Say why a pattern is refused, or nothing."""
    if not isinstance(pattern, str):
        kind = type(pattern).__name__
        return Fault(
            pointer=pointer,
            code="wrong_type",
            detail=f"A pattern is a text; this one is a {kind}.",
        )
    if not 1 <= len(pattern) <= MAX_PATTERN_LENGTH:
        return Fault(
            pointer=pointer,
            code="out_of_range",
            detail=f"The pattern has {len(pattern)} characters; give 1 to {MAX_PATTERN_LENGTH}.",
        )
    problem = _problem(pattern)
    if problem is None:
        return None
    return Fault(
        pointer=pointer, code="invalid_pattern", detail=f"{pattern!a}: {problem}", input=pattern
    )


def _problem(pattern: str) -> str | None:
    if not _ALLOWED.fullmatch(pattern):
        return "a pattern holds letters, digits, _, -, dots and * alone; ? and [] have no meaning."
    if "**" in pattern:
        return "** has no meaning, * already stops at a dot; write one * for each part of the name."
    if "" in pattern.split("."):
        return "two dots stand together, or one stands at an end; no layer has an empty part."
    return None


@lru_cache(maxsize=4096)
def _parts(pattern: str) -> tuple[tuple[str, ...], ...]:
    """The pattern split at its dots, and each part at its stars."""
    return tuple(tuple(part.split("*")) for part in pattern.split("."))


@lru_cache(maxsize=4096)
def _split(name: str) -> tuple[str, ...]:
    return tuple(name.split("."))


@lru_cache(maxsize=16_384)
def _fits(parts: Sequence[Sequence[str]], split: Sequence[str]) -> bool:
    return len(parts) == len(split) and all(
        _part_fits(pieces, text) for pieces, text in zip(parts, split, strict=True)
    )


def _part_fits(pieces: Sequence[str], text: str) -> bool:
    if len(pieces) == 1:
        return text == pieces[0]
    first, *middle, last = pieces
    if len(text) < len(first) + len(last):
        return False
    if not (text.startswith(first) and text.endswith(last)):
        return False
    position, end = len(first), len(text) - len(last)
    for piece in middle:
        position = text.find(piece, position, end)
        if position < 0:
            return False
        position += len(piece)
    return True
