"""Answers from resident models: equal to transformers' own, whichever adapters are around."""

import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from grit_core.artifacts import write_adapter
from grit_core.data import decode_image
from grit_core.errors import AdapterInvalid, InvalidConfig
from grit_core.generation import AdapterSource, GenerationEngine, GenerationRequest
from grit_core.models.pretrained import load_base_model, load_processor
from grit_core.records import parse_prompt
from tests.tiny_models import png_data_url, tiny_causal_folder, tiny_vlm_folder

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return str(tiny_vlm_folder(tmp_path_factory.mktemp("models")))


@pytest.fixture(scope="module")
def adapters(base, tmp_path_factory):
    """Three adapters that change the model's answers, each differently."""
    folder = tmp_path_factory.mktemp("adapters")
    found = []
    for number in range(3):
        torch.manual_seed(number)
        model = get_peft_model(
            load_base_model(base), LoraConfig(r=4 + number, target_modules=["q_proj", "v_proj"])
        )
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(0, 2.0)
        write_adapter(folder / f"adp_{number}", model, base_model_name="tiny")
        found.append(AdapterSource(id=f"adp_{number}", folder=folder / f"adp_{number}"))
    return found


def request_of(text="Which digit is this?", **options):
    content = [
        {"type": "image_url", "image_url": {"url": png_data_url(3)}},
        {"type": "text", "text": text},
    ]
    chat = parse_prompt([{"role": "user", "content": content}])
    return GenerationRequest(chat=chat, **{"max_new_tokens": 12, **options})


def plain_answer(base, adapter):
    """The same chat through transformers and PEFT alone."""
    model = load_base_model(base)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, str(adapter.folder)).eval()
    processor = load_processor(base)
    messages = [
        {
            "role": "user",
            "content": [{"type": "image"}, {"type": "text", "text": "Which digit is this?"}],
        }
    ]
    image = decode_image(request_of().chat.images[0], index=0)
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    inputs = processor(text=[text], images=[[image]], return_tensors="pt", add_special_tokens=False)
    output = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    return processor.decode(
        output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True
    ).strip()


def test_greedy_answers_are_those_of_transformers_whatever_adapters_came_before(base, adapters):
    engine = GenerationEngine()
    expected = {None: plain_answer(base, None)} | {a.id: plain_answer(base, a) for a in adapters}
    assert len(set(expected.values())) > 1
    for adapter in [None, adapters[0], None, adapters[1], adapters[2], adapters[0], None]:
        found = engine.generate(base, request_of(), adapter=adapter)
        assert found.text == expected[None if adapter is None else adapter.id]


def test_the_least_recently_used_adapter_makes_room(base, adapters):
    engine = GenerationEngine(max_adapters=2)
    first = engine.generate(base, request_of(), adapter=adapters[0])
    engine.generate(base, request_of(), adapter=adapters[1])
    engine.generate(base, request_of(), adapter=adapters[0])
    engine.generate(base, request_of(), adapter=adapters[2])
    assert engine.resident_adapters(base) == ("adp_0", "adp_2")
    assert engine.generate(base, request_of(), adapter=adapters[0]).text == first.text


def test_a_seed_decides_a_sampled_answer_and_leaves_the_process_state_alone(base):
    engine = GenerationEngine()
    torch.manual_seed(7)
    before = torch.random.get_rng_state()
    request = request_of(temperature=1.5, seed=11)
    one, other = engine.generate(base, request), engine.generate(base, request)
    assert one.text == other.text
    assert torch.equal(before, torch.random.get_rng_state())
    others = {
        engine.generate(base, request_of(temperature=1.5, seed=s)).text for s in range(20, 26)
    }
    assert len(others) > 1


def test_a_stop_text_ends_the_answer_and_is_not_part_of_it(base):
    engine = GenerationEngine()
    whole = engine.generate(base, request_of())
    assert len(whole.text) > 3
    stop = whole.text[2:4]
    found = engine.generate(base, request_of(stop=(stop,)))
    assert found.text == whole.text[: whole.text.index(stop)].strip()
    assert found.finish_reason == "stop"
    assert found.completion_tokens < whole.completion_tokens


def test_the_space_before_an_answer_is_no_stop_text():
    """The digits model answers " 7": the space belongs to the chat template."""
    folder = str(Path(__file__).parents[2] / "examples" / "digits-vlm")
    plain = GenerationEngine().generate(folder, request_of())
    assert len(plain.text) == 1
    assert GenerationEngine().generate(folder, request_of(stop=(" ",))).text == plain.text


def test_usage_counts_image_tokens_and_the_length_limit_is_told(base):
    found = GenerationEngine().generate(base, request_of(max_new_tokens=1))
    assert found.image_tokens == 4
    assert found.prompt_tokens > found.image_tokens
    assert found.completion_tokens == 1
    assert found.finish_reason == "length"
    assert found.first_token_seconds > 0


def test_a_prompt_beyond_the_context_is_refused_with_its_numbers(base):
    with pytest.raises(InvalidConfig, match="max_new_tokens is 100000"):
        GenerationEngine().generate(base, request_of(max_new_tokens=100_000))


def test_an_adapter_without_safetensors_is_refused(base, adapters, tmp_path):
    (tmp_path / "adapter_config.json").write_text(
        (adapters[0].folder / "adapter_config.json").read_text()
    )
    (tmp_path / "adapter_model.bin").write_bytes(b"a pickle")
    with pytest.raises(AdapterInvalid, match="safetensors"):
        GenerationEngine().generate(
            base, request_of(), adapter=AdapterSource(id="adp_x", folder=tmp_path)
        )


def damaged(adapter, folder, change):
    """A copy of an adapter with its tensors changed."""
    shutil.copytree(adapter.folder, folder)
    weights = folder / "adapter_model.safetensors"
    save_file(change(load_file(weights)), weights)
    return AdapterSource(id=folder.name, folder=folder)


def without_text(tensors):
    return {name: tensor for name, tensor in tensors.items() if "text_model" not in name}


def with_a_stranger(tensors):
    return {**tensors, "base_model.model.nowhere.lora_A.weight": torch.zeros(4, 4)}


def with_a_wrong_shape(tensors):
    last = max(tensors)
    return {**tensors, last: torch.zeros(len(tensors[last]) + 1, 4)}


@pytest.mark.parametrize("change", [without_text, with_a_stranger, with_a_wrong_shape])
@pytest.mark.parametrize("first", [True, False])
def test_an_adapter_that_does_not_fit_is_refused_and_leaves_no_trace(
    base, adapters, tmp_path, change, first
):
    engine = GenerationEngine()
    plain = engine.generate(base, request_of()).text
    if not first:
        engine.generate(base, request_of(), adapter=adapters[1])
    broken = damaged(adapters[0], tmp_path / "adp_broken", change)
    for _ in range(2):
        with pytest.raises(AdapterInvalid, match="base model"):
            engine.generate(base, request_of(), adapter=broken)
    assert engine.generate(base, request_of()).text == plain


def test_a_text_only_model_answers_too(tmp_path):
    folder = str(tiny_causal_folder(tmp_path))
    chat = parse_prompt([{"role": "user", "content": "Hello"}])
    found = GenerationEngine().generate(folder, GenerationRequest(chat=chat, max_new_tokens=5))
    assert 1 <= found.completion_tokens <= 5
    assert found.image_tokens == 0


def test_models_beyond_the_bound_make_room(base, tmp_path):
    engine = GenerationEngine(max_bases=1)
    first = engine.generate(base, request_of()).text
    chat = parse_prompt([{"role": "user", "content": "Hello"}])
    engine.generate(
        str(tiny_causal_folder(tmp_path)), GenerationRequest(chat=chat, max_new_tokens=2)
    )
    assert engine.resident_adapters(base) == ()
    assert engine.generate(base, request_of()).text == first
