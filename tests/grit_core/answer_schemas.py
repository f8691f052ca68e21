"""Schemas as people and libraries write them: pydantic, zod, OpenAI's examples, by hand."""

from datetime import date, datetime
from decimal import Decimal
from enum import StrEnum
from typing import Annotated, Any, Literal
from uuid import UUID

from pydantic import AnyUrl, BaseModel, ConfigDict, Field, SecretStr


class Currency(StrEnum):
    EUR = "EUR"
    USD = "USD"


class Line(BaseModel):
    """A line of an invoice."""

    article: Annotated[str, Field(max_length=8, description="As printed.")]
    quantity: Annotated[int, Field(ge=1, le=99)]
    price: Annotated[float, Field(ge=0, lt=1000)]


class Invoice(BaseModel):
    model_config = ConfigDict(extra="forbid")
    number: Annotated[str, Field(pattern=r"^[A-Z]{2}-\d{3}$")]
    issued: date
    currency: Currency
    lines: Annotated[list[Line], Field(min_length=1, max_length=2)]
    note: Annotated[str, Field(max_length=5)] | None


class Cat(BaseModel):
    kind: Literal["cat"] = "cat"
    lives: Annotated[int, Field(ge=0, le=9)]


class Dog(BaseModel):
    kind: Literal["dog"] = "dog"
    tricks: Annotated[list[Literal["sit", "roll"]], Field(max_length=2)]


class Home(BaseModel):
    pet: Annotated[Cat | Dog, Field(discriminator="kind")]


class Node(BaseModel):
    name: Annotated[str, Field(max_length=3)]
    children: Annotated[list["Node"], Field(max_length=1)]


class Person(BaseModel):
    id: UUID
    joined: datetime
    balance: Decimal
    flags: tuple[bool, int]


class Account(BaseModel):
    site: AnyUrl
    token: SecretStr
    scores: dict[str, Annotated[int, Field(ge=0, le=9)]]


class Box(BaseModel):
    label: Annotated[str, Field(max_length=4)]
    corners: Annotated[list[Annotated[int, Field(ge=0, le=999)]], Field(min_length=4, max_length=4)]


class Boxes(BaseModel):
    boxes: Annotated[list[Box], Field(max_length=2)]


ZOD_EMAIL = (
    r"^(?!\.)(?!.*\.\.)([A-Za-z0-9_'+\-\.]*)[A-Za-z0-9_+-]"
    r"@([A-Za-z0-9][A-Za-z0-9\-]*\.)+[A-Za-z]{2,}$"
)


def _object(properties: dict[str, Any], **more: Any) -> dict[str, Any]:
    closed = {"required": list(properties), "additionalProperties": False}
    return {"type": "object", "properties": properties, **closed, **more}


SHORT = {"type": "string", "maxLength": 4}
DIGIT = {"type": "integer", "minimum": 0, "maximum": 9}

SCHEMAS: dict[str, dict[str, Any]] = {
    "pydantic invoice": Invoice.model_json_schema(),
    "pydantic discriminated union": Home.model_json_schema(),
    "pydantic recursion": Node.model_json_schema(),
    "pydantic formats and decimals": Person.model_json_schema(),
    "pydantic boxes": Boxes.model_json_schema(),
    "zod object": _object(
        {"name": SHORT, "age": {"type": "integer", "minimum": -9007199254740991, "maximum": 99}},
        **{"$schema": "https://json-schema.org/draft/2020-12/schema"},
    ),
    "zod record": {
        "type": "object",
        "propertyNames": {"type": "string"},
        "additionalProperties": DIGIT,
        "maxProperties": 2,
    },
    "zod email": _object({"to": {"type": "string", "format": "email", "pattern": ZOD_EMAIL}}),
    "zod identifier": {"type": "string", "format": "cuid", "pattern": "^[cC][^\\s-]{8,10}$"},
    "zod tuple": {"type": "array", "prefixItems": [SHORT, DIGIT], "items": False, "minItems": 2},
    "zod nullable": _object({"a": {"anyOf": [SHORT, {"type": "null"}]}}),
    "zod date-time": {
        "type": "string",
        "format": "date-time",
        "pattern": r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ$",
    },
    "zod discriminated union": {
        "oneOf": [
            _object({"status": {"type": "string", "const": "ok"}, "value": DIGIT}),
            _object({"status": {"type": "string", "const": "bad"}, "why": SHORT}),
        ]
    },
    "openai steps": _object({
        "steps": {
            "type": "array",
            "maxItems": 2,
            "items": _object({"explanation": SHORT, "output": SHORT}),
        },
        "final_answer": SHORT,
    }),
    "openai recursion": {
        **_object({
            "value": DIGIT,
            "next": {"anyOf": [{"$ref": "#"}, {"type": "null"}]},
        })
    },
    "openai definitions": {
        **_object({"user": {"$ref": "#/$defs/user"}, "role": {"$ref": "#/$defs/role"}}),
        "$defs": {"user": _object({"id": DIGIT}), "role": {"enum": ["admin", "guest", None]}},
    },
    "draft 7 tuple": {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "type": "array",
        "items": [SHORT, DIGIT],
        "minItems": 2,
        "additionalItems": False,
    },
    "draft 7 definitions": {
        "definitions": {"a/b": DIGIT},
        "type": "array",
        "items": {"$ref": "#/definitions/a~1b"},
        "maxItems": 3,
    },
    "optional properties": {
        "type": "object",
        "properties": {"a": DIGIT, "b": SHORT, "c": {"type": "boolean"}},
        "additionalProperties": False,
    },
    "open object": {"type": "object", "properties": {"a": DIGIT}, "required": ["a", "b"]},
    "pattern properties": {
        "type": "object",
        "patternProperties": {"^x[0-9]$": DIGIT},
        "additionalProperties": False,
        "maxProperties": 2,
    },
    "all of": {"allOf": [_object({"a": DIGIT}), {"type": "object", "required": ["a"]}]},
    "all of open": {
        "allOf": [
            {"type": "object", "properties": {"a": DIGIT}, "required": ["a"]},
            {"type": "object", "properties": {"b": SHORT}, "required": ["b"]},
        ]
    },
    "several types": {"type": ["integer", "string", "null"], "maxLength": 3, "minimum": 5},
    "one of kinds": {"oneOf": [DIGIT, SHORT, {"type": "null"}]},
    "constant": {"const": {"a": [1, None, 'é\n"']}},
    "mixed enum": {"enum": ["a\\b", 1, 1.5, None, True, ["x"], {"y": 1}, "😀"]},
    "multiples": {"type": "number", "multipleOf": 0.25, "minimum": 0, "maximum": 2},
    "exclusive bounds": {"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1},
    "negative integers": {"type": "integer", "minimum": -12, "maximum": -3},
    "bounded text": {"type": "string", "minLength": 2, "maxLength": 3},
    "unanchored pattern": {"type": "string", "pattern": "ab", "maxLength": 6},
    "class pattern": {"type": "string", "pattern": "^[\\w.]{1,5}$"},
    "alternating pattern": {"type": "string", "pattern": "^(?:(?:ab|cd){1,3}|x)$"},
    "dates": {"type": "string", "format": "date"},
    "addresses": {"type": "string", "format": "ipv4"},
    "durations": {"type": "string", "format": "duration", "maxLength": 12},
    "unique is false": {"type": "array", "items": DIGIT, "uniqueItems": False, "maxItems": 2},
    "annotated": {"title": "T", "description": "d", "default": 1, "examples": [1], **DIGIT},
    "extensions": {"x-order": ["a"], "discriminator": {}, "readOnly": True, **DIGIT},
    "nested arrays": {
        "type": "array",
        "maxItems": 2,
        "items": {"type": "array", "maxItems": 2, "items": {"type": "boolean"}},
    },
    "deep": _object({"a": _object({"b": _object({"c": _object({"d": DIGIT})})})}),
    "keys to escape": _object({'a"b': DIGIT, "ü\n": DIGIT, "": DIGIT}),
}
"""Each of which a random model can finish in some hundred tokens."""

OPEN: dict[str, dict[str, Any]] = {
    "any value": {},
    "any object": {"type": "object"},
    "free text": {"type": "string"},
    "pydantic account": Account.model_json_schema(),
}
"""Whose values may be as long as the model likes."""
