"""Strict JSON: what Python's decoder lets through and the rest of the world must not see.

Refused: duplicate keys (the last would win in silence), `NaN`, `Infinity` and numbers that overflow
to them, lone surrogates (no text can be encoded again with one), encodings other than UTF-8, deep
nesting.
"""

import json
import math
from collections.abc import Iterable, Iterator
from typing import Any, Final, NoReturn

MAX_DEPTH: Final = 32
MAX_VALUES: Final = 1_000_000
"""Numbers, texts, lists and objects in one value: nothing that is read here has more."""
MAX_INTEGER: Final = 2**63 - 1
_MAX_DIGITS: Final = 4300
_TOO_DEEP: Final = "The value is nested deeper than {} levels."
_UTF16_MARKS: Final = (b"\xff\xfe", b"\xfe\xff")


class InvalidJson(ValueError):
    """The text is not JSON that we accept; `code` is a stable name for the reason."""

    def __init__(self, code: str, detail: str, *, pointer: str = "") -> None:
        super().__init__(detail)
        self.code = code
        self.detail = detail
        self.pointer = pointer


def decode(data: bytes, *, max_depth: int = MAX_DEPTH, max_values: int = MAX_VALUES) -> Any:
    """Decode one JSON value from UTF-8 bytes.

    Raises:
        InvalidJson: With code `encoding_invalid`, `json_invalid`, `json_duplicate_key`,
            `number_not_finite`, `json_too_deep`, `too_many_values` or `out_of_range` (an integer
            beyond 64 bits).
    """
    text = _text_of(data)
    try:
        value = json.loads(
            text,
            object_pairs_hook=_object,
            parse_constant=_refuse_constant,
            parse_float=_float,
            parse_int=_int,
        )
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, column {error.colno}"
        hint = _hint(text, error.pos)
        raise InvalidJson(
            "json_invalid", f"The text is not JSON: {error.msg} at {place}.{hint}"
        ) from None
    except RecursionError:
        raise InvalidJson("json_too_deep", _TOO_DEEP.format(max_depth)) from None
    _check(value, max_depth=max_depth, max_values=max_values)
    return value


def _hint(text: str, position: int) -> str:
    """Return what to do about the text at a position that is no JSON, where that is easily seen."""
    before, after = text[:position].rstrip(), text[position:].lstrip()
    if after[:1] in {"}", "]"} and before.endswith(","):
        return " Remove the comma before it."
    if after[:1] == "," and before[-1:] in {"}", "]"}:
        return " Remove the comma; rows stand on lines of their own."
    if after[:1] == "'":
        return " Write double quotes."
    for word, written in (("True", "true"), ("False", "false"), ("None", "null")):
        if after.startswith(word):
            return f" Write {written}."
    if after[:1] == "#" or after[:2] in {"//", "/*"}:
        return " JSON has no comments."
    return ""


def escape(key: str | int) -> str:
    """Return one step of a JSON pointer (RFC 6901)."""
    return str(key).replace("~", "~0").replace("/", "~1")


def pointer_of(path: tuple[str | int, ...]) -> str:
    """Return the JSON pointer of a path of keys and indices."""
    return "".join(f"/{escape(step)}" for step in path)


def within(value: Any, pointer: str) -> str:
    """Return a JSON pointer, cut where it would lead into a text, a number or null of a value.

    What a value lacks (a missing key) may be pointed at; what is inside of a text may not.
    """
    kept = 0
    for step in pointer.split("/")[1:]:
        if isinstance(value, dict):
            key = step.replace("~1", "/").replace("~0", "~")
            if key not in value:
                return pointer
            value = value[key]
        elif isinstance(value, list):
            if not (step.isdecimal() and int(step) < len(value)):
                return pointer
            value = value[int(step)]
        else:
            break
        kept += len(step) + 1
    return pointer[:kept]


def has_lone_surrogate(text: str) -> bool:
    """Tell whether a text holds half of a surrogate pair and so cannot be written as UTF-8."""
    if text.isascii():
        return False
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False


def _text_of(data: bytes) -> str:
    if data.startswith(b"\xef\xbb\xbf"):
        raise InvalidJson(
            "encoding_invalid", "The text starts with a byte order mark; leave it out."
        )
    if data.startswith(_UTF16_MARKS) or b"\x00" in data[:4]:
        raise InvalidJson("encoding_invalid", "The text is UTF-16 or UTF-32; send UTF-8.")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InvalidJson(
            "encoding_invalid", f"The text is not UTF-8: byte {error.start} cannot be decoded."
        ) from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        twice = _first_repeated(key for key, _ in pairs)
        shown = twice[:80].encode("ascii", "backslashreplace").decode()
        raise InvalidJson("json_duplicate_key", f"The key {shown!r} appears twice in one object.")
    return value


def _first_repeated(keys: Iterable[str]) -> str:
    seen: set[str] = set()
    for key in keys:
        if key in seen:
            return key
        seen.add(key)
    return ""


def _refuse_constant(name: str) -> NoReturn:
    raise InvalidJson("number_not_finite", f"{name} is not JSON; numbers must be finite.")


def _float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise InvalidJson(
            "number_not_finite", f"The number {text[:40]} overflows; numbers must be finite."
        )
    return value


def _int(text: str) -> int:
    if len(text) > _MAX_DIGITS:
        raise InvalidJson("json_invalid", f"A number has {len(text)} digits; send at most 19.")
    return int(text)


def _check(value: Any, *, max_depth: int, max_values: int) -> None:
    # Depth, surrogates, integers that no database column holds.
    # An explicit stack, since the depth is what we do not trust.
    stack: list[tuple[Any, tuple[str | int, ...]]] = [(value, ())]
    num_values = 1
    while stack:
        item, path = stack.pop()
        if isinstance(item, str):
            _check_text(item, path)
        elif isinstance(item, (dict, list)):
            if len(path) >= max_depth:
                raise InvalidJson("json_too_deep", _TOO_DEEP.format(max_depth))
            num_values += len(item)
            if num_values > max_values:
                detail = f"The value holds more than {max_values} values; send fewer."
                raise InvalidJson("too_many_values", detail)
            stack.extend(_children(item, path))
        elif isinstance(item, int) and abs(item) > MAX_INTEGER:
            raise InvalidJson(
                "out_of_range",
                f"The integer is beyond 64 bits; send at most {MAX_INTEGER}.",
                pointer=pointer_of(path),
            )


def _children(
    item: dict[str, Any] | list[Any], path: tuple[str | int, ...]
) -> Iterator[tuple[Any, tuple[str | int, ...]]]:
    if isinstance(item, list):
        yield from ((child, (*path, index)) for index, child in enumerate(item))
        return
    for key, child in item.items():
        _check_text(key, path)
        yield child, (*path, key)


def _check_text(text: str, path: tuple[str | int, ...]) -> None:
    if has_lone_surrogate(text):
        raise InvalidJson(
            "encoding_invalid",
            "A text holds half of a surrogate pair, which no UTF-8 text can hold.",
            pointer=pointer_of(path) if not any(map(_bad_step, path)) else "",
        )


def _bad_step(step: str | int) -> bool:
    return isinstance(step, str) and has_lone_surrogate(step)
