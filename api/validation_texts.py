"""What pydantic finds wrong, in our words: the field, the value, the bound, the fix."""

import re
from collections.abc import Iterator, Mapping, Sequence
from types import UnionType
from typing import Annotated, Any, Final, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from api.schemas.problems import safe_input
from grit_core.config.bounds import describe_unknown_field, did_you_mean, shown

_TYPES: Final = {
    "string_type": "a text",
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "float_parsing": "a number",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "list_type": "a list",
    "content_type": "a text or a list of parts",
    "dict_type": "an object",
    "model_type": "an object",
    "model_attributes_type": "an object",
    "finite_number": "a finite number",
}
_LENGTH: Final = re.compile(r"(string_)?too_(short|long)")
_BOUNDS: Final = {
    "greater_than": "a number above {gt}",
    "greater_than_equal": "a number of at least {ge}",
    "less_than": "a number below {lt}",
    "less_than_equal": "a number of at most {le}",
}


def describe_error(
    error: Mapping[str, Any], *, known: Sequence[str] = (), brief: bool = False
) -> str:
    """Return a sentence for an error of pydantic.

    Args:
        error: One of `ValidationError.errors()`.
        known: The fields of the object around it, to name the one that was meant.
        brief: Name no other field: there are very many errors.
    """
    kind, context = str(error["type"]), error.get("ctx") or {}
    name = _name(error["loc"])
    if kind == "missing":
        return f"`{name}` is missing; send it."
    if kind == "extra_forbidden":
        return describe_unknown_field(str(error["loc"][-1]), list(known), brief=brief)
    expected = _expected(kind, context)
    value = error.get("input")
    if _LENGTH.fullmatch(kind) and context:
        return f"`{name}` has {_length(value)}; give {_lengths(context)}."
    if kind in {"enum", "literal_error"}:
        choices = (
            str(context.get("expected", "")).replace(" or ", ", ").replace("'", "").split(", ")
        )
        nearest = did_you_mean(value, choices)
        return f"`{name}` is {_shown(value)}; give one of {', '.join(choices)}.{nearest}"
    if expected is not None:
        return f"`{name}` is {_shown(value)}; give {expected}."
    message = str(error["msg"]).removeprefix("Value error, ").rstrip(".")
    return f"`{name}`: {message}."


def known_fields(model: Any, steps: Sequence[int | str]) -> list[str]:
    """Return the fields of the object at a place in a model; none where it is no model.

    Args:
        model: The type of the whole body.
        steps: The place, as pydantic writes it, the unknown field itself left out.
    """
    current = _models(model)
    for step in steps:
        inner = [
            field.annotation
            for each in current
            for name, field in _fields(each)
            if name == str(step)
        ]
        if inner:
            current = [found for annotation in inner for found in _models(annotation)]
    return list(dict.fromkeys(name for each in current for name, _ in _fields(each)))


def _fields(model: type[BaseModel]) -> Iterator[tuple[str, FieldInfo]]:
    """Yield the fields of a model under their names on the wire."""
    for name, field in model.model_fields.items():
        yield field.alias or name, field


def _models(annotation: Any) -> list[type[BaseModel]]:
    """Return the models that a type is made of: of a union all, of a list its items'."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if get_origin(annotation) is Annotated:
        return _models(get_args(annotation)[0])
    if get_origin(annotation) in {Union, UnionType, list, dict, tuple}:
        return [found for each in get_args(annotation) for found in _models(each)]
    return []


def _name(place: Sequence[int | str]) -> str:
    """Return the last name of a place, and the indices behind it: `images[0]`."""
    indices = ""
    for step in reversed(place):
        if isinstance(step, str):
            return f"{step}{indices}"
        indices = f"[{step}]{indices}"
    return f"The body{indices}"


def _expected(kind: str, context: Mapping[str, Any]) -> str | None:
    bound = _BOUNDS.get(kind)
    return _TYPES.get(kind) if bound is None else bound.format(**context)


def _shown(value: Any) -> str:
    """Return a value as it stands in a sentence, or what kind of thing it is."""
    safe = safe_input(value)
    if safe is not None or value is None:
        return shown(safe)
    if isinstance(value, float):
        return repr(value)
    for kind, words in ((dict, "an object"), (list, "a list"), (str, "another text")):
        if isinstance(value, kind):
            return words
    return "another value"


def _length(value: Any) -> str:
    unit = "characters" if isinstance(value, str) else "items"
    return f"{len(value)} {unit}" if hasattr(value, "__len__") else "another length"


def _lengths(context: Mapping[str, Any]) -> str:
    least, most = context.get("min_length"), context.get("max_length")
    return f"at least {least}" if most is None else f"at most {most}"
