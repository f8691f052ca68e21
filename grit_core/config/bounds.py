"""What a configuration value may be: each check answers with a fault or with nothing."""

import difflib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from grit_core.config.aliases import find_alias
from grit_core.errors import Fault

MAX_SHOWN_CHARACTERS = 200
"""A value that is longer is not repeated to the caller."""


MAX_HINTS = 10
"""An object with more unknown keys gets no hints about them."""


class Check(Protocol):
    """One field's rule."""

    def fault(self, value: object, *, pointer: str) -> Fault | None:
        """Say what is wrong with the value at `pointer`, or nothing."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Number:
    """A finite number between two bounds, both included unless said otherwise."""

    low: float
    high: float
    integer: bool = False
    above_low: bool = False
    """The lower bound itself is refused."""
    below_high: bool = False
    """The upper bound itself is refused."""
    optional: bool = False
    auto: bool = False
    """The text `auto` is accepted as well."""

    def fault(self, value: object, *, pointer: str) -> Fault | None:
        """Say what is wrong with the value at `pointer`, or nothing."""
        if (value is None and self.optional) or (value == "auto" and self.auto):
            return None
        if isinstance(value, bool) or not isinstance(value, int | float):
            return wrong_type(value, pointer=pointer, expected=self.expected)
        if isinstance(value, float) and self.integer and not value.is_integer():
            return wrong_type(value, pointer=pointer, expected=self.expected)
        if isinstance(value, float) and self.integer:
            return wrong_type(value, pointer=pointer, expected=self.expected)
        if not math.isfinite(value) or not self._within(value):
            name = pointer.rsplit("/", maxsplit=1)[-1]
            return Fault(
                pointer=pointer,
                code="out_of_range",
                detail=f"{name} is {shown(value)}; give {self.expected}.",
                input=shown_input(value),
            )
        return None

    @property
    def expected(self) -> str:
        """The rule in words."""
        kind = "a whole number" if self.integer else "a number"
        low = f"above {self.low:g}" if self.above_low else f"from {self.low:.15g}"
        high = f"below {self.high:g}" if self.below_high else f"up to {self.high:.15g}"
        alternatives = " or `auto`" if self.auto else ""
        return f"{kind} {low} {high}{alternatives}" + (", or null" if self.optional else "")

    def _within(self, value: float) -> bool:
        over = value > self.low if self.above_low else value >= self.low
        under = value < self.high if self.below_high else value <= self.high
        return over and under


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """One of a few texts."""

    values: tuple[str, ...]

    def fault(self, value: object, *, pointer: str) -> Fault | None:
        """Say what is wrong with the value at `pointer`, or nothing."""
        if isinstance(value, str) and value in self.values:
            return None
        name = pointer.rsplit("/", maxsplit=1)[-1]
        return Fault(
            pointer=pointer,
            code="unknown_value",
            detail=f"{name} is {shown(value)}; give one of {', '.join(self.values)}."
            + did_you_mean(value, self.values),
            input=shown_input(value),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Flag:
    """True or false."""

    def fault(self, value: object, *, pointer: str) -> Fault | None:
        """Say what is wrong with the value at `pointer`, or nothing."""
        if isinstance(value, bool):
            return None
        return wrong_type(value, pointer=pointer, expected="true or false")


@dataclass(frozen=True, kw_only=True, slots=True)
class Text:
    """A short text."""

    max_length: int

    def fault(self, value: object, *, pointer: str) -> Fault | None:
        """Say what is wrong with the value at `pointer`, or nothing."""
        expected = f"a text of 1 to {self.max_length} characters"
        if not isinstance(value, str):
            return wrong_type(value, pointer=pointer, expected=expected)
        if not 1 <= len(value) <= self.max_length:
            name = pointer.rsplit("/", maxsplit=1)[-1]
            return Fault(
                pointer=pointer,
                code="out_of_range",
                detail=f"{name} has {len(value)} characters; give {expected}.",
            )
        return None


def check_fields(values: object, checks: Mapping[str, Check], *, pointer: str) -> list[Fault]:
    """Apply each check to the attribute of its name."""
    found = (
        check.fault(getattr(values, name), pointer=f"{pointer}/{name}")
        for name, check in checks.items()
    )
    return [fault for fault in found if fault is not None]


def wrong_type(value: object, *, pointer: str, expected: str) -> Fault:
    """The fault of a value of the wrong type."""
    name = pointer.rsplit("/", maxsplit=1)[-1]
    return Fault(
        pointer=pointer,
        code="wrong_type",
        detail=f"{name} is {shown(value)}; give {expected}.",
        input=shown_input(value),
    )


def unknown_fields(
    data: Mapping[str, Any],
    known: Iterable[str],
    *,
    pointer: str,
    elsewhere: Mapping[str, str] | None = None,
) -> list[Fault]:
    """Return one fault for every key that is no field.

    Args:
        data: The object.
        known: Its fields.
        pointer: Where it stands in the request.
        elsewhere: Where else in the request a field of some name belongs, by that name.
    """
    names = list(known)
    unknown = [key for key in data if key not in names]
    return [
        Fault(
            pointer=f"{pointer}/{escaped(str(key))}",
            code="unknown_field",
            detail=describe_unknown_field(
                str(key), names, elsewhere=elsewhere, brief=len(unknown) > MAX_HINTS
            ),
        )
        for key in unknown
    ]


def describe_unknown_field(
    key: str,
    known: list[str],
    *,
    elsewhere: Mapping[str, str] | None = None,
    brief: bool = False,
) -> str:
    """Return a sentence about a key that is no field, with the field that was probably meant.

    Args:
        key: The key.
        known: The fields of the object.
        elsewhere: Where else a field of some name belongs, by that name.
        brief: Leave the hint out: of very many keys none is a slip, and each costs time and space.
    """
    if brief:
        return f"There is no field {shown(key)}; remove it."
    places = elsewhere or {}
    if key in places:
        return f"There is no field {shown(key)} here; it belongs in {places[key]}."
    meant = None if find_alias(key, known) else find_alias(key, list(places))
    if meant is not None:
        return f"There is no field {shown(key)} here. Did you mean {meant} in {places[meant]}?"
    hint = did_you_mean(key, known)
    if hint:
        return f"There is no field {shown(key)}.{hint}"
    listed = f" Known fields: {', '.join(known)}." if known else ""
    return f"There is no field {shown(key)}; remove it.{listed}"


def did_you_mean(value: object, known: Iterable[str]) -> str:
    """Return a question with the nearest known text, or nothing."""
    if not isinstance(value, str) or len(value) > MAX_SHOWN_CHARACTERS:
        return ""
    names = list(known)
    alias = find_alias(value, names)
    nearest = [alias] if alias else difflib.get_close_matches(value.lower(), names, n=1)
    return f" Did you mean {nearest[0]}?" if nearest else ""


def escaped(token: str) -> str:
    """One reference token of a JSON pointer (RFC 6901, section 3)."""
    return token.replace("~", "~0").replace("/", "~1")


def shown(value: object) -> str:
    """The value as it stands in a sentence."""
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    text = value if isinstance(value, str) else repr(value)
    if len(text) > MAX_SHOWN_CHARACTERS:
        return f"{text[:MAX_SHOWN_CHARACTERS]}... ({len(text)} characters)"
    return repr(text) if isinstance(value, str) else text


def shown_input(value: object) -> object:
    """The value when it is a short JSON scalar; `None` otherwise."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, bool | float) or value is None:
        return value
    if isinstance(value, int):
        return value if abs(value) <= 2**53 else None
    if isinstance(value, str) and len(value) <= MAX_SHOWN_CHARACTERS:
        return str(value)
    return None
