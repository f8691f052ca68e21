"""Answers stop at the end of turn that was trained, whether or not it is the model's EOS."""

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from grit_core.adapter_manifest import MAX_MANIFEST_BYTES, read_end_of_turn
from grit_core.errors import AdapterInvalid
from grit_core.generation import GenerationEngine, GenerationRequest
from grit_core.models.pretrained import load_base_model, load_processor
from grit_core.records import parse_prompt
from tests.grit_core.serving.adapters import adapter_source
from tests.grit_core.serving.test_resident_model import sliding_window_folder
from tests.tiny_models import tiny_causal_folder

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")

END, TEXT_END = "<|im_end|>", "<|endoftext|>"


@pytest.fixture
def engine():
    engine = GenerationEngine()
    yield engine
    engine.close()


def request_of(**options):
    chat = parse_prompt([{"role": "user", "content": "Which digit is this?"}])
    return GenerationRequest(chat=chat, **{"max_new_tokens": 16, **options})


def edit_json(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def greedy_ids(folder, adapter=None):
    """What the model answers when nothing stops it."""
    processor = load_processor(folder)
    text = processor.apply_chat_template(
        [{"role": "user", "content": "Which digit is this?"}],
        tokenize=False,
        add_generation_prompt=True,
    )
    inputs = processor(text, add_special_tokens=False, return_tensors="pt")
    model = load_base_model(folder)
    if adapter is not None:
        from peft import PeftModel  # noqa: PLC0415 - only where an adapter is

        model = PeftModel.from_pretrained(model, str(adapter.folder)).eval()
    model.generation_config.eos_token_id = None
    ids = model.generate(**inputs, max_new_tokens=16, do_sample=False)
    return ids[0, inputs["input_ids"].shape[1] :].tolist()


def first_new(ids, *, at_least):
    """The first place from which on a token has not been there before."""
    return next(at for at in range(at_least, len(ids)) if ids[at] not in ids[:at])


def ends_with_another_token(source, target):
    """A copy whose EOS is `<|endoftext|>`, and that ends a turn, as its template does, otherwise.

    The head's rows are exchanged so that the end of turn comes where another token did.

    Returns:
        The folder, and the ids of its answer before the end.
    """
    shutil.copytree(source, target)
    tokenizer = load_processor(target)
    end, text_end = tokenizer.convert_tokens_to_ids([END, TEXT_END])
    for name in ("config.json", "generation_config.json"):
        edit_json(target / name, eos_token_id=text_end)
    edit_json(target / "tokenizer_config.json", eos_token=TEXT_END)
    ids = greedy_ids(target)
    at = first_new(ids, at_least=2)
    assert end not in ids[: at + 1]
    weights = load_file(target / "model.safetensors")
    head = weights["lm_head.weight"]
    head[[end, ids[at]]] = head[[ids[at], end]]
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    return str(target), ids[:at]


@pytest.mark.parametrize("shares_steps", [True, False])
def test_an_answer_stops_at_the_templates_end_of_turn(tmp_path, engine, shares_steps):
    made = tiny_causal_folder(tmp_path) if shares_steps else sliding_window_folder(tmp_path)
    folder, ids = ends_with_another_token(Path(made), tmp_path / "other-end")
    tokenizer = load_processor(folder)
    assert tokenizer.eos_token == TEXT_END
    found = engine.generate(folder, request_of())
    assert found.finish_reason == "stop"
    assert found.completion_tokens == len(ids) + 1
    assert found.text == tokenizer.decode(ids, skip_special_tokens=True)
    assert END not in found.text


def test_an_adapters_answers_stop_at_the_end_of_turn_that_it_was_trained_with(tmp_path, engine):
    folder = str(tiny_causal_folder(tmp_path))
    adapter = adapter_source(folder, tmp_path, seed=3, target=["q_proj", "v_proj"])
    ids = greedy_ids(folder, adapter)
    at = first_new(ids, at_least=2)
    entry = {"text": "", "token_ids": [ids[at], ids[0]]}
    (adapter.folder / "grit.json").write_text(json.dumps({"end_of_turn": entry}))
    found = engine.generate(folder, request_of(), adapter=adapter)
    assert found.finish_reason == "stop"
    assert found.completion_tokens == at + 1
    base = engine.generate(folder, request_of(max_new_tokens=3))
    assert base.completion_tokens == 3


def test_a_folder_without_a_manifest_or_an_end_of_turn_adds_no_stop(tmp_path):
    assert read_end_of_turn(tmp_path) == ()
    (tmp_path / "grit.json").write_text('{"format": 1}')
    assert read_end_of_turn(tmp_path) == ()
    (tmp_path / "grit.json").write_text('{"end_of_turn": {"text": "</s>", "token_ids": [2, 5]}}')
    assert read_end_of_turn(tmp_path) == (2, 5)


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ("[]", "no JSON object"),
        ("{", "not JSON"),
        ('{"a": 1, "a": 2}', "a key comes twice"),
        ("[" * 100_000, "not JSON"),
        ('{"end_of_turn": 3}', "end_of_turn 3; it is an object with token_ids"),
        ('{"end_of_turn": {"token_ids": "2"}}', "a list of at most 16 numbers"),
        (json.dumps({"end_of_turn": {"token_ids": [1] * 17}}), "at most 16 numbers"),
        ('{"end_of_turn": {"token_ids": [-1]}}', "token id -1 .* from 0 to 2147483647"),
        ('{"end_of_turn": {"token_ids": [true]}}', "token id True"),
        ('{"end_of_turn": {"token_ids": [1.0]}}', "token id 1.0"),
    ],
)
def test_a_manifest_that_is_not_as_training_writes_it_is_refused(tmp_path, content, match):
    (tmp_path / "grit.json").write_text(content)
    with pytest.raises(AdapterInvalid, match=match):
        read_end_of_turn(tmp_path)


def test_a_manifest_that_is_too_large_is_refused_unread(tmp_path):
    with (tmp_path / "grit.json").open("wb") as file:
        file.truncate(MAX_MANIFEST_BYTES + 1)
    with pytest.raises(AdapterInvalid, match=f"at most {MAX_MANIFEST_BYTES}"):
        read_end_of_turn(tmp_path)


def test_a_broken_manifest_is_the_adapters_fault_when_it_is_served(tmp_path, engine):
    folder = str(tiny_causal_folder(tmp_path))
    adapter = adapter_source(folder, tmp_path, seed=1, target=["q_proj"])
    (adapter.folder / "grit.json").write_text('{"end_of_turn": {"token_ids": ["2"]}}')
    with pytest.raises(AdapterInvalid, match="token id '2'"):
        engine.generate(folder, request_of(), adapter=adapter)
