"""Pydantic mirrors of the library's configuration dataclasses.

The dataclass owns names, types, defaults, bounds and words; its mirror here adds what the wire
needs: strict types, no unknown fields, and a JSON schema that shows the bounds. A test compares the
two.
"""

import ast
import dataclasses
import inspect
import types
import typing
from collections.abc import Callable, Mapping
from enum import Enum
from itertools import pairwise
from types import NoneType
from typing import Annotated, Any, Final, Literal, Union, get_args, get_origin, get_type_hints

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializeAsAny,
    TypeAdapter,
    WithJsonSchema,
    WrapValidator,
    create_model,
)
from pydantic.fields import FieldInfo

from api.schemas.fields import Line
from grit_core.config.bounds import Check, Choice, Number, Text

Nested = Mapping[type, type[BaseModel]]

MAX_TEXT: Final = 512
MAX_LIST: Final = 10_000


class Mirror(BaseModel):
    """Base of the mirrors; what was not sent is not in `model_dump(exclude_unset=True)`."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


def mirror(
    source: type,
    *,
    checks: Mapping[str, Check],
    nested: Nested | None = None,
) -> type[Mirror]:
    """Return the pydantic mirror of a dataclass, under the same name.

    Args:
        source: The dataclass.
        checks: The rule of each field, by name.
        nested: Mirrors of the dataclasses that its fields hold.
    """
    hints = get_type_hints(source, include_extras=True)
    words = field_docs(source)
    fields: dict[str, Any] = {}
    for each in dataclasses.fields(source):
        wire = _wire_type(hints[each.name], checks.get(each.name), nested or {})
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
    for statement, after in pairwise(body):
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


def _wire_type(hint: Any, check: Check | None, nested: Nested) -> Any:
    """Return the strict type for a field's type."""
    if isinstance(check, Choice):
        return Literal[check.values]
    origin = get_origin(hint)
    if origin in {Union, types.UnionType}:
        return _union(get_args(hint), check, nested)
    if origin is list:
        inner = _wire_type(get_args(hint)[0], None, nested)
        return Annotated[list[inner], Field(max_length=MAX_LIST)]  # type: ignore[valid-type] # at run time
    if hint in nested or (isinstance(hint, type) and issubclass(hint, Enum)):
        return nested.get(hint, hint)
    if hint is str:
        length = check.max_length if isinstance(check, Text) else MAX_TEXT
        return Annotated[Line, Field(max_length=length)]
    return Annotated[hint, Field(strict=True, **_limits(hint, check))]


def _union(parts: tuple[Any, ...], check: Check | None, nested: Nested) -> Any:
    kept = [each for each in parts if each is not NoneType and get_origin(each) is not Literal]
    wire = _wire_type(kept[0], check, nested)
    if any(get_origin(each) is Literal for each in parts):
        wire = _or_auto(wire)
    return wire | None if NoneType in parts else wire


def _or_auto(wire: Any) -> Any:
    """Return a type that also takes `"auto"`, with one fault and not two for a bad value."""

    def validate(value: Any, handler: Callable[[Any], Any]) -> Any:
        return value if value == "auto" else handler(value)

    numbers = TypeAdapter(wire).json_schema()
    shown = {"anyOf": [numbers, {"const": "auto", "type": "string"}]}
    any_value = SerializeAsAny()  # type: ignore[type-arg] # used as a mark, it takes none
    return Annotated[wire, WrapValidator(validate), any_value, WithJsonSchema(shown)]


def _limits(hint: Any, check: Check | None) -> dict[str, Any]:
    if isinstance(check, Number):
        low = "gt" if check.above_low else "ge"
        high = "lt" if check.below_high else "le"
        number: Callable[[float], float] = int if check.integer else float
        return {low: number(check.low), high: number(check.high)}
    return {"ge": -(2**63), "le": 2**63 - 1} if hint is int else {}
