"""What a token costs on a device: how often the host waits, and what is copied."""

import gc
import json

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
from transformers.generation.utils import StopCheck

from grit_core import transfer
from grit_core.adapter_folder import read_adapter_folder
from grit_core.serving.adapter_weights import load_adapter_weights
from grit_core.serving.lone_answer import answer_alone
from tests.accelerator.budgets import (
    UPLOADS_OF_A_PROMPT,
    UPLOADS_OF_A_STEP,
    UPLOADS_OF_NEW_ROWS,
    UPLOADS_OF_RULES,
    WAITS_OF_A_LONE_TOKEN,
    WAITS_OF_A_PROMPT,
    WAITS_OF_A_STEP,
)
from tests.grit_core.accelerator.decoding import KINDS, Rows, ask, load
from tests.grit_core.serving.adapters import adapter_source
from tests.tiny_models import tiny_causal_folder

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")


@pytest.fixture(scope="module", autouse=True)
def _leave_no_model_on_the_device():
    yield
    load.cache_clear()
    gc.collect()


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny_causal_folder(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def penalized(base, tmp_path_factory):
    """A model with a repetition penalty of its own."""
    folder = tmp_path_factory.mktemp("penalized")
    for file in base.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    settings = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(
        json.dumps(settings | {"repetition_penalty": 1.2})
    )
    return folder


@pytest.fixture(scope="module")
def sources(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters")
    return [
        adapter_source(str(base), folder, seed=seed, rank=4, target=["q_proj", "v_proj"])
        for seed in range(3)
    ]


@pytest.fixture
def card(accelerator, monkeypatch):
    """A device to which every copy blocks, as to MPS."""
    monkeypatch.setattr(transfer, "is_asynchronous", lambda _device: False)
    return accelerator


def weights(resident, source):
    header = read_adapter_folder(source.folder, max_rank=64, max_bytes=1 << 24)
    return load_adapter_weights(
        source.folder,
        header,
        adapter_id=source.id,
        dtype=resident.dtype,
        linear_layers=resident.linear_layers,
    )


@pytest.mark.parametrize("has_penalty", [False, True], ids=["plain", "penalty"])
@pytest.mark.parametrize(
    "kinds", [["greedy"], ["sampled"], ["held", "greedy"], list(KINDS)], ids=str
)
def test_a_step_waits_once_whatever_its_rows_ask_for(card, request, kinds, has_penalty):
    resident = load(request.getfixturevalue("penalized" if has_penalty else "base"))
    rows = Rows(resident)
    for number, kind in enumerate(kinds):
        rows.join(ask(resident, f"Question {number}?", **KINDS[kind]))
    has_rules = has_penalty or any("held" in kind for kind in kinds)
    allowed = UPLOADS_OF_A_STEP + UPLOADS_OF_RULES * has_rules
    for number in range(2):
        with card.waits() as waits:
            rows.step()
        assert waits.count() == WAITS_OF_A_STEP, waits
        assert waits.count(uploads=True) <= allowed + UPLOADS_OF_NEW_ROWS * (number == 0), waits


def test_rows_of_several_adapters_take_two_more_copies_when_they_change(card, base, sources):
    resident = load(base)
    adapters = [weights(resident, source) for source in sources]
    rows = Rows(resident)
    for number in range(5):
        adapter = None if number == 4 else adapters[number % 3]
        # One that leaves soon, and others that stay.
        length = 4 if number == 2 else 200
        options = KINDS["sampled"] | {"max_new_tokens": length}
        rows.join(ask(resident, "A" * (number + 1), adapter=adapter, **options))
    sizes = []
    for _ in range(6):
        changed = not sizes or len(rows.batch.tickets) != sizes[-1]
        sizes.append(len(rows.batch.tickets))
        with card.waits() as waits:
            rows.step()
        assert waits.count() == WAITS_OF_A_STEP, waits
        assert waits.count(uploads=True) <= UPLOADS_OF_A_STEP + UPLOADS_OF_NEW_ROWS * changed, waits
    assert len(set(sizes)) > 1


@pytest.mark.parametrize("kind", KINDS)
def test_a_prompt_waits_once_for_its_first_token(card, base, kind):
    resident = load(base)
    rows = Rows(resident)
    ticket = ask(resident, "What is it?", **KINDS[kind])
    with card.waits() as waits:
        rows.join(ticket)
    assert waits.count("grit_core") == WAITS_OF_A_PROMPT, waits
    assert waits.count(uploads=True) <= UPLOADS_OF_A_PROMPT, waits


@pytest.mark.parametrize("kind", KINDS)
def test_a_lone_answer_waits_once_a_token_and_once_more_in_transformers(card, base, kind):
    resident = load(base)

    def count(num_tokens):
        ticket = ask(resident, "What is it?", **KINDS[kind], max_new_tokens=num_tokens)
        with card.waits() as waits:
            answer_alone(ticket)
        assert len(ticket.ids) == num_tokens
        ours = waits.count("grit_core"), waits.count("grit_core", uploads=True)
        return (waits.count(), *ours)

    added = [long - short for short, long in zip(count(2), count(4), strict=True)]
    assert added == [2 * WAITS_OF_A_LONE_TOKEN, 2, 2 * UPLOADS_OF_RULES * ("held" in kind)]


@torch.inference_mode()
def answers(folder, device, *, alone, **options):
    resident = load(folder, device)
    tickets = [
        ask(resident, text, **kind, **options)
        for text, kind in zip(("Why?", "What is it?", "And?", "Who?"), KINDS.values(), strict=False)
    ]
    if alone:
        for ticket in tickets:
            answer_alone(ticket)
    else:
        rows = Rows(resident)
        for ticket in tickets:
            rows.join(ticket)
        while rows.batch.tickets:
            rows.step()
    return [ticket.ids for ticket in tickets]


@pytest.mark.parametrize(
    ("device", "alone"), [("cpu", True), ("sim", False), ("sim", True)], ids=str
)
@pytest.mark.usefixtures("accelerator")
def test_a_seed_gives_the_same_answer_on_every_device_shared_or_alone(base, device, alone):
    expected = answers(base, "cpu", alone=False, max_new_tokens=6)
    assert len(set(map(tuple, expected))) == len(expected)
    assert answers(base, device, alone=alone, max_new_tokens=6) == expected


@pytest.mark.parametrize("alone", [False, True], ids=["shared", "alone"])
def test_a_sampled_answer_leaves_the_random_states_as_they_are(accelerator, base, alone):
    accelerator.generator.manual_seed(11)
    torch.random.default_generator.manual_seed(12)
    before = accelerator.generator.get_state(), torch.get_rng_state()
    answers(base, "sim", alone=alone, max_new_tokens=4)
    assert torch.equal(accelerator.generator.get_state(), before[0])
    assert torch.equal(torch.get_rng_state(), before[1])


@pytest.mark.usefixtures("accelerator")
def test_a_token_that_transformers_asks_for_after_the_last_one_is_not_in_the_answer(
    base, monkeypatch
):
    """It looks a step late on MPS whether the answer has ended."""

    class Late(StopCheck):
        was_over = False

        def __call__(self, *args):
            is_over, self.was_over = self.was_over, super().__call__(*args)
            return is_over

    resident = load(base, "cpu")
    for kind in KINDS.values():
        expected, found = (ask(resident, "Why?", **kind, max_new_tokens=5) for _ in range(2))
        answer_alone(expected)
        with monkeypatch.context() as patched:
            patched.setattr("transformers.generation.utils.StopCheck", Late)
            answer_alone(found)
        assert found.ids == expected.ids


NUM_QUERIES_FOR_A_KEY = 8


def test_a_step_copies_no_keys_for_the_queries_that_share_them(accelerator, base, tmp_path):
    """Keys and values are repeated for each of the queries where attention does not pack these."""
    config = LlamaConfig(
        vocab_size=400,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=NUM_QUERIES_FOR_A_KEY,
        num_key_value_heads=1,
        max_position_embeddings=1024,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(base).save_pretrained(tmp_path)
    resident = load(tmp_path)
    assert resident.model.config._attn_implementation == "sdpa"
    rows = Rows(resident)
    for _ in range(4):
        rows.join(ask(resident, "word " * 140))
    rows.step()
    keys_of_a_layer = rows.batch.num_bytes // 4  # two layers, each with keys and values
    before = accelerator.peak_bytes = accelerator.measure()
    rows.step()
    # What the simulated device's attention itself copies is of one head for each key.
    assert accelerator.peak_bytes - before < NUM_QUERIES_FOR_A_KEY / 2 * keys_of_a_layer
