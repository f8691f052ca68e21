"""What one answer is held to, without a model: masks, their bound and what ends an answer."""

import json

import pytest
import torch

from grit_core.grammars import json_schema_grammar
from grit_core.serving.constraint import SECONDS_AHEAD, Constraint, MaskThread
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


def allowed(constraint, num_logits=299):
    logits_V = torch.zeros(num_logits)
    constraint.apply(logits_V)
    return logits_V.isfinite().nonzero()[:, 0].tolist()


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


def test_logits_beyond_the_vocabulary_are_never_chosen(constrain):
    assert allowed(constrain({"type": "object"}), num_logits=512) == allowed(
        constrain({"type": "object"}), num_logits=299
    )


def test_allowed_logits_stay_as_they_are_bit_by_bit(constrain):
    logits_V = torch.randn(299)
    before_V = logits_V.clone()
    constraint = constrain({"type": "object"})
    constraint.apply(logits_V)
    kept = logits_V.isfinite()
    assert 0 < int(kept.sum()) < 299
    assert torch.equal(logits_V[kept], before_V[kept])


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
