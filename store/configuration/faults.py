"""Words for wrong settings: the variable, its value unless it may be secret, the bound, the fix."""

import difflib
from collections.abc import Iterable, Mapping
from typing import Any, Final

from pydantic import ValidationError
from pydantic_settings import BaseSettings

from store.configuration.sources import PREFIX, Given

CLIENT_VARIABLES: Final = ("GRIT_URL", "GRIT_API_KEY")
"""Read by `grit`; a service started by it inherits them."""
_MOST_CHARACTERS: Final = 80


def variable_name(field: str) -> str:
    """Return the variable of a setting: `GRIT_POOL_SIZE` for `pool_size`."""
    return f"{PREFIX}{field.upper()}"


def is_secret(settings_class: type[BaseSettings], field: str) -> bool:
    """Tell whether a setting's value is never shown: a secret, or a URL that may hold one."""
    info = settings_class.model_fields[field]
    return not info.repr or "SecretStr" in str(info.annotation)


def describe_bound(schema: Mapping[str, Any]) -> str:
    """Return what a value must be, from its JSON schema: "a whole number above 0"."""
    if "anyOf" in schema:
        schema = {**schema, **next(each for each in schema["anyOf"] if each["type"] != "null")}
    match schema.get("type"), schema.get("format"):
        case "array", _:
            return """a JSON list of texts, such as '["first", "second"]'"""
        case "integer", _:
            return f"a whole number{_describe_range(schema)}"
        case "number", _:
            return f"a number{_describe_range(schema)}"
        case _, "path":
            return "a path"
        case _:
            return "text"


def _describe_range(schema: Mapping[str, Any]) -> str:
    words = {
        "exclusiveMinimum": "above",
        "minimum": "of at least",
        "maximum": "at most",
        "exclusiveMaximum": "below",
    }
    found = [f"{word} {schema[key]:.15g}" for key, word in words.items() if key in schema]
    return f" {' and '.join(found)}" if found else ""


def describe_invalid(
    settings_class: type[BaseSettings], error: ValidationError, given: Mapping[str, Given]
) -> list[str]:
    """Return one line for each fault that the validation found."""
    properties = settings_class.model_json_schema()["properties"]
    lines: dict[str, None] = {}  # a list with two wrong entries is one fault
    for each in error.errors(include_url=False):
        if not each["loc"]:
            lines |= dict.fromkeys(str(each.get("ctx", {}).get("error", each["msg"])).splitlines())
            continue
        field = str(each["loc"][0])
        found = given.get(field)
        name = variable_name(field) if found is None else found.origin
        shown = "has a value that cannot be used; it"
        if found is not None and not is_secret(settings_class, field):
            shown = f"is {_shorten(found.value)!r}; it"
        lines[f"{name} {shown} must be {describe_bound(properties[field])}"] = None
    return list(lines)


def _shorten(value: str) -> str:
    return value if len(value) <= _MOST_CHARACTERS else f"{value[:_MOST_CHARACTERS]}..."


def describe_unknown(settings_class: type[BaseSettings], given: Mapping[str, Given]) -> list[str]:
    """Return one line for each variable or file that is no setting, with the nearest one."""
    known = list(settings_class.model_fields)
    accepted = {each.removeprefix(PREFIX).lower() for each in CLIENT_VARIABLES}
    lines = []
    for name, found in given.items():
        if name in known or name in accepted:
            continue
        lines.append(f"{found.origin} is not a setting{_suggest(name, known)}")
    return lines


def _suggest(name: str, known: Iterable[str]) -> str:
    nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.7)
    if not nearest:
        return "; remove it, or look its name up in docs/settings.md"
    return f"; did you mean {variable_name(nearest[0])}?"
