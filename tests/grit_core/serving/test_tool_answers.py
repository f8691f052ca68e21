"""Answers with tools of random models: at any temperature, beside others, streamed and whole."""

import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jsonschema_rs
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from grit_core.errors import InvalidConfig
from grit_core.generation import AdapterSource, Generation, GenerationEngine, GenerationRequest
from grit_core.grammars import json_schema_grammar
from grit_core.records import parse_prompt
from grit_core.tools.definitions import Tool, ToolMode, ToolUse
from tests.grit_core.data.tool_templates import BRACKETED, TAGGED
from tests.grit_core.serving.adapters import EVERYWHERE, adapter_source
from tests.tiny_models import tiny_causal_folder

if TYPE_CHECKING:
    from grit_core.tools.call_reader import CallPiece

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),
]

SCHEMAS: dict[str, dict[str, Any]] = {
    "look_up": {
        "type": "object",
        "properties": {
            "place": {"type": "string", "maxLength": 8},
            "days": {"type": "integer", "minimum": 0, "maximum": 40},
            "unit": {"enum": ["c", "f"]},
        },
        "required": ["place", "days", "unit"],
        "additionalProperties": False,
    },
    "send": {
        "type": "object",
        "properties": {
            "to": {"type": "array", "items": {"$ref": "#/$defs/person"}, "maxItems": 2},
            "note": {"anyOf": [{"type": "string", "maxLength": 5}, {"type": "null"}]},
        },
        "required": ["to", "note"],
        "additionalProperties": False,
        "$defs": {"person": {"type": "string", "enum": ["Ada", "Bob"]}},
    },
}
TOOLS = (
    *(Tool(name=name, parameters=schema) for name, schema in SCHEMAS.items()),
    Tool(name="stop", description="End it."),
)
NAMED = ToolUse(tools=TOOLS, mode=ToolMode.REQUIRED, name="look_up")
REQUIRED = ToolUse(tools=TOOLS, mode=ToolMode.REQUIRED)
ONE = ToolUse(tools=TOOLS, mode=ToolMode.REQUIRED, parallel=False)
AUTO = ToolUse(tools=TOOLS)
CHAT = parse_prompt([{"role": "user", "content": "What is the weather?"}])


def lengthened(folder: Path, template: str | None = None) -> str:
    """Give a tiny model room for tools, and another chat template."""
    config = json.loads((folder / "config.json").read_text())
    config["max_position_embeddings"] = 8192
    (folder / "config.json").write_text(json.dumps(config))
    if template is not None:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        tokenizer.chat_template = template
        tokenizer.save_pretrained(folder)
    return str(folder)


def bent(folder: Path, token: str) -> str:
    """Make a token the likeliest beginning of an answer."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([token], special_tokens=True)
    tokenizer.save_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    prompt = tokenizer("<|im_start|>assistant\n", return_tensors="pt", add_special_tokens=False)
    with torch.no_grad():
        hidden = model.model(**prompt).last_hidden_state[0, -1]
        model.lm_head.weight[tokenizer.convert_tokens_to_ids(token)] = hidden * 10
    model.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def engine() -> Iterator[GenerationEngine]:
    made = GenerationEngine(max_bases=4)
    yield made
    made.close()


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model whose chat template has no tools."""
    return lengthened(tiny_causal_folder(tmp_path_factory.mktemp("plain")))


@pytest.fixture(scope="module")
def tagged(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tiny_causal_folder(tmp_path_factory.mktemp("tagged"))
    return bent(Path(lengthened(folder, TAGGED)), "<tool_call>")


@pytest.fixture(scope="module")
def bracketed(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tiny_causal_folder(tmp_path_factory.mktemp("bracketed"))
    return bent(Path(lengthened(folder, BRACKETED)), "[TOOL_CALLS]")


@pytest.fixture
def ask(engine: GenerationEngine) -> Callable[..., Generation]:
    def answered(source: str, tools: ToolUse | None, **fields: Any) -> Generation:
        named = {"adapter", "on_text", "on_call"} & fields.keys()
        options = {name: fields.pop(name) for name in named}
        fields = {"chat": CHAT, "max_new_tokens": 400, "temperature": 1.0, **fields}
        return engine.generate(source, GenerationRequest(tools=tools, **fields), **options)

    return answered


def check(answer: Generation) -> None:
    """Every call is of a tool and has arguments that its parameters allow."""
    for call in answer.tool_calls:
        schema = SCHEMAS.get(call.name, {"type": "object", "maxProperties": 0})
        jsonschema_rs.validate(schema, json.loads(call.arguments))


@pytest.mark.parametrize(
    ("model", "use", "most"),
    [
        ("plain", NAMED, 1),
        ("plain", REQUIRED, 32),
        ("tagged", NAMED, 1),
        ("tagged", ONE, 1),
        ("bracketed", ONE, 1),
        ("bracketed", REQUIRED, 32),
    ],
)
def test_a_forced_call_has_arguments_that_its_parameters_allow(
    request: pytest.FixtureRequest,
    ask: Callable[..., Generation],
    model: str,
    use: ToolUse,
    most: int,
) -> None:
    names = set()
    for seed in range(2):
        answer = ask(request.getfixturevalue(model), use, seed=seed)
        assert answer.text == ""
        if answer.finish_reason == "length":
            assert use is REQUIRED  # a random model goes on to call
            continue
        assert answer.finish_reason == "tool_calls"
        assert 1 <= len(answer.tool_calls) <= most
        check(answer)
        names |= {call.name for call in answer.tool_calls}
    assert names <= ({"look_up"} if use is NAMED else {"look_up", "send", "stop"})


@pytest.mark.parametrize("model", ["tagged", "bracketed"])
def test_a_model_that_chooses_to_call_is_held_to_the_tools(
    request: pytest.FixtureRequest, ask: Callable[..., Generation], model: str
) -> None:
    source = request.getfixturevalue(model)
    use = ToolUse(tools=TOOLS, parallel=False)
    answer = ask(source, use, temperature=0.0)
    assert answer.finish_reason == "tool_calls"
    assert len(answer.tool_calls) == 1
    check(answer)


def test_a_model_that_does_not_call_answers_with_text(
    ask: Callable[..., Generation], plain: str
) -> None:
    answers = [ask(plain, AUTO, seed=seed, max_new_tokens=60) for seed in range(4)]
    assert all(answer.text and not answer.tool_calls for answer in answers)
    assert {answer.finish_reason for answer in answers} <= {"stop", "length"}


@pytest.mark.parametrize(
    ("model", "use", "max_new_tokens"),
    [("tagged", REQUIRED, 300), ("tagged", AUTO, 300), ("plain", AUTO, 60), ("plain", NAMED, 90)],
)
def test_a_stream_joined_is_the_whole_answer(
    request: pytest.FixtureRequest,
    ask: Callable[..., Generation],
    model: str,
    use: ToolUse,
    max_new_tokens: int,
) -> None:
    source = request.getfixturevalue(model)
    texts: list[str] = []
    pieces: list[CallPiece] = []
    answer = ask(
        source,
        use,
        seed=1,
        max_new_tokens=max_new_tokens,
        on_text=texts.append,
        on_call=pieces.append,
    )
    assert "".join(texts) == answer.text
    assert [(piece.index, piece.name) for piece in pieces if not piece.arguments] == [
        (index, call.name) for index, call in enumerate(answer.tool_calls)
    ]
    for index, call in enumerate(answer.tool_calls):
        of_call = [piece for piece in pieces if piece.index == index]
        assert len(of_call) > 3
        assert "".join(piece.arguments for piece in of_call) == call.arguments
    again = ask(source, use, seed=1, max_new_tokens=max_new_tokens)
    assert (again.text, again.tool_calls) == (answer.text, answer.tool_calls)


def test_a_call_that_is_cut_off_says_so(ask: Callable[..., Generation], plain: str) -> None:
    answer = ask(plain, NAMED, seed=0, max_new_tokens=60)
    assert answer.finish_reason == "length"
    (call,) = answer.tool_calls
    assert call.name == "look_up"
    with pytest.raises(ValueError, match=r"\w"):
        json.loads(call.arguments)


def test_rows_of_a_batch_keep_to_their_own_tools(
    ask: Callable[..., Generation], plain: str, tmp_path: Path
) -> None:
    adapters = [adapter_source(plain, tmp_path, seed=seed, target=EVERYWHERE) for seed in (1, 2)]
    asked: list[tuple[ToolUse | None, AdapterSource | None]] = [
        (NAMED, adapters[0]),
        (None, adapters[1]),
        (ONE, adapters[1]),
        (None, None),
        (NAMED, None),
        (AUTO, adapters[0]),
    ]

    def answered(each: tuple[ToolUse | None, AdapterSource | None]) -> Generation:
        use, adapter = each
        most = 220 if use in (NAMED, ONE) else 30
        return ask(plain, use, adapter=adapter, seed=3, max_new_tokens=most)

    alone = [answered(each) for each in asked]
    with ThreadPoolExecutor(len(asked)) as pool:
        together = list(pool.map(answered, asked))
    for one, other in zip(alone, together, strict=True):
        assert (one.text, one.tool_calls) == (other.text, other.tool_calls)
        check(other)
    assert together[0].tool_calls[0].arguments != together[4].tool_calls[0].arguments


def test_a_chat_goes_on_with_the_result_of_a_call(
    ask: Callable[..., Generation], tagged: str, plain: str
) -> None:
    for source in (tagged, plain):
        made = {"id": "call_1", "name": "look_up", "arguments": {"place": "Bern"}}
        chat = parse_prompt([
            {"role": "user", "content": "What is the weather?"},
            {"role": "assistant", "content": "", "tool_calls": [made]},
            {"role": "tool", "content": "rain", "tool_call_id": "call_1"},
        ])
        without = ask(source, None, chat=chat, max_new_tokens=5)
        with_tools = ask(source, AUTO, chat=chat, max_new_tokens=5)
        assert without.prompt_tokens < with_tools.prompt_tokens


def test_parameters_that_cannot_be_held_name_the_tools(
    ask: Callable[..., Generation], plain: str
) -> None:
    bad = Tool(name="bad", parameters={"type": "object", "minProperties": 3, "maxProperties": 1})
    with pytest.raises(InvalidConfig) as refused:
        ask(plain, ToolUse(tools=(bad,), mode=ToolMode.REQUIRED), max_new_tokens=20)
    assert all(fault.pointer.startswith("/tools") for fault in refused.value.faults)


def test_an_answer_of_a_schema_may_quote_a_call(ask, plain):
    answer = {"text": '<tool_call>\n{"name": "stop", "arguments": {}}\n</tool_call>'}
    grammar = json_schema_grammar({"const": answer})
    found = [ask(plain, AUTO, grammar=grammar, seed=seed) for seed in range(6)]
    texts = [each.text for each in found if each.finish_reason == "stop"]
    assert texts
    assert all(json.loads(text) == answer for text in texts)
