"""Grammars that answers are held to, as the grammar engine (llguidance) reads them.

A grammar is one text in the engine's variant of Lark; a JSON schema stands in it as a `%json`
rule. White space between the parts of a JSON value is free but bounded: nothing, one blank, or one
line break with its indentation. So compact, usual and indented JSON can all be written, and no
answer can go on with blanks for ever.
"""

import json
import re
import time
from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from typing import Any, Final

from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from grit_core.errors import Fault, InvalidConfig
from grit_core.json_schemas import parse_json_schema, subschemas
from grit_core.json_text import pointer_of

LIMITS: Final = LLParserLimits(
    max_items_in_row=10_000, max_lexer_states=50_000, verbose_errors=False
)
"""Bounds on what the engine may build: some 100 MB and some tens of milliseconds a token."""

WHITESPACE: Final = r"[ ]|\n([ ]{0,20}|\t{0,5})"
"""Between two parts of a JSON value, at most once."""

_OPTIONS: Final = {
    "whitespace_flexible": True,
    "whitespace_pattern": WHITESPACE,
    # Models that were tuned on `json.dumps` write é as \u00e9.
    "json_allow_general_unicode_escapes": True,
}
_LEAD: Final = r"JSON_LEAD: /[ \n]/"
_TOO_LARGE: Final = re.compile(r"too (big|large|many)|max is|exceed", re.IGNORECASE)
_LOCATING_SECONDS: Final = 1.0

NO_VALUE: Final = "no value begins here: it refers to itself, or leaves none"
_REASONS: Final = (
    ("NoExtensionBias", NO_VALUE),
    ("fuel exhausted", "it is too large to be worked out; use smaller numbers and fewer parts"),
    ("Unable to determine if regex is empty", "its patterns are too many to be combined"),
)
"""What the engine says in words of its own, by what it begins with."""


def json_rule(schema: Mapping[str, Any], *, pointer: str = "/schema") -> str:
    """Return the part of a rule that stands for the values of a JSON schema: `%json {...}`.

    Args:
        schema: A JSON schema of draft 2020-12 or one before.
        pointer: Where it stands in the request.

    Raises:
        InvalidConfig: Answers cannot be held to it; the faults' pointers lead into it.
    """
    plain = parse_json_schema(schema, pointer=pointer)
    rule = _rule(plain)
    try:
        validate_grammar(f"start: {rule}\n", pointer=pointer)
        _validate_opening(f"start: {rule}\n", pointer=pointer)
    except InvalidConfig as error:
        raise InvalidConfig([_located(error.faults[0], plain, pointer=pointer)]) from None
    return rule


def write_json_rule(schema: Mapping[str, Any]) -> str:
    """Return the rule of a schema that `json_rule` has taken before, without trying it again."""
    return _rule(parse_json_schema(schema))


def json_schema_grammar(schema: Mapping[str, Any], *, pointer: str = "/schema") -> str:
    """Return the grammar of the JSON texts that a schema allows.

    A blank or a line break may stand before the value: templates that end in `Assistant:` teach
    models to begin with one.

    Args:
        schema: A JSON schema of draft 2020-12 or one before.
        pointer: Where it stands in the request.

    A schema that answers cannot be held to raises `InvalidConfig`, with pointers into it.
    """
    return f"start: JSON_LEAD? json\njson: {json_rule(schema, pointer=pointer)}\n{_LEAD}\n"


def validate_grammar(grammar: str, *, pointer: str = "/grammar") -> None:
    """Check that the engine takes a grammar.

    Args:
        grammar: In the engine's variant of Lark.
        pointer: What the fault points to.

    Raises:
        InvalidConfig: It does not; the fault says why.
    """
    reason = _refusal(grammar)
    if reason:
        raise InvalidConfig([_fault(reason, pointer)])


def _validate_opening(grammar: str, *, pointer: str) -> None:
    """Check that the engine finds what may come first within its bounds.

    Raises:
        InvalidConfig: It does not.
    """
    reason = _opening_refusal(grammar)
    if reason:
        raise InvalidConfig([_fault(reason, pointer)])


def _fault(reason: str, pointer: str) -> Fault:
    return Fault(
        pointer=pointer,
        code="schema_too_large" if _TOO_LARGE.search(reason) else "schema_unsupported",
        detail=f"Answers cannot be held to this: {reason}.",
    )


@lru_cache(maxsize=256)
def _opening_refusal(grammar: str) -> str:
    matcher = LLMatcher(LLTokenizer("byte"), grammar, log_level=0, limits=LIMITS)
    if not matcher.is_error():
        matcher.compute_bitmask()
    return plain_reason(matcher.get_error()) if matcher.is_error() else ""


@lru_cache(maxsize=256)
def _refusal(grammar: str) -> str:
    """Return why the engine refuses a grammar, or nothing. Other threads run meanwhile."""
    return plain_reason(LLMatcher.validate_grammar(grammar, None, limits=LIMITS))


def plain_reason(message: str) -> str:
    """Return the engine's message without its position and the grammar's own lines."""
    text = re.sub(r"^at \d+\(\d+\): ", "", message).split("\n   1 | ", 1)[0]
    text = text.removeprefix("failed to compile JSON schema: ")
    if "\nerror: " in text:  # a regular expression, with a drawing of the place
        head, _, text = text.partition("\nerror: ")
        pattern = head.partition("\n")[2].strip().splitlines()
        text = f"{text} (pattern {pattern[0].strip()})" if pattern else text
    text = text.split("\n<non-verbose/>", 1)[0]
    text = re.sub(r" while processing \S+", "", text)
    text = text.replace("Unimplemented keys:", "unsupported keywords")
    text = next((words for begin, words in _REASONS if text.startswith(begin)), text)
    if text.startswith("oneOf "):
        text = "alternatives of `oneOf` may fit one value together; use `anyOf`"
    return " ".join(text.split())[:300].rstrip(".")


def _rule(plain: Mapping[str, Any]) -> str:
    return f"%json {_written(plain)}"


def _written(schema: Mapping[str, Any]) -> str:
    return json.dumps({**schema, "x-guidance": _OPTIONS}, separators=(",", ":"))


def _located(fault: Fault, root: dict[str, Any], *, pointer: str) -> Fault:
    """Return a fault with a pointer to the innermost schema that is refused for this reason."""
    definitions: dict[str, Any] = {
        key: root[key] for key in ("$defs", "definitions") if key in root
    }
    deadline = time.monotonic() + _LOCATING_SECONDS
    path: tuple[str | int, ...] = ()
    children = subschemas(root)
    while (step := next(children, None)) is not None and time.monotonic() < deadline:
        keys, child = step
        if not isinstance(child, dict):
            continue
        try:
            validate_grammar(f"start: %json {_written(definitions | child)}\n", pointer=pointer)
        except InvalidConfig as error:
            if error.faults[0].detail == fault.detail:
                path, children = path + keys, subschemas(child)
    return replace(fault, pointer=pointer + pointer_of(path))
