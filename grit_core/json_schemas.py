"""A JSON schema that an answer is held to: bounded, without what cannot be held, in plain keywords.

What the grammar engine would ignore in silence is refused here, with the place where it stands;
what libraries write and means something simpler is rewritten. What the engine itself refuses is
left to it (`grit_core.grammars`).
"""

import json
from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from typing import Any, Final, TypeGuard

from grit_core.errors import Fault, InvalidConfig
from grit_core.json_text import pointer_of

MAX_SCHEMA_CHARACTERS: Final = 100_000
"""Bound on a schema, written without white space."""
MAX_CHAIN: Final = 600
"""Bound on the levels of a schema, when each definition stands where it is referred to.

The engine goes down one level by one call, and a chain of some thousands overflows its stack."""

MAX_OPTIONAL: Final = 300
"""Bound on the properties of one object that need not be there.

Any of them may come next, and the work of a token grows with the square of their number."""

_MAPS: Final = ("$defs", "definitions", "properties", "patternProperties")
_LISTS: Final = ("anyOf", "oneOf", "allOf", "prefixItems", "items")
_SINGLES: Final = ("items", "additionalItems", "additionalProperties")

_WITHOUT_EFFECT: Final[Mapping[str, tuple[Any, ...]]] = {
    "nullable": (False,),
    "propertyNames": (True, {}, {"type": "string"}),
    "unevaluatedItems": (True, {}),
    "unevaluatedProperties": (True, {}),
    "uniqueItems": (False,),
}
"""Keywords that are dropped where they say nothing, and refused elsewhere."""

_FIXES: Final[Mapping[str, str]] = {
    "contains": "describe all items with `items`",
    "dependencies": "list the combinations with `anyOf`",
    "dependentRequired": "list the combinations with `anyOf`",
    "dependentSchemas": "list the combinations with `anyOf`",
    "else": "list the combinations with `anyOf`",
    "if": "list the combinations with `anyOf`",
    "maxContains": "bound all items with `maxItems`",
    "minContains": "bound all items with `minItems`",
    "not": "say what is allowed, with `enum`, `pattern` or `anyOf`",
    "nullable": 'allow null by `"type": ["string", "null"]` or an `anyOf`',
    "propertyNames": "use `patternProperties`",
    "then": "list the combinations with `anyOf`",
    "unevaluatedItems": "use `items`",
    "unevaluatedProperties": "use `additionalProperties`",
    "uniqueItems": "leave it out, and drop repeated items after the answer",
    "$dynamicRef": "use `$ref`",
    "$recursiveRef": "use `$ref`",
}
"""Keywords that answers cannot be held to, and what to write in their place."""

_FORMATS: Final = frozenset({
    *("date", "date-time", "time", "duration", "email", "hostname", "ipv4", "ipv6", "uuid"),
    *("unknown", "uri"),
})
"""Formats of texts that the engine enforces."""

_LABELS: Final = frozenset({
    *("binary", "byte", "directory-path", "file-path", "json-string", "password", "path"),
    *("double", "float", "int32", "int64"),
})
"""Formats that say what a value is for, not which values there are."""

_FORMAT_PATTERNS: Final[Mapping[str, str]] = {
    "base64": r"^([A-Za-z0-9+/]{4})*([A-Za-z0-9+/]{2}==|[A-Za-z0-9+/]{3}=)?$",
    # pydantic's UUID1 to UUID8
    **{
        f"uuid{version}": rf"^[0-9a-f]{{8}}-[0-9a-f]{{4}}-{version}[0-9a-f]{{3}}"
        r"-[89ab][0-9a-f]{3}-[0-9a-f]{12}$"
        for version in range(1, 9)
    },
}
"""Formats that libraries write and the engine does not know, as patterns."""

_KEYWORDS: Final = (
    *("additionalProperties", "allOf", "anyOf", "const", "enum", "exclusiveMaximum"),
    *("exclusiveMinimum", "format", "items", "maxItems", "maxLength", "maxProperties", "maximum"),
    *("minItems", "minLength", "minProperties", "minimum", "multipleOf", "oneOf", "pattern"),
    *("patternProperties", "prefixItems", "properties", "required", "type"),
)
"""Keywords that hold an answer, and that a slip of the pen takes out of force."""
_NEIGHBOURS: Final = frozenset({"additionalItems", "propertyNames"})
"""Keywords that are written like others, and are none of `_KEYWORDS`."""
_LEAST_LIKENESS: Final = 0.75
_NOTES: Final = frozenset({"title", "description", "default", "examples", "deprecated"})

_PATTERNS: Final[Mapping[str, str]] = {
    # pydantic's Decimal
    r"^(?!^[-+.]*$)[+-]?0*\d*\.?\d*$": r"^[+-]?(\d+\.?\d*|\.\d+)$",
    # zod's email
    (
        r"^(?!\.)(?!.*\.\.)([A-Za-z0-9_'+\-\.]*)[A-Za-z0-9_+-]"
        r"@([A-Za-z0-9][A-Za-z0-9\-]*\.)+[A-Za-z]{2,}$"
    ): (
        r"^(?:[A-Za-z0-9_'+\-]+\.)*[A-Za-z0-9_'+\-]*[A-Za-z0-9_+-]"
        r"@([A-Za-z0-9][A-Za-z0-9\-]*\.)+[A-Za-z]{2,}$"
    ),
}
"""Patterns with look-around that libraries write, and equal ones without."""

Path = tuple[str | int, ...]


def parse_json_schema(schema: Mapping[str, Any], *, pointer: str = "/schema") -> dict[str, Any]:
    """Return a schema in the keywords that the grammar engine enforces.

    Args:
        schema: As it was sent.
        pointer: Where it stands in the request; the faults' pointers begin with it.

    Raises:
        InvalidConfig: It is too large, or answers cannot be held to it; with every fault that is
            found before the engine sees it.
    """
    num_characters = len(json.dumps(schema, separators=(",", ":")))
    if num_characters > MAX_SCHEMA_CHARACTERS:
        raise InvalidConfig([
            Fault(
                pointer=pointer,
                code="schema_too_large",
                detail=f"The schema has {num_characters:,} characters; at most"
                f" {MAX_SCHEMA_CHARACTERS:,} are allowed. Leave out descriptions, or split it.",
            )
        ])
    reader = _Reader(schema, pointer)
    found: dict[str, Any] = reader.read(schema, ())
    reader.check_chain()
    if reader.faults:
        raise InvalidConfig(reader.faults)
    return found


def subschemas(schema: Any) -> Iterator[tuple[Path, Any]]:
    """Yield the schemas directly inside a schema, with the keys that lead to them."""
    if not isinstance(schema, dict):
        return
    for key in _MAPS:
        if isinstance(schema.get(key), dict):
            yield from (((key, name), child) for name, child in schema[key].items())
    for key in _LISTS:
        if isinstance(schema.get(key), list):
            yield from (((key, index), child) for index, child in enumerate(schema[key]))
    for key in _SINGLES:
        if isinstance(schema.get(key), dict | bool):
            yield (key,), schema[key]


class _Reader:
    """Reads one schema and collects what is wrong with it."""

    def __init__(self, root: Mapping[str, Any], pointer: str) -> None:
        self._root, self._pointer = root, pointer
        self._closes = not _combines(root)
        self._targets: dict[str, Any] = {}
        self.faults: list[Fault] = []

    def read(self, schema: Any, path: Path) -> Any:
        """Return a schema and those inside it in plain keywords."""
        if not isinstance(schema, dict):
            return schema
        plain = {key: value for key, value in schema.items() if not _says_nothing(key, value)}
        self._plain_names(plain)
        self._check_keywords(plain, path)
        self._check_bounds(plain, path)
        self._note_reference(plain, path)
        self._plain_text(plain, path)
        self._plain_choice(plain)
        if self._closes and _is_left_open(plain):
            plain["additionalProperties"] = False
        for steps, child in list(subschemas(plain)):
            _put(plain, steps, self.read(child, path + steps))
        return plain

    def check_chain(self) -> None:
        """Refuse definitions that lead from one to the next too often."""
        levels = _height(self._root) + sum(_height(each) for each in self._targets.values())
        if levels > MAX_CHAIN:
            self._fault(
                (),
                "schema_too_large",
                f"The schema is up to {levels:,} levels deep, with its definitions where they are"
                f" referred to; at most {MAX_CHAIN} are allowed. Use fewer definitions.",
            )

    def _check_keywords(self, plain: dict[str, Any], path: Path) -> None:
        for key in plain:
            if key in _FIXES:
                self._refuse(key, _FIXES[key], path)
            elif meant := _meant_keyword(key):
                self._fault(
                    (*path, key),
                    "schema_unsupported",
                    f"There is no keyword `{key}`; did you mean `{meant}`? Write a note of your"
                    f" own as `x-{key}`.",
                )
        if "required" in plain and not _is_names(plain["required"]):
            fix = "list the names of the properties that have to be there, beside `properties`"
            self._refuse("required", fix, path)

    def _check_bounds(self, plain: dict[str, Any], path: Path) -> None:
        for key in ("exclusiveMinimum", "exclusiveMaximum"):
            if isinstance(plain.get(key), bool):
                self._refuse(key, "give the bound itself, as JSON Schema does since 2017", path)
        described, required = plain.get("properties"), plain.get("required")
        if not isinstance(described, dict):
            return
        num_optional = len(described.keys() - set(required if _is_names(required) else ()))
        if num_optional > MAX_OPTIONAL:
            self._fault(
                (*path, "properties"),
                "schema_too_large",
                f"The object has {num_optional:,} optional properties; at most {MAX_OPTIONAL} are"
                " allowed. Name the others in `required`, or put them into objects of their own.",
            )

    def _note_reference(self, plain: dict[str, Any], path: Path) -> None:
        target = plain.get("$ref")
        if not isinstance(target, str) or target in self._targets:
            return
        if not target.startswith("#"):
            self._refuse("$ref", "put the definition into `$defs` and refer to `#/$defs/...`", path)
            return
        self._targets[target] = _resolve(self._root, target)

    def _plain_names(self, plain: dict[str, Any]) -> None:
        """Write names that are listed, as of `dict[Literal["a", "b"], int]`, as properties."""
        names = _listed_texts(self._resolved(plain.get("propertyNames")))
        if names is None or plain.keys() & {"properties", "patternProperties"}:
            return
        value = plain.pop("additionalProperties", True)
        plain["properties"] = dict.fromkeys(names, value)
        plain["additionalProperties"] = False
        del plain["propertyNames"]

    def _plain_text(self, plain: dict[str, Any], path: Path) -> None:
        pattern, text_format = plain.get("pattern"), plain.get("format")
        if isinstance(pattern, str):
            plain["pattern"] = _PATTERNS.get(pattern, pattern)
        if not isinstance(text_format, str) or text_format in _FORMATS:
            return
        if text_format in _FORMAT_PATTERNS and pattern is None:
            plain["pattern"] = pattern = _FORMAT_PATTERNS[text_format]
        if text_format in _LABELS or isinstance(pattern, str) or not _allows_text(plain):
            del plain["format"]
        else:
            self._refuse(
                "format",
                f"use one of {', '.join(sorted(_FORMATS - {'unknown'}))}, or a `pattern`",
                path,
                value=text_format,
            )

    def _plain_choice(self, plain: dict[str, Any]) -> None:
        """Write alternatives of which no two fit one value as `anyOf`, which says the same."""
        branches = plain.get("oneOf")
        if not isinstance(branches, list) or "anyOf" in plain:
            return
        resolved = [self._resolved(branch) for branch in branches]
        named = plain.get("discriminator")
        named = named.get("propertyName") if isinstance(named, dict) else None
        for name in [named] if isinstance(named, str) else _shared_names(resolved):
            if _tells_apart(name, resolved):
                # A branch without the property would fit beside another one.
                plain["anyOf"] = [
                    _with_required(branch, name, full.get("required"))
                    for branch, full in zip(branches, resolved, strict=True)
                ]
                del plain["oneOf"]
                return

    def _resolved(self, schema: Any) -> Any:
        target = schema.get("$ref") if isinstance(schema, dict) else None
        return _resolve(self._root, target) if isinstance(target, str) else schema

    def _refuse(self, key: str, fix: str, path: Path, value: str | None = None) -> None:
        what = f"`{key}`" if value is None else f"`{key}` {value!r}"
        detail = f"Answers cannot be held to {what}: {fix}."
        self._fault((*path, key), "schema_unsupported", detail)

    def _fault(self, path: Path, code: str, detail: str) -> None:
        self.faults.append(
            Fault(pointer=self._pointer + pointer_of(path), code=code, detail=detail)
        )


def _says_nothing(key: str, value: Any) -> bool:
    # What a schema says to the engine about white space is the service's to say.
    return key == "x-guidance" or any(
        type(value) is type(each) and value == each for each in _WITHOUT_EFFECT.get(key, ())
    )


def _combines(schema: Any) -> bool:
    """Whether some object is described in several places, of which none has all its properties."""
    if not isinstance(schema, dict):
        return False
    parts = schema.get("allOf")
    beside = "properties" in schema and schema.keys() & {"$ref", "allOf", "anyOf", "oneOf"}
    several = isinstance(parts, list) and len(parts) > 1
    return bool(beside) or several or any(_combines(child) for _, child in subschemas(schema))


def _is_left_open(schema: Mapping[str, Any]) -> bool:
    """Whether an object may have properties beside those that are described, by omission only.

    A schema that leaves it open is met by an object that has no others. A model that may write
    others can go on with them until it is cut off, and no reader of the answer knows them.
    """
    described, required = schema.get("properties"), schema.get("required", [])
    return (
        isinstance(described, dict)
        and bool(described)
        and not schema.keys() & {"additionalProperties", "patternProperties", "minProperties"}
        and _is_names(required)
        and described.keys() >= set(required)
    )


def _meant_keyword(key: str) -> str:
    """Return the keyword that another one is written like by mistake; empty for none."""
    if key in _KEYWORDS or key in _NEIGHBOURS or key.startswith("x-"):
        return ""
    plain = key.replace("_", "").casefold()
    same = [each for each in _KEYWORDS if each.casefold() == plain]
    return next(iter(same or get_close_matches(key, _KEYWORDS, 1, _LEAST_LIKENESS)), "")


def _listed_texts(schema: Any) -> list[str] | None:
    """Return the texts that a schema lists; `None` where it does not only that."""
    if not isinstance(schema, dict) or schema.keys() - {"type", "enum", "const", *_NOTES}:
        return None
    listed = [schema["const"]] if "const" in schema else schema.get("enum")
    return listed if _is_names(listed) else None


def _is_names(value: Any) -> TypeGuard[list[str]]:
    return isinstance(value, list) and all(isinstance(each, str) for each in value)


def _allows_text(schema: Mapping[str, Any]) -> bool:
    kinds = schema.get("type", "string")
    return "string" in (kinds if isinstance(kinds, list) else [kinds])


def _put(schema: dict[str, Any], steps: Path, child: Any) -> None:
    key = str(steps[0])
    if len(steps) == 1:
        schema[key] = child
        return
    within = schema[key]
    copied = within.copy()
    copied[steps[1]] = child
    schema[key] = copied


def _resolve(root: Any, reference: str) -> Any:
    """Return what a reference inside a schema names; nothing where it names nothing."""
    found = root
    for step in reference.removeprefix("#").split("/")[1:]:
        key = step.replace("~1", "/").replace("~0", "~")
        if isinstance(found, dict) and key in found:
            found = found[key]
        elif isinstance(found, list) and key.isascii() and key.isdigit() and int(key) < len(found):
            found = found[int(key)]
        else:
            return None
    return found


def _height(value: Any) -> int:
    """Levels of a JSON value; what is defined beside it counts where it is referred to."""
    if isinstance(value, dict):
        children = [child for key, child in value.items() if key not in {"$defs", "definitions"}]
    elif isinstance(value, list):
        children = value
    else:
        return 0
    return 1 + max(map(_height, children), default=0)


def _shared_names(branches: list[Any]) -> list[str]:
    """Return the properties that all branches describe, in the order of the first."""
    described = [
        branch.get("properties") if isinstance(branch, dict) else None for branch in branches
    ]
    if not described or not all(isinstance(each, dict) for each in described):
        return []
    first, *others = (each or {} for each in described)
    names = [branch.get("required") for branch in branches]
    required = [set(each) if _is_names(each) else set() for each in names]
    return [
        name
        for name in first
        if all(name in other for other in others) and all(name in each for each in required)
    ]


def _with_required(branch: dict[str, Any], name: str, required: Any) -> dict[str, Any]:
    if _is_names(required) and name in required:
        return branch
    own = branch.get("required")
    return {**branch, "required": [*(own if _is_names(own) else ()), name]}


def _tells_apart(name: str, branches: list[Any]) -> bool:
    """Whether a property has other values in each branch."""
    seen: set[str] = set()
    for branch in branches:
        properties = branch.get("properties") if isinstance(branch, dict) else None
        described = properties.get(name) if isinstance(properties, dict) else None
        if not isinstance(described, dict):
            return False
        values = described.get("enum", [described["const"]] if "const" in described else [])
        if not isinstance(values, list):
            return False
        texts = {json.dumps(value, sort_keys=True) for value in values}
        if not texts or texts & seen:
            return False
        seen |= texts
    return True
