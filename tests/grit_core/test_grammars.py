"""Schemas as grammars: what libraries write is taken, the rest is refused by its place."""

import json
import time
import uuid
from typing import Any

import jsonschema_rs
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from llguidance import LLMatcher, LLTokenizer
from pydantic import UUID4, Base64Str, BaseModel

from grit_core.errors import Fault, InvalidConfig
from grit_core.grammars import (
    LIMITS,
    json_rule,
    json_schema_grammar,
    validate_grammar,
)
from grit_core.json_schemas import MAX_OPTIONAL, MAX_SCHEMA_CHARACTERS, parse_json_schema
from tests.grit_core.answer_schemas import OPEN, SCHEMAS

BYTES = LLTokenizer("byte")


def faults_of(schema: dict[str, Any], **options: Any) -> tuple[Fault, ...]:
    with pytest.raises(InvalidConfig) as refused:
        json_schema_grammar(schema, **options)
    return refused.value.faults


def allows(schema: dict[str, Any], text: str) -> bool:
    """Whether a text is a whole answer under a schema."""
    return matches(json_schema_grammar(schema), text)


def matches(grammar: str, text: str) -> bool:
    matcher = LLMatcher(BYTES, grammar, log_level=0, limits=LIMITS)
    assert not matcher.is_error(), matcher.get_error()
    data = list(text.encode())
    return matcher.try_consume_tokens(data) == len(data) and matcher.is_accepting()


# --- taken


@pytest.mark.parametrize("name", [*SCHEMAS, *OPEN])
def test_what_people_and_libraries_write_is_taken(name: str) -> None:
    validate_grammar(json_schema_grammar({**SCHEMAS, **OPEN}[name]))


def test_compact_usual_and_indented_json_may_be_written_and_no_endless_blanks() -> None:
    value = {"a": [1, {"b": None}], "c": "x y"}
    schema = {"type": "object"}
    for text in (
        json.dumps(value),
        json.dumps(value, separators=(",", ":")),
        *(json.dumps(value, indent=indent) for indent in (2, 4, "\t")),
        " " + json.dumps(value),
    ):
        assert allows(schema, text), text
    for text in ('{  "a": 1}', '{\n\n"a": 1}', '{"a":' + "\n" + " " * 30 + "1}", '  {"a": 1}'):
        assert not allows(schema, text), text


def test_what_json_dumps_escapes_may_be_written() -> None:
    for text in (json.dumps('é😀\n\t"\\'), json.dumps("é😀", ensure_ascii=False)):
        assert allows({"type": "string"}, text)


def test_an_object_and_nothing_else_is_a_json_object() -> None:
    assert matches(json_schema_grammar({"type": "object"}), '{"a": {"b": [1, 2.5e3, true]}}')
    assert not matches(json_schema_grammar({"type": "object"}), "[1]")
    assert not matches(json_schema_grammar({"type": "object"}), '{"a": 1} {')


def test_a_rule_stands_in_a_larger_grammar() -> None:
    rule = json_rule({"type": "object", "properties": {"a": {"type": "integer"}}})
    grammar = f'start: "call(" args ")"\nargs: {rule}\n'
    validate_grammar(grammar)
    assert matches(grammar, 'call({"a": 1})')
    assert not matches(grammar, 'call({"a": "x"})')


def test_an_object_has_no_other_properties_than_those_described_unless_the_schema_says_so() -> None:
    described = {"type": "object", "properties": {"a": {"type": "integer"}}}
    assert allows(described, '{"a": 1}')
    assert not allows(described, '{"a": 1, "b": 2}')
    nested = {"$defs": {"part": described}, "type": "array", "items": {"$ref": "#/$defs/part"}}
    assert not allows(nested, '[{"a": 1, "b": 2}]')
    for more in ({"additionalProperties": True}, {"required": ["a", "b"]}):
        assert allows({**described, **more}, '{"a": 1, "b": 2}'), more


@pytest.mark.parametrize("combined", ["allOf", "anyOf", "oneOf"])
def test_an_object_that_is_described_in_several_places_keeps_all_of_them(combined: str) -> None:
    digit = {"type": "integer", "minimum": 0, "maximum": 9}
    other = {"type": "object", "properties": {"b": digit}, "required": ["b"]}
    first = {"type": "object", "properties": {"a": digit}, "required": ["a"]}
    schema = {"allOf": [first, other]} if combined == "allOf" else {**first, combined: [other]}
    assert allows(schema, '{"a": 1, "b": 2}')


def test_alternatives_with_a_discriminator_are_held_apart() -> None:
    home = SCHEMAS["pydantic discriminated union"]
    assert allows(home, '{"pet": {"kind": "cat", "lives": 9}}')
    assert allows(home, '{"pet": {"kind": "dog", "tricks": ["sit"]}}')
    assert not allows(home, '{"pet": {"lives": 9}}')
    assert not allows(home, '{"pet": {"kind": "dog", "lives": 9}}')


def test_patterns_that_pydantic_and_zod_write_with_look_around_hold() -> None:
    decimal = {"anyOf": [{"type": "string", "pattern": r"^(?!^[-+.]*$)[+-]?0*\d*\.?\d*$"}]}
    assert all(allows(decimal, f'"{text}"') for text in ("1", "-0.50", "+.5", "7."))
    assert not any(allows(decimal, f'"{text}"') for text in ("", ".", "-", "1.2.3"))
    email = SCHEMAS["zod email"]
    assert allows(email, '{"to": "a.b+c@mail.example.org"}')
    assert not any(
        allows(email, f'{{"to": "{text}"}}')
        for text in ("a..b@x.org", ".a@x.org", "a@x", "a.@x.org")
    )


def test_names_that_are_listed_are_the_properties() -> None:
    names = {"$defs": {"color": {"enum": ["red", "blue"], "title": "Color", "type": "string"}}}
    for described in ({"$ref": "#/$defs/color"}, {"enum": ["red", "blue"]}):
        record = {
            **names,
            "type": "object",
            "propertyNames": described,
            "additionalProperties": {"type": "boolean"},
        }
        assert allows(record, '{"red": true, "blue": false}')
        assert not allows(record, '{"red": 1}')
        assert not allows(record, '{"green": true}')


def test_formats_that_pydantic_writes_hold() -> None:
    class Stored(BaseModel):
        id: UUID4
        data: Base64Str

    schema = Stored.model_json_schema()
    assert allows(schema, json.dumps({"id": str(uuid.UUID(int=0, version=4)), "data": "aGk="}))
    assert not allows(schema, json.dumps({"id": str(uuid.UUID(int=0, version=1)), "data": "aGk="}))
    assert not allows(schema, json.dumps({"id": str(uuid.UUID(int=0, version=4)), "data": "a"}))
    assert allows({"format": "int64"}, "5")


def test_notes_of_other_programs_are_passed_over() -> None:
    notes = ["x-order", "enumNames", "markdownDescription", "propertyOrdering", "$comment", "xml"]
    assert allows({"type": "integer", **dict.fromkeys(notes, "a")}, "5")


def test_a_schema_cannot_change_how_white_space_is_bounded() -> None:
    loose = {"type": "object", "x-guidance": {"whitespace_pattern": " *", "lenient": True}}
    assert not allows(loose, '{     "a": 1}')
    assert faults_of({**loose, "not": {}})[0].pointer == "/schema/not"


# --- refused


@pytest.mark.parametrize(
    ("schema", "pointer", "words"),
    [
        ({"type": "foo"}, "", "Invalid type: foo"),
        ({"properties": {"a": {"items": {"type": "foo"}}}}, "/properties/a/items", "Invalid type"),
        ({"items": {"not": {"type": "null"}}}, "/items/not", "`not`"),
        (
            {"properties": {"a": {"uniqueItems": True}}},
            "/properties/a/uniqueItems",
            "`uniqueItems`",
        ),
        ({"anyOf": [{}, {"if": {}}]}, "/anyOf/1/if", "`if`"),
        ({"type": "string", "nullable": True}, "/nullable", '"null"'),
        ({"type": "number", "exclusiveMinimum": True}, "/exclusiveMinimum", "bound itself"),
        ({"propertyNames": {"pattern": "^a"}}, "/propertyNames", "patternProperties"),
        ({"properties": {"a/b": {"format": "sound"}}}, "/properties/a~1b/format", "'sound'"),
        ({"$ref": "https://example.com/schema"}, "/$ref", "#/$defs/"),
        ({"properties": {"a": {"$ref": "#/$defs/b"}}}, "/properties/a", "/$defs/b"),
        (
            {"properties": {"a": {"$ref": "#/$defs/b"}}, "$defs": {"b": {"pattern": "(?=x)y"}}},
            "/$defs/b",
            "look-ahead",
        ),
        ({"enum": []}, "", "empty"),
        ({"properties": {"a": {"maxLength": -1}}}, "/properties/a", "maxLength"),
        (
            {"oneOf": [{"type": "string"}, {"type": "string", "maxLength": 3}]},
            "",
            "use `anyOf`",
        ),
        (
            {"type": "object", "properties": {}, "required": ["x"], "additionalProperties": False},
            "",
            "'x'",
        ),
        ({"items": {"minimum": "3"}}, "/items", "minimum"),
        ({"properties": {"a": {"tpye": "string"}}}, "/properties/a/tpye", "did you mean `type`?"),
        ({"type": "string", "max_length": 3}, "/max_length", "did you mean `maxLength`?"),
        ({"type": "object", "requierd": ["a"]}, "/requierd", "did you mean `required`?"),
        (
            {"properties": {"a": {"type": "integer", "required": True}}},
            "/properties/a/required",
            "list the names",
        ),
        ({"$ref": "#"}, "", "refers to itself"),
        ({"additionalProperties": {"pattern": "("}}, "/additionalProperties", "group"),
    ],
)
def test_what_answers_cannot_be_held_to_is_refused_by_its_place(
    schema: dict[str, Any], pointer: str, words: str
) -> None:
    fault = faults_of(schema, pointer="/response_format/schema")[0]
    assert fault.pointer == f"/response_format/schema{pointer}"
    assert fault.code == "schema_unsupported"
    assert words in fault.detail


def test_all_keywords_that_cannot_be_held_are_named_at_once() -> None:
    schema = {"properties": {"a": {"not": {}}, "b": {"contains": {}}}, "if": {}}
    found = {fault.pointer for fault in faults_of(schema)}
    assert found == {"/schema/if", "/schema/properties/a/not", "/schema/properties/b/contains"}


def test_a_grammar_that_is_none_is_refused() -> None:
    with pytest.raises(InvalidConfig) as refused:
        validate_grammar("start: nothing", pointer="/tools")
    assert refused.value.faults[0].pointer == "/tools"
    assert "nothing" in refused.value.faults[0].detail


# --- hostile


def chain(length: int, **more: Any) -> dict[str, Any]:
    """Definitions that lead from each to the next."""
    definitions: dict[str, Any] = {
        f"n{index}": {"type": "object", "properties": {"a": {"$ref": f"#/$defs/n{index + 1}"}}}
        for index in range(length)
    }
    return {"$ref": "#/$defs/n0", "$defs": {**definitions, f"n{length}": {}}, **more}


@pytest.mark.parametrize(
    ("schema", "words"),
    [
        ({"enum": [f"v{index}" for index in range(1_000_000)]}, "characters"),
        (chain(1000), "levels deep"),
        ({"properties": {f"p{index}": {} for index in range(3000)}}, "optional properties"),
        (
            {
                "allOf": [
                    {"anyOf": [{"properties": {f"a{n}": {}}}, {"properties": {f"b{n}": {}}}]}
                    for n in range(20)
                ]
            },
            "too large",
        ),
        ({"type": "integer", "multipleOf": 999_999_937, "minimum": 1}, "too large"),
        (
            {"allOf": [{"type": "string", "pattern": f"{n}a.*{n}b"} for n in range(12)]},
            "too many to be combined",
        ),
    ],
    ids=["enum", "chain", "optional", "intersections", "multiples", "patterns"],
)
def test_a_schema_that_would_take_the_service_down_is_refused_within_seconds(
    schema: dict[str, Any], words: str
) -> None:
    started = time.thread_time()
    fault = faults_of(schema)[0]
    assert time.thread_time() - started < 5
    assert fault.code == "schema_too_large"
    assert words in fault.detail


@pytest.mark.parametrize(
    "schema",
    [
        chain(190),
        {"type": "string", "pattern": "^(a+)+b(.*)*c$"},
        {"type": "string", "pattern": "^((a{1,1000}){1,1000}){1,1000}$"},
        {"type": "string", "minLength": 10**6},
        {"type": "array", "minItems": 10**6, "items": {"$ref": "#"}},
        {"$ref": "#/$defs/a", "$defs": {"a": {"anyOf": [{"$ref": "#/$defs/a"}, {"const": 1}]}}},
        {"properties": {f"p{index}": {} for index in range(MAX_OPTIONAL)}},
        {"anyOf": [{"properties": {"a": {"maxLength": size}}} for size in range(1500)]},
        {"enum": list(range(17_000))},
    ],
    ids=[
        *("chain", "stars", "counts", "length", "items", "left recursion", "optional"),
        *("alternatives", "enum"),
    ],
)
def test_what_is_large_and_can_be_held_costs_little(schema: dict[str, Any]) -> None:
    started = time.thread_time()
    matcher = LLMatcher(BYTES, json_schema_grammar(schema), log_level=0, limits=LIMITS)
    matcher.compute_bitmask()
    assert not matcher.is_error()
    assert time.thread_time() - started < 5


def test_the_bound_on_a_schema_is_its_text_without_white_space() -> None:
    room = MAX_SCHEMA_CHARACTERS - len('{"description":""}')
    parse_json_schema({"description": "x" * room})
    with pytest.raises(InvalidConfig, match="has 100,001 characters; at most 100,000"):
        parse_json_schema({"description": "x" * (room + 1)})


# --- any schema

leaves = st.sampled_from([
    {"type": "integer", "minimum": -5, "maximum": 5},
    {"type": "string", "maxLength": 3},
    {"type": "string", "pattern": "^[a-c]{1,2}$"},
    {"type": "boolean"},
    {"type": "null"},
    {"enum": ["x", 1, None]},
    {"const": "é"},
    {"type": "number", "multipleOf": 0.5, "minimum": 0, "maximum": 3},
])


def _objects(properties: dict[str, Any]) -> st.SearchStrategy[dict[str, Any]]:
    names = (
        st.lists(st.sampled_from(sorted(properties)), unique=True) if properties else st.just([])
    )
    return names.map(
        lambda required: {
            "type": "object",
            "properties": properties,
            "required": required,
            "additionalProperties": False,
        }
    )


schemas = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.builds(
            lambda items, most: {"type": "array", "items": items, "maxItems": most},
            inner,
            st.integers(0, 3),
        ),
        st.dictionaries(st.sampled_from(["a", "b", 'c"', "d\n", ""]), inner, max_size=3).flatmap(
            _objects
        ),
        st.lists(inner, min_size=1, max_size=3).map(lambda each: {"anyOf": each}),
    ),
    max_leaves=6,
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(schema=schemas, random=st.randoms(use_true_random=False))
def test_whatever_is_chosen_among_the_allowed_bytes_fits_the_schema(
    schema: dict[str, Any], random: Any
) -> None:
    matcher = LLMatcher(BYTES, json_schema_grammar(schema), log_level=0, limits=LIMITS)
    text = bytearray()
    while not matcher.is_stopped():
        bits = int.from_bytes(matcher.compute_bitmask(), "little")
        allowed = [byte for byte in range(256) if bits >> byte & 1]
        if matcher.is_accepting() and (not allowed or random.random() < 0.5):
            break
        text.append(random.choice(allowed))
        assert matcher.consume_token(text[-1])
    validator = jsonschema_rs.validator_for(schema)
    assert validator.is_valid(json.loads(text.decode())), text
