"""Answers that are held to a schema: from random models, in mixed batches, streamed, cut off."""

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from itertools import product

import jsonschema_rs
import pytest
import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from grit_core.artifacts import write_adapter
from grit_core.errors import InvalidConfig
from grit_core.generation import AdapterSource, GenerationEngine, GenerationRequest
from grit_core.grammars import json_schema_grammar
from grit_core.models.pretrained import load_base_model
from grit_core.records import parse_prompt
from tests.grit_core.answer_schemas import OPEN, SCHEMAS
from tests.grit_core.serving.test_resident_model import sliding_window_folder
from tests.tiny_models import (
    CHATML_TEMPLATE,
    png_data_url,
    tiny_causal_folder,
    tiny_vlm_folder,
)

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")

READING = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "n": {"type": "integer", "minimum": 0, "maximum": 99},
        "tags": {"type": "array", "items": {"enum": ["a", "ü"]}, "maxItems": 2},
    },
    "required": ["name", "n", "tags"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def engine():
    made = GenerationEngine()
    yield made
    made.close()


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return str(tiny_vlm_folder(tmp_path_factory.mktemp("models")))


@pytest.fixture(scope="module")
def adapters(base, tmp_path_factory):
    """Two adapters that change the model's answers, each differently."""
    folder = tmp_path_factory.mktemp("adapters")
    found = []
    for number in range(2):
        torch.manual_seed(number)
        model = get_peft_model(
            load_base_model(base), LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
        )
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(0, 2.0)
        write_adapter(folder / f"adp_{number}", model, base_model_name="tiny")
        found.append(AdapterSource(id=f"adp_{number}", folder=folder / f"adp_{number}"))
    return found


def asked(schema=None, *, text="Which digit is this?", **options):
    content = [
        {"type": "image_url", "image_url": {"url": png_data_url(3)}},
        {"type": "text", "text": text},
    ]
    chat = parse_prompt([{"role": "user", "content": content}])
    grammar = "" if schema is None else json_schema_grammar(schema)
    defaults = {"max_new_tokens": 200, "grammar": grammar}
    return GenerationRequest(chat=chat, **{**defaults, **options})


def text_asked(grammar, **options):
    chat = parse_prompt([{"role": "user", "content": [{"type": "text", "text": "Which?"}]}])
    return GenerationRequest(chat=chat, **{"max_new_tokens": 120, "grammar": grammar, **options})


def valid(schema, text):
    return jsonschema_rs.validator_for(schema, validate_formats=True).is_valid(json.loads(text))


@pytest.mark.slow
def test_answers_of_a_random_model_fit_the_schemas_that_people_and_libraries_write(engine, base):
    cases = [(name, seed) for name in {**SCHEMAS, **OPEN} for seed in (1, 2)]

    def answer(case):
        name, seed = case
        schema = {**SCHEMAS, **OPEN}[name]
        top_p = 1.0 if seed == 1 else 0.9
        request = asked(schema, temperature=1.0, seed=seed, top_p=top_p, max_new_tokens=300)
        return engine.generate(base, request)

    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(answer, cases))
    ended = set()
    for (name, _), found in zip(cases, answers, strict=True):
        if found.finish_reason == "stop":
            assert valid({**SCHEMAS, **OPEN}[name], found.text), (name, found.text)
            ended.add(name)
        else:
            assert found.completion_tokens == 300
    assert len(ended) >= 0.8 * len(SCHEMAS), SCHEMAS.keys() - ended


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_answer_ends_with_the_value_and_needs_no_further_token(engine, base, temperature):
    found = engine.generate(base, asked({"const": [1, 2]}, temperature=temperature, seed=1))
    assert json.loads(found.text) == [1, 2]
    assert found.finish_reason == "stop"
    closing = engine.generate(
        base,
        asked(
            {"const": [1, 2]},
            temperature=temperature,
            seed=1,
            max_new_tokens=found.completion_tokens,
        ),
    )
    assert (closing.text, closing.finish_reason) == (found.text, "stop")


def test_rows_without_a_schema_answer_as_they_do_alone_and_those_with_one_too(
    engine, base, adapters
):
    requests = [
        (request, adapter)
        for adapter in (None, *adapters)
        for request in (
            asked(max_new_tokens=30),
            asked(max_new_tokens=30, temperature=1.0, seed=3),
            asked(READING),
            asked(READING, temperature=1.0, seed=4),
        )
    ]
    alone = [engine.generate(base, request, adapter=adapter) for request, adapter in requests]
    with ThreadPoolExecutor(len(requests)) as pool:
        mixed = list(
            pool.map(lambda each: engine.generate(base, each[0], adapter=each[1]), requests)
        )
    assert [found.text for found in mixed] == [found.text for found in alone]
    held = [
        found.text for found, (request, _) in zip(mixed, requests, strict=True) if request.grammar
    ]
    assert all(valid(READING, text) for text in held)
    assert len(set(held)) == len(held)


def test_a_streamed_answer_is_the_whole_one(engine, base):
    request = asked(READING, temperature=1.0, seed=6)
    pieces = []
    found = engine.generate(base, request, on_text=pieces.append)
    assert "".join(pieces) == found.text == engine.generate(base, request).text
    assert len(pieces) > 5
    assert valid(READING, found.text)


def test_an_answer_that_is_cut_off_says_so_and_is_the_beginning_of_a_whole_one(engine, base):
    whole = engine.generate(base, asked(READING))
    cut = engine.generate(base, asked(READING, max_new_tokens=9))
    assert (whole.finish_reason, cut.finish_reason) == ("stop", "length")
    assert cut.completion_tokens == 9
    assert whole.text.startswith(cut.text)


def test_a_number_ends_where_the_model_ends_it(engine, base):
    texts = {
        engine.generate(base, asked({"type": "integer"}, temperature=1.0, seed=seed)).text.strip()
        for seed in range(12)
    }
    assert all(text == str(int(text)) or text == "-0" for text in texts)
    assert len({len(text) for text in texts}) > 1


def test_a_stop_text_still_ends_an_answer(engine, base):
    found = engine.generate(base, asked({"const": "abcdef"}, stop=("cd",)))
    assert (found.text.strip(), found.finish_reason) == ('"ab', "stop")


def test_a_token_that_ends_a_turn_and_is_plain_text_may_stand_in_no_value(tmp_path, engine):
    template = CHATML_TEMPLATE.replace("'<|im_end|>'", "'~'")
    folder = tiny_causal_folder(tmp_path, seed=2)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    for seed in range(6):
        found = engine.generate(
            str(folder),
            text_asked(json_schema_grammar(READING), temperature=1.0, seed=seed),
        )
        assert "~" not in found.text
        assert found.finish_reason == "length" or valid(READING, found.text)


def test_a_model_that_answers_alone_is_held_to_the_schema_too(engine, tmp_path):
    folder = sliding_window_folder(tmp_path)
    request = text_asked(json_schema_grammar(READING), temperature=1.0)
    for seed in range(3):
        request = text_asked(json_schema_grammar(READING), temperature=1.0, seed=seed, top_p=0.9)
        pieces = []
        found = engine.generate(folder, request, on_text=pieces.append)
        assert found.finish_reason == "stop"
        assert valid(READING, found.text)
        assert "".join(pieces) == found.text
    greedy = engine.generate(folder, text_asked(json_schema_grammar({"const": {"a": 1}})))
    assert json.loads(greedy.text) == {"a": 1}
    # Its vocabulary has more rows than its tokenizer has tokens; the rest is never chosen.
    assert LlamaConfig.from_pretrained(folder).vocab_size == 400


def test_a_vocabulary_that_cannot_write_the_value_ends_with_a_fault_and_others_go_on(
    engine, tmp_path
):
    folder = str(folder_of_pieces(tmp_path))
    held, free = json_schema_grammar({"const": "z"}), text_asked("", max_new_tokens=40)
    expected = engine.generate(folder, free).text
    with ThreadPoolExecutor(2) as pool:
        other = pool.submit(engine.generate, folder, free)
        with pytest.raises(InvalidConfig, match="no token of the model's vocabulary goes on"):
            engine.generate(folder, text_asked(held))
        assert other.result().text == expected
    written = engine.generate(folder, text_asked(json_schema_grammar({"enum": ["a b", "ba"]})))
    assert json.loads(written.text) in {"a b", "ba"}


def test_a_schema_that_becomes_too_large_on_the_way_fails_alone_while_others_go_on(
    engine, tmp_path
):
    words = ["".join(word) for size in range(2, 11) for word in product("ab", repeat=size)]
    folder = str(folder_of_pieces(tmp_path, words))
    # Wherever an `a` stands the end may begin: every token leads to states of its own.
    hostile = json_schema_grammar({"type": "string", "pattern": "^[ab]*a[ab]{2000}$"})
    free = text_asked("", max_new_tokens=8)
    expected = engine.generate(folder, free).text
    texts, stopped = [], threading.Event()

    def others():
        while not stopped.is_set() or not texts:
            texts.append(engine.generate(folder, free).text)

    thread = threading.Thread(target=others)
    thread.start()
    try:
        with pytest.raises(
            InvalidConfig, match="cannot be held to the schema: lexer error: too many"
        ):
            engine.generate(
                folder, text_asked(hostile, max_new_tokens=700, temperature=1.0, seed=1)
            )
    finally:
        stopped.set()
        thread.join()
    assert set(texts) == {expected}


def test_any_json_object_can_be_asked_for(engine, base):
    ends = []
    for seed in range(4):
        found = engine.generate(
            base, asked(grammar=json_schema_grammar({"type": "object"}), temperature=0.7, seed=seed)
        )
        if found.finish_reason == "stop":
            assert isinstance(json.loads(found.text), dict)
            ends.append(found.text)
    assert ends


def folder_of_pieces(tmp_path, words=()):
    """A text model whose whole vocabulary is a few pieces with `▁` for blanks, and some words."""
    pieces = ["<unk>", "<|im_start|>", "<|im_end|>", '"', "▁", "a", "b", "▁b", "{", "}", ":"]
    pieces += ["u", "s", "e", "r", "t", "n", "i", "W", "h", "c", "?", "\n", *words]
    vocabulary = [(piece, -float(index)) for index, piece in enumerate(pieces)]
    tokenizer = Tokenizer(models.Unigram(vocabulary, unk_id=0))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="never")
    tokenizer.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
    )
    wrapped.chat_template = CHATML_TEMPLATE
    config = LlamaConfig(
        vocab_size=len(wrapped),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=1024,
        eos_token_id=wrapped.eos_token_id,
        pad_token_id=wrapped.pad_token_id,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "pieces")
    wrapped.save_pretrained(tmp_path / "pieces")
    return tmp_path / "pieces"
