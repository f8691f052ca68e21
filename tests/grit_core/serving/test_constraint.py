"""What one answer is held to, without a model: masks, their bound and what ends an answer."""

import json

import pytest
import torch

from grit_core.grammars import json_schema_grammar
from grit_core.serving.constraint import (
    SECONDS_AHEAD,
    Constraint,
    MaskThread,
    build_mask_table,
    expand_masks,
    pack_masks,
)
from grit_core.serving.grammar_tokenizer import GrammarTokenizer, copy_backend
from tests.tiny_models import byte_tokenizer

END = 2


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer(eos_token="<|im_end|>", pad_token="<|endoftext|>")


@pytest.fixture(scope="module")
def grammars(tokenizer):
    return GrammarTokenizer(copy_backend(tokenizer), eos_token_id=END)


@pytest.fixture
def constrain(grammars):
    return lambda schema: Constraint(
        grammars.compile(json_schema_grammar(schema)), grammars, {END, 10_000}
    )


def biases(constraints, num_logits):
    packed = torch.from_numpy(pack_masks(constraints, num_logits=num_logits))
    table = build_mask_table(torch.device("cpu"))
    return expand_masks(packed.view(torch.uint8), table, num_logits=num_logits)


def allowed(constraint, num_logits=299):
    bias_HV = biases([constraint], num_logits)
    assert bias_HV.shape == (1, num_logits)
    assert set(bias_HV[0].tolist()) <= {0.0, -torch.inf}
    found = bias_HV[0].isfinite().nonzero()[:, 0].tolist()
    assert found == [token for token in range(num_logits) if constraint.allows(token)]
    return found


def test_the_end_is_allowed_where_the_value_may_end_and_nowhere_else(constrain, tokenizer):
    number = constrain({"type": "integer"})
    assert END not in allowed(number)
    assert not number.accept(tokenizer.convert_tokens_to_ids("7"))
    number.prepare()
    assert END in allowed(number)
    assert tokenizer.convert_tokens_to_ids("1") in allowed(number)


def test_a_value_that_is_whole_ends_the_answer(constrain, tokenizer):
    constant = constrain({"const": 7})
    assert constant.accept(tokenizer.convert_tokens_to_ids("7"))
    assert constant.fault is None


@pytest.mark.parametrize("text", ["a<|im_end|>b", "<|endoftext|>", '"\\<|im_end|>'])
def test_the_text_of_a_control_token_is_spelled(constrain, tokenizer, text):
    held = constrain({"const": text})
    ids = [allowed(held)[-1]]
    while not held.accept(ids[-1]):
        held.prepare()
        ids.append(allowed(held)[-1])
    assert held.fault is None
    assert json.loads(tokenizer.decode(ids, skip_special_tokens=True)) == text


@pytest.mark.parametrize("num_logits", [320, 512])
def test_logits_beyond_the_vocabulary_are_never_chosen(constrain, num_logits):
    held = constrain({"type": "object"})
    assert allowed(held, num_logits=num_logits) == allowed(held, num_logits=299)


def test_a_model_with_fewer_logits_than_tokens_has_the_first_tokens_masks(constrain):
    held = constrain({"type": "string"})
    assert allowed(held, num_logits=40) == [token for token in allowed(held) if token < 40]


def test_masks_of_several_answers_stay_apart(constrain):
    held = [constrain({"type": "integer"}), constrain({"const": "ab"}), constrain({"type": "null"})]
    bias_HV = biases(held, 299)
    found = [row.isfinite().nonzero()[:, 0].tolist() for row in bias_HV]
    assert found == [allowed(one) for one in held]


def test_a_schema_whose_masks_take_too_long_ends_its_answer(constrain, tokenizer, monkeypatch):
    clock = iter(range(1000))
    constraint = constrain({"type": "string"})
    # Each mask takes a second of the processor from here on.
    monkeypatch.setattr("grit_core.serving.constraint.time.thread_time", lambda: next(clock))
    assert not constraint.accept(tokenizer.convert_tokens_to_ids('"'))
    num = 0
    while constraint.fault is None:
        constraint.prepare()
        num += 1
    assert SECONDS_AHEAD < num <= SECONDS_AHEAD + 1
    fault = constraint.fault.faults[0]
    assert (fault.code, "takes too long" in fault.detail) == ("grammar_too_complex", True)
    assert constraint.accept(tokenizer.convert_tokens_to_ids("a"))


def test_masks_are_prepared_in_a_thread_of_their_own(constrain, tokenizer):
    masks = MaskThread()
    first, second = constrain({"const": "ab"}), constrain({"const": [1]})
    first.accept(tokenizer.convert_tokens_to_ids('"'))
    second.accept(tokenizer.convert_tokens_to_ids("["))
    masks.prepare([first, second]).result()
    masks.close()
    assert allowed(first) == [tokenizer.convert_tokens_to_ids("a")]
    assert tokenizer.convert_tokens_to_ids("1") in allowed(second)
    assert masks.prepare([]) is None


def test_an_answer_whose_mask_fails_ends_alone(constrain, monkeypatch):
    failing, other = constrain({"type": "integer"}), constrain({"type": "integer"})

    def fail():
        raise RuntimeError("lost")

    monkeypatch.setattr(failing, "prepare", fail)
    masks = MaskThread()
    try:
        masks.prepare([failing, other]).result()
    finally:
        masks.close()
    assert "RuntimeError" in failing.fault.faults[0].detail
    assert other.fault is None
