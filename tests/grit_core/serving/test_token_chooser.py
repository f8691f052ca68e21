"""The next tokens of the rows of a step: what each row alone would get, with one wait."""

import itertools

import pytest
import torch
from transformers import RepetitionPenaltyLogitsProcessor

from grit_core import transfer
from grit_core.grammars import json_schema_grammar
from grit_core.serving.constraint import Constraint
from grit_core.serving.grammar_tokenizer import GrammarTokenizer, copy_backend
from grit_core.serving.sampling import TokenSampler
from grit_core.serving.token_chooser import TokenChooser
from tests.grit_core.serving.rows import Row, sampler
from tests.tiny_models import byte_tokenizer

END, SIZE = 2, 3000
CPU = torch.device("cpu")
METHOD = {0.9: "_draw_among_all", 1.0: "_probabilities"}
"""What looks at a whole vocabulary, by `top_p`."""


@pytest.fixture(scope="module")
def grammars():
    tokenizer = byte_tokenizer(eos_token="<|im_end|>", pad_token="<|endoftext|>")
    return GrammarTokenizer(copy_backend(tokenizer), eos_token_id=END)


@pytest.fixture
def new_rows(grammars):
    """Greedy and sampled rows, three of them held to a grammar."""

    def new():
        held = [
            Constraint(grammars.compile(json_schema_grammar({"type": kind})), grammars, {END})
            for kind in ("object", "integer", "array")
        ]
        return [
            Row(sampler(temperature=0.0), prompt_ids=[5, 6, 7]),
            Row(sampler(seed=1), prompt_ids=[8]),
            Row(sampler(temperature=0.7, top_p=0.9, seed=2), held[0], prompt_ids=[9, 9]),
            Row(sampler(temperature=0.0), held[1], prompt_ids=[5, 1]),
            Row(sampler(temperature=2.0, seed=4), held[2], prompt_ids=[1, 2, 3, 4]),
            Row(sampler(temperature=1.3, top_p=0.5, seed=5), prompt_ids=[7]),
        ]

    return new


def answers(rows, device, steps, *, penalty=None, together=True):
    """Some tokens for each row, with the same logits however the rows are put together."""
    batches = [rows] if together else [[row] for row in rows]
    for batch in batches:
        chooser = TokenChooser(batch, device=device, penalty=penalty)
        for number in range(steps):
            torch.manual_seed(number)
            logits = torch.randn(len(rows), SIZE) * 4
            first = rows.index(batch[0])
            part = logits[first : first + len(batch)].to(device)
            for row, token in zip(batch, chooser.choose(part), strict=True):
                row.ids.append(token)
                if row.constraint is not None:
                    row.constraint.accept(token)
                    row.constraint.prepare()
    return [row.ids for row in rows]


PENALTIES = [None, RepetitionPenaltyLogitsProcessor(1.5)]


@pytest.mark.parametrize("penalty", PENALTIES, ids=["plain", "penalty"])
@pytest.mark.parametrize("device", ["cpu", "sim"])
@pytest.mark.usefixtures("accelerator")
def test_a_row_gets_what_it_gets_alone_on_any_device(new_rows, device, penalty):
    expected = answers(new_rows(), CPU, 6, penalty=penalty, together=False)
    assert len(set(map(tuple, expected))) == len(expected)
    assert answers(new_rows(), torch.device(device), 6, penalty=penalty) == expected


def test_a_penalty_is_on_every_token_of_the_prompt_and_of_the_answer():
    row = Row(sampler(temperature=0.0), prompt_ids=[1, 2])
    other = Row(sampler(temperature=0.0), prompt_ids=[0, 3, 0, 3])
    chooser = TokenChooser([row, other], device=CPU, penalty=RepetitionPenaltyLogitsProcessor(2.0))
    logits = torch.tensor([4.0, 9.0, 9.0, 5.0, -1.0])
    found = []
    for _ in range(3):
        tokens = chooser.choose(torch.stack([logits, logits]))
        found.append(tokens)
        for each, token in zip((row, other), tokens, strict=True):
            each.ids.append(token)
    # 9 counts as 4.5 once it was there, and 5 as 2.5.
    assert found == [[3, 1], [1, 2], [1, 1]]


def test_an_allowed_logit_is_what_it_was_bit_by_bit(grammars):
    held = Constraint(grammars.compile(json_schema_grammar({"type": "object"})), grammars, {END})
    free = Row(sampler(temperature=0.0))
    logits = torch.randn(2, 299)
    before = logits.clone()
    TokenChooser([free, Row(sampler(), held)], device=CPU).choose(logits)
    kept = logits.isfinite()
    assert kept[0].all()
    assert 0 < int(kept[1].sum()) < 299
    assert torch.equal(logits[kept], before[kept])


@pytest.mark.parametrize("penalty", PENALTIES, ids=["plain", "penalty"])
@pytest.mark.parametrize("chosen", [[0], [1], [0, 1], [3], [1, 5], [0, 1, 2, 3, 4, 5]], ids=str)
def test_a_step_waits_once_and_uploads_once(accelerator, monkeypatch, new_rows, chosen, penalty):
    """Greedy and sampled, held and free, with a penalty or not: 0 uploads where none is needed."""
    monkeypatch.setattr(transfer, "is_asynchronous", lambda _device: False)
    rows = [new_rows()[index] for index in chosen]
    logits = (torch.randn(len(rows), SIZE) * 9).to("sim")
    chooser = TokenChooser(rows, device=logits.device, penalty=penalty)
    for step in range(3):
        with accelerator.waits() as waits:
            tokens = chooser.choose(logits.clone())
        needs_upload = penalty is not None or any(row.constraint for row in rows)
        assert waits.count() == 1, (step, waits)
        assert waits.count(uploads=True) == int(needs_upload), (step, waits)
        for row, token in zip(rows, tokens, strict=True):
            row.ids.append(token)


def test_sampled_rows_are_summarized_on_the_device(accelerator):
    """A step copies the likeliest tokens of each row and not its whole vocabulary."""
    rows = [Row(sampler(seed=seed)) for seed in range(4)]
    logits = (torch.randn(4, 50_000) * 9).to("sim")
    chooser = TokenChooser(rows, device=logits.device)
    with accelerator.waits() as waits:
        chooser.choose(logits)
    assert [wait.numel for wait in waits if wait.kind == "download"] == [4 * (2 * 256 + 1)]


def test_the_whole_vocabulary_is_read_only_for_a_row_that_needs_it(accelerator):
    logits = torch.randn(2, 5000) * 9
    logits[1] = 0.0  # no token is likelier than another
    chooser = TokenChooser([Row(sampler()), Row(sampler())], device=torch.device("sim"))
    with accelerator.waits() as waits:
        tokens = chooser.choose(logits.to("sim"))
    downloads = [wait.numel for wait in waits if wait.kind == "download"]
    assert downloads == [2 * 513, 5000]
    assert tokens == [
        TokenChooser([Row(sampler())], device=CPU).choose(one[None])[0] for one in logits
    ]


def test_which_of_equally_likely_tokens_a_device_lists_does_not_matter(monkeypatch):
    """A draw beyond the tokens that are certain is made from the whole vocabulary."""
    logits = (torch.randn(1, 4000) * 2).round()

    def draws():
        row = Row(sampler(top_p=0.95))
        chooser = TokenChooser([row], device=CPU)
        for _ in range(100):
            row.ids += chooser.choose(logits.clone())
        return row.ids

    expected = draws()
    topk = torch.Tensor.topk

    def listed_backwards(tensor, num):
        values, ids = topk(tensor.flip(-1), num)
        return values, tensor.shape[-1] - 1 - ids

    _, ids = listed_backwards(logits, 256)
    assert not torch.equal(ids, topk(logits, 256).indices)
    monkeypatch.setattr(torch.Tensor, "topk", listed_backwards)
    assert draws() == expected


@pytest.mark.parametrize("top_p", [0.9, 1.0])
def test_a_step_that_is_made_again_draws_by_the_same_numbers(monkeypatch, top_p):
    """Memory runs out while the whole vocabulary of the second row is read."""

    def draws(*, fails):
        rows = [Row(sampler(top_p=top_p, seed=seed)) for seed in (1, 2, 3)]
        for _ in range(4):
            logits = torch.zeros(3, 4000)  # no token is likelier than another
            if fails:
                calls = []

                def read(sampler, *args, calls=calls, **options):
                    calls.append(sampler)
                    if len(calls) == 2:
                        raise MemoryError
                    return draw(sampler, *args, **options)

                chooser = TokenChooser(rows, device=CPU)
                with monkeypatch.context() as patch:
                    patch.setattr(TokenSampler, METHOD[top_p], read)
                    with pytest.raises(MemoryError):
                        chooser.choose(logits.clone())
            for row, token in zip(rows, TokenChooser(rows, device=CPU).choose(logits), strict=True):
                row.ids.append(token)
        return [row.ids for row in rows]

    draw = getattr(TokenSampler, METHOD[top_p])
    assert draws(fails=True) == draws(fails=False)


def test_rows_may_be_put_together_in_any_order(new_rows):
    expected = answers(new_rows(), CPU, 1)
    torch.manual_seed(0)
    logits = torch.randn(6, SIZE) * 4
    for order in itertools.islice(itertools.permutations(range(6)), 0, 720, 101):
        rows = new_rows()
        found = TokenChooser([rows[i] for i in order], device=CPU).choose(logits[list(order)])
        assert [[token] for token in found] == [expected[i] for i in order]
