"""Pydantic mirrors of the library's configuration dataclasses.

The dataclass owns names, types, defaults, bounds and words; its mirror here adds what the wire needs:
strict types, no unknown fields, and a JSON schema that shows the bounds. A test compares the two.
"""

import ast
import dataclasses
import inspect
import types
import typing
from collections.abc import Callable, Mapping
from enum import Enum
from typing import Annotated, Any, Final, Literal, Union, get_args, get_origin, get_type_hints

from pydantic import BaseModel, ConfigDict, Field, WithJsonSchema, WrapValidator, create_model
from pydantic.fields import FieldInfo

from grit_core.config.bounds import Bound

MAX_TEXT: Final = 512
MAX_LIST: Final = 10_000


class Mirror(BaseModel):
    """Base of the mirrors; what was not sent is not in `model_dump(exclude_unset=True)`."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


def mirror(
    source: type,
    *,
    bounds: Mapping[str, Bound],
    nested: Mapping[type, type[BaseModel]] | None = None,
) -> type[Mirror]:
    """Return the pydantic mirror of a dataclass, under the same name.

    Args:
        source: The dataclass.
        bounds: Ranges of its numbers by field name.
        nested: Mirrors of the dataclasses that its fields hold.
    """
    hints = get_type_hints(source, include_extras=True)
    words = field_docs(source)
    fields: dict[str, Any] = {}
    for each in dataclasses.fields(source):
        wire = _wire_type(hints[each.name], bounds.get(each.name), nested or {})
        fields[each.name] = (wire, _field(each, words.get(each.name)))
    model = create_model(source.__name__, __base__=Mirror, __doc__=source.__doc__, **fields)
    return typing.cast("type[Mirror]", model)


def _field(source: "dataclasses.Field[Any]", words: str | None) -> FieldInfo:
    if source.default_factory is not dataclasses.MISSING:
        factory: Callable[[], Any] = source.default_factory
        made: FieldInfo = Field(default_factory=factory, description=words)
        return made
    default = ... if source.default is dataclasses.MISSING else source.default
    found: FieldInfo = Field(default=default, description=words)
    return found


def field_docs(source: type) -> dict[str, str]:
    """Return the sentence that stands under each field of a class, by field name."""
    tree = ast.parse(inspect.cleandoc(inspect.getsource(source)))
    body = typing.cast("ast.ClassDef", tree.body[0]).body
    found: dict[str, str] = {}
    for statement, after in zip(body, body[1:], strict=False):
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            words = _text_of(after)
            if words is not None:
                found[statement.target.id] = inspect.cleandoc(words)
    return found


def _text_of(statement: ast.stmt) -> str | None:
    if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant):
        value = statement.value.value
        return value if isinstance(value, str) else None
    return None


def _wire_type(hint: Any, bound: Bound | None, nested: Mapping[type, type[BaseModel]]) -> Any:
    """Return the strict type for a field's type."""
    origin = get_origin(hint)
    if origin in {Union, types.UnionType}:
        return _union(get_args(hint), bound, nested)
    if origin is list:
        inner = _wire_type(get_args(hint)[0], bound, nested)
        return Annotated[list[inner], Field(max_length=MAX_LIST)]  # type: ignore[valid-type] # built at run time
    if origin is Literal:
        return hint
    if hint in nested:
        return nested[hint]
    if isinstance(hint, type) and issubclass(hint, Enum):
        return hint
    if hint is bool:
        return Annotated[bool, Field(strict=True)]
    if hint is str:
        return Annotated[str, Field(strict=True, max_length=MAX_TEXT)]
    return _number(hint, bound)


def _union(parts: tuple[Any, ...], bound: Bound | None, nested: Mapping[type, type[BaseModel]]) -> Any:
    kept = [part for part in parts if part is not types.NoneType and get_origin(part) is not Literal]
    wire = _wire_type(kept[0], bound, nested)
    if any(get_origin(part) is Literal for part in parts):
        wire = or_auto(wire, _number_schema(bound))
    return wire | None if types.NoneType in parts else wire


def or_auto(wire: Any, schema: dict[str, Any]) -> Any:
    """Return a type that also takes `"auto"`, with one fault and not two for a bad value."""

    def validate(value: Any, handler: Callable[[Any], Any]) -> Any:
        return value if value == "auto" else handler(value)

    shown = {"anyOf": [schema, {"const": "auto", "type": "string"}]}
    return Annotated[wire, WrapValidator(validate), WithJsonSchema(shown)]


def _number_schema(bound: Bound | None) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "integer" if bound is not None and bound.whole else "number"}
    if bound is not None:
        schema["minimum"] = bound.low
        schema["exclusiveMaximum" if bound.open_high else "maximum"] = bound.high
    return schema


def _number(hint: type, bound: Bound | None) -> Any:
    limits: dict[str, Any] = {}
    if bound is not None:
        limits = {"ge": bound.low, ("lt" if bound.open_high else "le"): bound.high}
    elif hint is int:
        limits = {"ge": -(2**63), "le": 2**63 - 1}
    return Annotated[hint, Field(strict=True, **limits)]
