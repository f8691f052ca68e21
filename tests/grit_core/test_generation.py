"""Answers from resident models: equal to transformers' own, whichever adapters are around."""

import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from grit_core.artifacts import write_adapter
from grit_core.data.image_decoding import decode_image
from grit_core.errors import AdapterInvalid, Interrupted, InvalidConfig
from grit_core.generation import AdapterSource, GenerationEngine, GenerationRequest
from grit_core.models.pretrained import load_base_model, load_processor
from grit_core.records import parse_prompt
from tests.grit_core.serving.test_resident_model import sliding_window_folder
from tests.tiny_models import png_data_url, tiny_causal_folder, tiny_vlm_folder

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")


@pytest.fixture
def new_engine():
    engines = []

    def new(**options):
        engines.append(GenerationEngine(**options))
        return engines[-1]

    yield new
    for engine in engines:
        engine.close()


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
    text = processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return text.removeprefix(" ")  # the template's, which writes "Assistant: ..."


def test_greedy_answers_are_those_of_transformers_whatever_adapters_came_before(
    base, adapters, new_engine
):
    engine = new_engine()
    expected = {None: plain_answer(base, None)} | {a.id: plain_answer(base, a) for a in adapters}
    assert len(set(expected.values())) > 1
    for adapter in [None, adapters[0], None, adapters[1], adapters[2], adapters[0], None]:
        found = engine.generate(base, request_of(), adapter=adapter)
        assert found.text == expected[None if adapter is None else adapter.id]


def test_the_least_recently_used_adapter_makes_room(base, adapters, new_engine):
    engine = new_engine(max_adapters=2)
    first = engine.generate(base, request_of(), adapter=adapters[0])
    engine.generate(base, request_of(), adapter=adapters[1])
    engine.generate(base, request_of(), adapter=adapters[0])
    engine.generate(base, request_of(), adapter=adapters[2])
    assert engine.resident_adapters(base) == ("adp_0", "adp_2")
    assert engine.generate(base, request_of(), adapter=adapters[0]).text == first.text


def test_a_seed_decides_a_sampled_answer_and_leaves_the_process_state_alone(base, new_engine):
    engine = new_engine()
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


def test_a_stop_text_ends_the_answer_and_is_not_part_of_it(base, new_engine):
    engine = new_engine()
    whole = engine.generate(base, request_of())
    assert len(whole.text) > 3
    stop = whole.text[2:4]
    found = engine.generate(base, request_of(stop=(stop,)))
    assert found.text == whole.text[: whole.text.index(stop)]
    assert found.finish_reason == "stop"
    assert found.completion_tokens < whole.completion_tokens


def test_the_space_before_an_answer_is_no_stop_text(new_engine):
    """The digits model answers " 7": the space belongs to the chat template."""
    folder = str(Path(__file__).parents[2] / "examples" / "digits-vlm")
    plain = new_engine().generate(folder, request_of())
    assert len(plain.text) == 1
    assert new_engine().generate(folder, request_of(stop=(" ",))).text == plain.text


def test_usage_counts_image_tokens_and_the_length_limit_is_told(base, new_engine):
    found = new_engine().generate(base, request_of(max_new_tokens=1))
    assert found.image_tokens == 4
    assert found.prompt_tokens > found.image_tokens
    assert found.completion_tokens == 1
    assert found.finish_reason == "length"
    assert found.first_token_seconds > 0


def test_an_answer_beyond_the_context_is_refused_with_its_numbers(base, new_engine):
    wanted = (
        r"maximum context length is 1024 tokens.*\(45 in the messages, 100000 in the completion"
    )
    with pytest.raises(InvalidConfig, match=wanted) as refused:
        new_engine().generate(base, request_of(max_new_tokens=100_000))
    (fault,) = refused.value.faults
    assert (fault.code, fault.pointer) == ("request_too_large", "/max_new_tokens")


@pytest.mark.parametrize("shorten_to_fit", [False, True])
def test_a_prompt_beyond_the_context_is_refused_with_its_numbers(base, new_engine, shorten_to_fit):
    request = request_of("word " * 400, max_new_tokens=1, shorten_to_fit=shorten_to_fit)
    with pytest.raises(InvalidConfig, match="reduce the length of the messages") as refused:
        new_engine().generate(base, request)
    assert refused.value.faults[0].pointer == "/messages"


def test_an_answer_without_a_bound_of_its_own_has_what_the_prompt_leaves(base, new_engine):
    engine = new_engine()
    words = request_of("x" * 960, max_new_tokens=1)
    room = 1024 - engine.generate(base, words).prompt_tokens
    assert 1 <= room < 40
    long = request_of("x" * 960, max_new_tokens=2048, shorten_to_fit=True)
    assert engine.generate(base, long).completion_tokens <= room
    with pytest.raises(InvalidConfig, match=f"{room + 1} in the completion"):
        engine.generate(base, request_of("x" * 960, max_new_tokens=room + 1))


@pytest.mark.parametrize("shares_steps", [True, False])
def test_a_nucleus_of_nothing_is_the_likeliest_token(tmp_path, new_engine, shares_steps):
    engine = new_engine()
    folder = str(tiny_causal_folder(tmp_path) if shares_steps else sliding_window_folder(tmp_path))
    chat = parse_prompt([{"role": "user", "content": "Hello?"}])
    greedy = engine.generate(folder, GenerationRequest(chat=chat, max_new_tokens=8))
    for seed in range(3):
        asked = GenerationRequest(chat=chat, max_new_tokens=8, temperature=1.5, top_p=0, seed=seed)
        assert engine.generate(folder, asked).text == greedy.text


def test_an_adapter_without_safetensors_is_refused(base, adapters, tmp_path, new_engine):
    (tmp_path / "adapter_config.json").write_text(
        (adapters[0].folder / "adapter_config.json").read_text()
    )
    (tmp_path / "adapter_model.bin").write_bytes(b"a pickle")
    with pytest.raises(AdapterInvalid, match="safetensors"):
        new_engine().generate(
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
    return {
        **tensors,
        "base_model.model.nowhere.lora_A.weight": torch.zeros(4, 8),
        "base_model.model.nowhere.lora_B.weight": torch.zeros(8, 4),
    }


def with_a_wrong_shape(tensors):
    last = max(tensors)
    return {**tensors, last: torch.zeros(len(tensors[last]) + 1, 4)}


@pytest.mark.parametrize("change", [without_text, with_a_stranger, with_a_wrong_shape])
@pytest.mark.parametrize("first", [True, False])
def test_an_adapter_that_does_not_fit_is_refused_and_leaves_no_trace(
    base, adapters, tmp_path, change, first, new_engine
):
    engine = new_engine()
    plain = engine.generate(base, request_of()).text
    if not first:
        engine.generate(base, request_of(), adapter=adapters[1])
    broken = damaged(adapters[0], tmp_path / "adp_broken", change)
    for _ in range(2):
        with pytest.raises(AdapterInvalid, match="base model"):
            engine.generate(base, request_of(), adapter=broken)
    assert engine.generate(base, request_of()).text == plain


def test_a_text_only_model_answers_too(tmp_path, new_engine):
    folder = str(tiny_causal_folder(tmp_path))
    chat = parse_prompt([{"role": "user", "content": "Hello"}])
    found = new_engine().generate(folder, GenerationRequest(chat=chat, max_new_tokens=5))
    assert 1 <= found.completion_tokens <= 5
    assert found.image_tokens == 0


def test_models_beyond_the_bound_make_room(base, tmp_path, new_engine):
    engine = new_engine(max_bases=1)
    first = engine.generate(base, request_of()).text
    chat = parse_prompt([{"role": "user", "content": "Hello"}])
    engine.generate(
        str(tiny_causal_folder(tmp_path)), GenerationRequest(chat=chat, max_new_tokens=2)
    )
    assert engine.resident_adapters(base) == ()
    assert engine.generate(base, request_of()).text == first


def test_requests_for_many_adapters_at_once_are_answered_as_each_alone(base, adapters, new_engine):
    """They share steps, join while others are in the middle, and leave when they are done."""
    sources = [*adapters, None]
    alone = new_engine(max_batch=1)
    questions = [f"What {'is ' * (n % 5)}this?" for n in range(24)]
    options = [{"max_new_tokens": 3 + 5 * (n % 4)} for n in range(24)]
    expected = [
        alone.generate(base, request_of(q, **o), adapter=sources[n % 4]).text
        for n, (q, o) in enumerate(zip(questions, options, strict=True))
    ]
    engine, most = new_engine(max_batch=6, max_adapters=3), []

    def ask(n):
        time.sleep(0.01 * (n % 7))
        return engine.generate(
            base,
            request_of(questions[n], **options[n]),
            adapter=sources[n % 4],
            on_text=lambda _: most.append(engine.stats().num_active),
        ).text

    with ThreadPoolExecutor(24) as pool:
        assert list(pool.map(ask, range(24))) == expected
    assert max(most) > 1
    assert engine.stats().num_active == engine.stats().num_waiting == 0


def test_a_seed_decides_whoever_shares_the_batch(base, adapters, new_engine):
    request = request_of(temperature=1.2, top_p=0.9, seed=5, max_new_tokens=20)
    expected = new_engine().generate(base, request, adapter=adapters[0]).text
    engine = new_engine()

    def ask(n):
        if n % 3 == 0:
            return engine.generate(base, request, adapter=adapters[0]).text
        other = request_of(temperature=1.0, seed=n, max_new_tokens=20)
        return engine.generate(base, other, adapter=adapters[n % 3]).text

    with ThreadPoolExecutor(9) as pool:
        assert set(list(pool.map(ask, range(18)))[::3]) == {expected}


def test_the_pieces_come_while_the_answer_grows_and_are_its_text(base, new_engine):
    engine, pieces, threads = new_engine(), [], set()

    def on_text(piece):
        pieces.append(piece)
        threads.add(threading.current_thread())

    found = engine.generate(base, request_of(), on_text=on_text)
    assert "".join(pieces) == found.text
    assert len(pieces) > 2
    assert threads == {threading.current_thread()}


def test_a_request_that_is_stopped_leaves_the_others_alone(base, adapters, new_engine):
    engine = new_engine()
    long = request_of(max_new_tokens=900)
    expected = engine.generate(base, request_of(), adapter=adapters[0]).text
    pieces = []
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(
            engine.generate,
            base,
            long,
            adapter=adapters[1],
            on_text=pieces.append,
            should_stop=lambda: len(pieces) > 3,
        )
        assert engine.generate(base, request_of(), adapter=adapters[0]).text == expected
        with pytest.raises(Interrupted):
            running.result(timeout=20)
    assert engine.generate(base, request_of(), adapter=adapters[0]).text == expected
    assert engine.stats().num_active == 0


def test_a_closed_engine_ends_what_is_under_way_and_takes_nothing_new(base, new_engine):
    engine, begun = new_engine(), threading.Event()
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(
            engine.generate,
            base,
            request_of(max_new_tokens=900),
            on_text=lambda _: begun.set(),
        )
        assert begun.wait(20)
        engine.close()
        with pytest.raises(Interrupted):
            running.result(timeout=20)
    with pytest.raises(Interrupted):
        engine.generate(base, request_of())


def test_more_adapters_than_places_wait_their_turn(base, adapters, new_engine):
    engine = new_engine(max_adapters=1)
    expected = [engine.generate(base, request_of(), adapter=a).text for a in adapters]
    with ThreadPoolExecutor(6) as pool:
        found = pool.map(
            lambda n: engine.generate(base, request_of(), adapter=adapters[n % 3]).text, range(12)
        )
        assert list(found) == expected * 4
    assert engine.stats().resident_adapters == 1


def test_a_base_model_in_use_stays_and_one_that_waits_for_its_place_gets_it(
    base, tmp_path, new_engine
):
    engine, begun = new_engine(max_bases=1), threading.Event()
    other = str(tiny_causal_folder(tmp_path))
    chat = parse_prompt([{"role": "user", "content": "Hello"}])
    with ThreadPoolExecutor(2) as pool:
        running = pool.submit(
            engine.generate,
            base,
            request_of(max_new_tokens=60),
            on_text=lambda _: begun.set(),
        )
        assert begun.wait(20)
        waiting = pool.submit(
            engine.generate, other, GenerationRequest(chat=chat, max_new_tokens=2)
        )
        assert running.result(timeout=30).completion_tokens > 0
        assert waiting.result(timeout=30).completion_tokens > 0
    assert engine.stats().resident_adapters == 0


def test_a_chat_that_goes_on_reuses_what_was_computed(base, adapters, new_engine):
    engine = new_engine()
    content = [
        {"type": "image_url", "image_url": {"url": png_data_url(3)}},
        {"type": "text", "text": "Which digit is this?"},
    ]
    messages = [{"role": "user", "content": content}]
    first = engine.generate(
        base, GenerationRequest(chat=parse_prompt(messages)), adapter=adapters[0]
    )
    assert first.cached_prompt_tokens == 0
    messages += [
        {"role": "assistant", "content": first.text},
        {"role": "user", "content": "Are you sure?"},
    ]
    request = GenerationRequest(chat=parse_prompt(messages))
    second = engine.generate(base, request, adapter=adapters[0])
    assert second.cached_prompt_tokens > first.prompt_tokens - 8
    plain = new_engine(prefix_cache_bytes=0).generate(base, request, adapter=adapters[0])
    assert plain.cached_prompt_tokens == 0
    assert second.text == plain.text


def test_an_image_seen_before_is_not_computed_again(base, adapters, new_engine):
    engine = new_engine(prefix_cache_bytes=0)
    # These adapters adapt the vision tower too, and have features of their own.
    seen = [
        engine.generate(base, request_of(text), adapter=adapter).image_cached
        for text, adapter in [
            ("One?", None),
            ("Two?", None),
            ("One?", adapters[0]),
            ("Two?", adapters[0]),
            ("One?", adapters[1]),
        ]
    ]
    assert seen == [False, True, False, True, False]


def test_a_model_that_cannot_share_steps_answers_as_transformers_does(tmp_path, new_engine):
    folder = sliding_window_folder(tmp_path)
    chat = parse_prompt([{"role": "user", "content": "Hello, this is longer than the window."}])
    request = GenerationRequest(chat=chat, max_new_tokens=20)
    pieces = []
    engine = new_engine()
    found = engine.generate(folder, request, on_text=pieces.append)
    model, tokenizer = load_base_model(folder), load_processor(folder)
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hello, this is longer than the window."}],
        add_generation_prompt=True,
        tokenize=False,
    )
    inputs = tokenizer(text, return_tensors="pt", add_special_tokens=False)
    output = model.generate(**inputs, max_new_tokens=20, do_sample=False)
    ids = output[0, inputs["input_ids"].shape[1] :]
    assert found.text == tokenizer.decode(ids, skip_special_tokens=True)
    assert found.completion_tokens == len(ids)
    assert "".join(pieces) == found.text
    sampled = GenerationRequest(chat=chat, max_new_tokens=20, temperature=1.0, seed=3)
    assert engine.generate(folder, sampled).text == engine.generate(folder, sampled).text


def test_a_row_may_leave_after_its_batch_has_grown(base, adapters, new_engine):
    """Storage that a step made larger is changed between steps."""
    engine, pieces = new_engine(), []
    long = request_of(max_new_tokens=400)
    expected = engine.generate(base, long).text
    with ThreadPoolExecutor(2) as pool:
        stopped = pool.submit(
            engine.generate,
            base,
            request_of(max_new_tokens=900),
            adapter=adapters[1],
            on_text=pieces.append,
            should_stop=lambda: len(pieces) > 200,
        )
        other = pool.submit(engine.generate, base, long)
        with pytest.raises(Interrupted):
            stopped.result(timeout=60)
        assert other.result(timeout=60).text == expected


def test_a_thread_that_failed_tells_all_that_wait_and_another_takes_its_place(
    base, new_engine, monkeypatch
):
    engine = new_engine()
    expected = engine.generate(base, request_of()).text
    with monkeypatch.context() as broken:
        broken.setattr(engine, "_admit", None)  # calling it raises TypeError
        with pytest.raises(TypeError):
            engine.generate(base, request_of())
    assert engine.generate(base, request_of()).text == expected


def test_what_goes_wrong_inside_a_step_is_told_to_all_that_share_it(base, new_engine):
    engine = new_engine()
    expected = engine.generate(base, request_of()).text
    resident = engine._bases[base]
    step, resident.step = resident.step, None  # calling it raises TypeError
    with pytest.raises(TypeError):
        engine.generate(base, request_of())
    resident.step = step
    assert engine.generate(base, request_of()).text == expected


def test_a_closed_engine_loads_no_model(tmp_path):
    engine = GenerationEngine()
    engine.close()
    chat = parse_prompt([{"role": "user", "content": "What?"}])
    with pytest.raises(Interrupted, match="closing"):
        engine.generate(str(tiny_causal_folder(tmp_path)), GenerationRequest(chat=chat))
    assert engine._bases == {}
