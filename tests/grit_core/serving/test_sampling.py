"""Tokens drawn for one request."""

import pytest
import torch

from grit_core.serving.sampling import FIRST_CANDIDATES
from grit_core.serving.token_chooser import TokenChooser
from tests.grit_core.serving.rows import Row, sampler

LOGITS = torch.tensor([0.0, 2.0, 1.0, -1.0, 2.0])


def draws(num, logits=LOGITS, **options):
    row = Row(sampler(**options))
    chooser = TokenChooser([row], device=torch.device("cpu"))
    for _ in range(num):
        row.ids += chooser.choose(logits[None])
    return row.ids


def numbers(num, seed):
    """The uniform numbers of a request."""
    generator = torch.Generator().manual_seed(seed)
    return [float(torch.rand((), generator=generator, dtype=torch.float64)) for _ in range(num)]


def by_definition(logits, u, *, temperature, top_p):
    """The token of a number, from the whole distribution in float64."""
    p = (logits.double() / temperature).softmax(-1)
    order = logits.sort(descending=True, stable=True).indices
    if top_p < 1:
        cumulative = p[order].cumsum(-1)
        order = order[: int((cumulative < top_p).sum()) + 1]
    elif len(logits) > FIRST_CANDIDATES:
        last = logits[order[FIRST_CANDIDATES - 1]]
        likeliest = order[logits[order] > last]
        others = torch.ones(len(logits), dtype=torch.bool)
        others[likeliest] = False
        order = torch.cat([likeliest, others.nonzero()[:, 0]])
    cumulative = p[order].cumsum(-1)
    return int(order[int((cumulative <= u * cumulative[-1]).sum())])


def test_without_temperature_it_is_the_likeliest_and_the_first_of_equal_ones():
    assert draws(3, temperature=0.0) == [1, 1, 1]


@pytest.mark.parametrize("top_p", [0.3, 0.9, 0.999, 1.0])
@pytest.mark.parametrize("spread", [0.05, 1.0, 5.0], ids=["flat", "wide", "peaked"])
@pytest.mark.parametrize("size", [200, 5000])
@pytest.mark.parametrize("rounded", [False, True], ids=["distinct", "with equal ones"])
def test_a_number_gives_the_token_at_its_share_of_the_distribution(size, spread, top_p, rounded):
    """Whichever part of the vocabulary was looked at to find it."""
    torch.manual_seed(size)
    logits = torch.randn(size) * spread
    if rounded:
        logits = logits.bfloat16().float()
    found = draws(60, logits, top_p=top_p, temperature=0.8, seed=5)
    expected = [by_definition(logits, u, temperature=0.8, top_p=top_p) for u in numbers(60, 5)]
    assert found == expected


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_the_shares_of_the_tokens_are_their_probabilities(temperature):
    num = 5000
    counts = torch.bincount(torch.tensor(draws(num, temperature=temperature)), minlength=5)
    expected = (LOGITS.double() / temperature).softmax(-1)
    spread = (expected * (1 - expected) / num).sqrt()
    assert ((counts / num - expected).abs() < 5 * spread).all()


def test_top_p_keeps_the_smallest_set_that_reaches_it():
    p = LOGITS.double().softmax(-1)
    assert float(p[1] + p[4]) == pytest.approx(0.78, abs=0.01)
    assert set(draws(500, top_p=0.7)) == {1, 4}
    assert set(draws(500, top_p=0.8)) == {1, 2, 4}
    assert set(draws(50, top_p=1e-9)) == {1}  # the first of equal ones


@pytest.mark.parametrize("top_p", [0.999, 1.0])
def test_tokens_beyond_the_first_candidates_are_drawn_too(top_p):
    assert len(set(draws(600, torch.zeros(5000), top_p=top_p, seed=0))) > 500


def test_a_seed_decides_and_no_seed_does_not():
    assert draws(50) == draws(50)
    assert draws(50) != draws(50, seed=4)
    assert draws(50, seed=None) != draws(50, seed=None)


def test_drawing_leaves_the_random_state_of_the_process_alone():
    before = torch.random.get_rng_state()
    draws(5)
    assert torch.equal(before, torch.random.get_rng_state())


@pytest.mark.parametrize("size", [3, 2000])
def test_a_probability_of_zero_is_never_drawn(size):
    logits = torch.full((size,), -torch.inf)
    logits[1] = 0.0
    assert set(draws(200, logits, seed=0)) == {1}


def test_the_last_of_all_numbers_draws_a_token_that_may_come(monkeypatch):
    """Rounding may leave the sum of the likeliest tokens below one where nothing else is left."""
    just_below_one = torch.tensor(1 - 2**-53, dtype=torch.float64)
    monkeypatch.setattr(torch, "rand", lambda *_args, **_options: just_below_one)
    logits = torch.full((3000,), -torch.inf)
    logits[1000:1150] = torch.randn(150, generator=torch.Generator().manual_seed(0))
    for temperature in (0.3, 0.7, 1.0, 1.3):
        assert draws(1, logits, temperature=temperature)[0] in range(1000, 1150)


def test_logits_that_are_no_numbers_give_a_token():
    assert draws(1, torch.full((5,), torch.nan))[0] in range(5)
    assert draws(1, torch.full((500,), -torch.inf))[0] in range(500)
