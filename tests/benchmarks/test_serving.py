"""The serving benchmark: its adapters and peers are what they say, and its checks can fail."""

import asyncio
import dataclasses
import json
import random

import httpx
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from benchmarks.serving import choosing, ours, plots, soak
from benchmarks.serving.adapters import (
    CONNECTOR,
    TEXT,
    VISION,
    BaseShape,
    write_adapter,
    write_adapters,
)
from benchmarks.serving.bases import DIGITS, write_merged
from benchmarks.serving.deployment import Usage
from benchmarks.serving.exactness import compare, digits_rows, merged_in
from benchmarks.serving.leaks import Sample, growth, open_too_many
from benchmarks.serving.memory import slope, zipf
from benchmarks.serving.peers import Peer
from benchmarks.serving.prompts import Prompt, image_prompt, text_prompt
from benchmarks.serving.questions import (
    MIN_LEAD,
    answer_alone,
    make_questions,
    write_varied_adapters,
)
from benchmarks.serving.structured import SCHEMA, follow, write_model
from benchmarks.serving.traffic import Ask, End, ask
from benchmarks.serving.turns import MIN_PAIRS, Turn, ratio, take_turns
from benchmarks.serving.vocabulary import build_tokenizer
from grit_core.artifacts import WEIGHTS
from grit_core.grammars import json_schema_grammar
from grit_core.models.pretrained import known_warnings_ignored, load_base_model


@pytest.fixture(scope="module")
def digits():
    return BaseShape.of(DIGITS)


# --- adapters


@pytest.mark.parametrize("towers", [(TEXT,), (VISION, CONNECTOR, TEXT)])
def test_peft_finds_a_layer_for_every_tensor_of_an_adapter(tmp_path, digits, towers):
    adapter = write_adapter(tmp_path / "one", digits, towers=towers, rank=4)
    base = load_base_model(str(DIGITS), device=torch.device("cpu"), dtype="float32")
    with known_warnings_ignored():
        result = PeftModel.from_pretrained(base, str(adapter.folder))
    adapted = {n for n, m in result.get_base_model().named_modules() if hasattr(m, "lora_A")}
    assert adapted == set(digits.layers(*towers))
    assert all(module.r["default"] == 4 for n, module in _lora(result))
    # No matrix is as PEFT makes it, zero.
    assert all(bool(module.lora_B["default"].weight.any()) for _, module in _lora(result))


def _lora(model):
    return [(n, m) for n, m in model.get_base_model().named_modules() if hasattr(m, "lora_A")]


def test_an_adapter_changes_weights_by_the_strength_asked_for(tmp_path, digits):
    adapter = write_adapter(tmp_path / "one", digits, rank=8, strength=0.3)
    base = load_file(DIGITS / "model.safetensors")
    merged = load_file(write_merged(DIGITS, adapter, tmp_path / "merged") / "model.safetensors")
    for name in digits.layers(TEXT):
        change = merged[f"{name}.weight"] - base[f"{name}.weight"]
        assert float(change.std() / base[f"{name}.weight"].std()) == pytest.approx(0.3, rel=0.25)


def test_many_adapters_share_the_bytes_of_few(tmp_path, digits):
    made = write_adapters(tmp_path, digits, num_adapters=30, num_contents=3, rank=2)
    files = [(adapter.folder / WEIGHTS).stat() for adapter in made]
    assert len({adapter.id for adapter in made}) == 30
    assert len({file.st_ino for file in files}) == 3


def test_a_merged_adapter_leaves_the_weights_as_they_were(tmp_path, digits):
    adapter = write_adapter(tmp_path / "one", digits, strength=5.0)
    model = load_base_model(str(DIGITS), device=torch.device("cpu"), dtype="float32")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with merged_in(model, adapter):
        inside = {n for n, tensor in model.state_dict().items() if not tensor.equal(before[n])}
    assert inside == {f"{name}.weight" for name in digits.layers(TEXT)}
    assert all(tensor.equal(before[name]) for name, tensor in model.state_dict().items())


# --- peers


def test_peft_mixed_and_in_turn_write_the_tokens_of_a_merged_model(tmp_path, digits):
    adapters = [write_adapter(tmp_path / str(n), digits, seed=n, strength=5.0) for n in range(2)]
    prompts = [text_prompt(number) for number in range(2)]
    peer = Peer(DIGITS, adapters)
    mixed = peer.batch(prompts, num_tokens=8, names=[adapter.id for adapter in adapters])
    in_turn = peer.in_turn(prompts, adapters, num_tokens=8)
    merged = Peer(write_merged(DIGITS, adapters[1], tmp_path / "merged"))
    assert in_turn.tokens[1] == merged.batch(prompts[1:], num_tokens=8).tokens[0]
    assert mixed.tokens[1][: len(in_turn.tokens[1])] == in_turn.tokens[1]
    assert mixed.tokens[0] != mixed.tokens[1]


def test_prompts_are_equally_long_and_none_is_like_another():
    peer = Peer(DIGITS)
    prompts = [text_prompt(number) for number in (0, 7, 99_999)]
    assert peer.inputs(prompts)["input_ids"].unique(dim=0).shape[0] == 3
    with pytest.raises(ValueError, match="equally long"):
        peer.inputs([*prompts, text_prompt(1, num_words=9)])
    images = [image_prompt(number, side_pixels=32).chat.images for number in (1, 2)]
    assert images[0] != images[1]


def test_recorded_answers_are_peft_s_and_hang_by_no_hair(tmp_path):
    adapters = write_varied_adapters(tmp_path, num_adapters=2)
    asked = make_questions(2, num_each=3, max_new_tokens=6, seed=1)
    answered = answer_alone(asked, adapters)
    assert {q.adapter for q in answered} == {None, 0, 1}
    assert all(q.lead >= MIN_LEAD for q in answered)
    one = next(q for q in answered if q.adapter == 1)
    peer = Peer(DIGITS, [adapters[1]])
    again, _ = peer.answer(Prompt(one.messages), num_tokens=one.max_new_tokens)
    assert again == one.answer


# --- our engine beside them


def test_a_mixed_batch_of_images_ranks_and_towers_answers_as_merged_models(tmp_path):
    source, rows = digits_rows(tmp_path, num_adapters=5, num_tokens=6)
    found = compare(source, rows, max_adapters=5)
    assert found["most_rows_in_a_step"] > 1
    assert found["largest_difference_to_merged"] < 1e-4
    assert found["largest_difference_to_alone"] < 1e-4
    assert found["rows_with_tokens_of_merged"] == found["num_rows"] == 6
    assert found["rows_with_tokens_of_alone"] == 6


# --- timing


def test_arms_take_turns_in_alternating_order():
    order = []
    arms = {name: lambda number, name=name: order.append((number, name)) or 1.0 for name in "ab"}
    take_turns(arms, num_rounds=2, say=lambda _: None)
    assert order == [(0, "a"), (0, "b"), (1, "b"), (1, "a")]


def test_pairs_around_which_the_machine_changed_are_dropped_while_enough_are_left():
    steady = [Turn(value=2.0, drift=0.01)] * MIN_PAIRS
    shaken = [Turn(value=9.0, drift=0.5)] * 3
    below = [Turn(value=1.0, drift=0.0)] * (MIN_PAIRS + 3)
    found = ratio([*shaken, *steady], below)
    assert (found["median_ratio"], found["num_pairs"]) == (2.0, MIN_PAIRS)
    few = ratio([*shaken, *steady[:2]], below[:5])
    assert (few["num_pairs"], few["num_steady_pairs"]) == (5, 2)


def test_the_slope_of_a_power_law_is_its_exponent():
    assert slope([1, 10, 100], [3.0, 3.0 * 10**0.5, 30.0]) == pytest.approx(0.5)


def test_the_first_adapter_is_asked_for_most_and_twice_as_often_as_the_second():
    drawn = zipf(100, 20_000, seed=0)
    assert drawn.count(0) / drawn.count(1) == pytest.approx(2.0, rel=0.1)
    assert max(drawn) > 80


# --- what becomes of a request

ANSWER = {"output": "ab", "finish_reason": "stop", "usage": {"completion_tokens": 2}}
DELTAS = (
    'event: delta\ndata: {"text": "a"}\n\n: keep-alive\n\nevent: delta\ndata: {"text": "b"}\n\n'
)
DONE = f"event: done\ndata: {json.dumps(ANSWER)}\n\n"
LOST = 'event: error\ndata: {"code": "inference_worker_lost", "status": 503}\n\n'


def outcome_of(response, **changes):
    """What our client makes of an answer of the service."""

    async def one():
        transport = httpx.MockTransport(lambda _request: response)
        async with httpx.AsyncClient(transport=transport, base_url="http://service") as client:
            request = Ask(messages=[], adapter="adp", model="m", max_new_tokens=2)
            return await ask(client, dataclasses.replace(request, **changes))

    return asyncio.run(one())


def stream_of(text):
    headers = {"content-type": "text/event-stream"}
    return outcome_of(httpx.Response(200, headers=headers, text=text), stream=True)


def test_a_whole_stream_is_an_answer():
    found = stream_of(DELTAS + DONE)
    assert (found.end, found.output, found.completion_tokens) == (End.ANSWERED, "ab", 2)
    assert found.first_seconds is not None


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        (DELTAS, "ended without its end"),
        ("", "ended without its end"),
        (DELTAS.replace("b", "c") + DONE, "are not the output"),
        (DELTAS + LOST.replace("inference_worker_lost", "internal_error"), "undocumented"),
        (DELTAS + "event: done\ndata: {}\n\n", "without an answer"),
    ],
)
def test_a_stream_against_the_contract_is_broken(text, fault):
    found = stream_of(text)
    assert found.end is End.BROKEN
    assert fault in found.fault


def test_a_stream_whose_worker_was_lost_may_be_tried_again():
    found = stream_of(DELTAS + LOST)
    assert (found.end, found.code) == (End.REFUSED, "inference_worker_lost")


def test_a_refusal_without_a_time_to_come_again_is_broken():
    problem = {"code": "queue_full", "status": 429}
    told = outcome_of(httpx.Response(429, headers={"retry-after": "1"}, json=problem))
    assert (told.end, told.shed) == (End.REFUSED, True)
    assert outcome_of(httpx.Response(429, json=problem)).end is End.BROKEN
    broken = outcome_of(httpx.Response(500, json={"code": "internal_error"}))
    assert broken.end is End.BROKEN


def test_a_caller_who_leaves_after_a_piece_has_cancelled():
    response = httpx.Response(
        200, headers={"content-type": "text/event-stream"}, text=DELTAS + DONE
    )
    assert outcome_of(response, stream=True, cancel_after_pieces=1).end is End.CANCELLED


# --- the soak's verdict


def samples_of(held, *, pid=1):
    return [
        Sample(
            at_seconds=float(at),
            name="api",
            usage=Usage(pid=pid, resident_bytes=value, num_descriptors=9, num_threads=2),
        )
        for at, value in enumerate(held)
    ]


def test_memory_that_grows_after_the_warm_up_is_a_leak():
    warm, flat = [10**8] * 10, [3 * 10**8] * 50
    assert growth(samples_of(warm + flat), warm_seconds=10)["grew"] is False
    leaking = [3 * 10**8 + 2 * 10**6 * n for n in range(50)]
    assert growth(samples_of(warm + leaking), warm_seconds=10)["grew"] is True


def test_only_the_last_life_of_a_process_counts():
    first = samples_of([10**8] * 50, pid=1)
    last = [
        dataclasses.replace(s, at_seconds=s.at_seconds + 50)
        for s in samples_of([4 * 10**8] * 50, pid=2)
    ]
    assert growth([*first, *last], warm_seconds=5)["grew"] is False
    assert growth(last[:6], warm_seconds=5) is None


def test_pooled_descriptors_may_grow_to_their_bound_and_others_not_at_all():
    before = {"socket": 50, "database": 20, "other": 24}
    pooled = {"socket": 85, "database": 100, "other": 26}
    assert not open_too_many(before, pooled, num_callers=10)
    assert open_too_many(before, {**pooled, "socket": 91}, num_callers=10)
    assert open_too_many(before, {**pooled, "other": 33}, num_callers=10)


def test_an_answer_that_is_not_the_recorded_one_is_a_violation():
    request = Ask(messages=[], adapter="adp", model="m", max_new_tokens=2)
    truth = soak.Truth(request=request, answer="ab")
    one = soak.Soak(None, [truth], soak.Plan())
    one._judge(truth, outcome_of(httpx.Response(200, json=ANSWER)), 0.0)
    assert not one.tally.violations
    wrong = {**ANSWER, "output": "other"}
    one._judge(truth, outcome_of(httpx.Response(200, json=wrong)), 0.0)
    one._judge(truth, outcome_of(httpx.Response(200, text="half")), 0.0)
    assert len(one.tally.violations) == 2


def test_some_requests_are_varied_into_streams_and_into_cancelled_ones():
    request = Ask(messages=[], adapter="adp", model="m", max_new_tokens=2)
    one = soak.Soak(None, [], soak.Plan(cancel_share=0.5))
    chosen = random.Random(0)  # noqa: S311 - draws that a seed repeats
    varied = [one._varied(request, chosen) for _ in range(200)]
    assert 60 < sum(v.stream for v in varied) < 140
    left = [v for v in varied if v.cancel_after_pieces or v.cancel_after_seconds]
    assert 60 < len(left) < 140
    assert all(v.stream for v in varied if v.cancel_after_pieces)


def test_every_figure_is_drawn_from_the_published_results(tmp_path):
    drawn = plots.draw(plots.RESULTS / "serving", tmp_path)
    present = {
        name
        for name, (source, _) in plots.FIGURES.items()
        if (plots.RESULTS / "serving" / f"{source}.json").exists()
    }
    assert {path.stem for path in drawn} == present
    assert all(path.stat().st_size > 5_000 for path in drawn)


# --- answers under a schema


def test_free_and_held_answers_of_the_model_never_end_by_themselves(tmp_path):
    tokenizer = build_tokenizer(2000)
    assert len(tokenizer) == 2000
    assert tokenizer.decode(tokenizer.encode('{"a": [1, 2]}')) == '{"a": [1, 2]}'
    source = write_model(tmp_path / "model", tokenizer)
    engine = ours.ObservedEngine(prefix_cache_bytes=0)
    try:
        for grammar in ("", json_schema_grammar(SCHEMA)):
            run = ours.batch(
                engine,
                source,
                [text_prompt(row) for row in range(2)],
                num_tokens=40,
                grammar=grammar,
            )
            assert [len(tokens) for tokens in run.tokens] == [40, 40]
            texts = [tokenizer.decode(tokens) for tokens in run.tokens]
            assert all(text.lstrip().startswith("[") for text in texts) == bool(grammar)
    finally:
        engine.close()


def test_the_parts_of_a_mask_are_timed_along_a_whole_answer():
    parts = follow(build_tokenizer(2000))
    assert 0 < parts["compile_seconds"] < parts["read_seconds"] + 1
    for name in ("prepare", "apply", "accept"):
        one = parts[f"{name}_microseconds"]
        assert 0 < one["median"] <= one["p99"]


# --- choosing tokens


@pytest.mark.parametrize("kind", choosing.KINDS)
def test_choosing_is_measured_for_every_kind_of_request(kind):
    assert choosing.measure(1000, kind, device=torch.device("cpu"), num_rounds=1) > 0
