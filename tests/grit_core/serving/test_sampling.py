"""Tokens drawn for one request."""

import pytest
import torch

from grit_core.serving.sampling import TokenSampler

LOGITS = torch.tensor([0.0, 2.0, 1.0, -1.0, 2.0])


def draws(num, **options):
    sampler = TokenSampler(**{"temperature": 1.0, "top_p": 1.0, "seed": 3, **options})
    return [sampler.choose(LOGITS) for _ in range(num)]


def test_without_temperature_it_is_the_likeliest_and_the_first_of_equal_ones():
    assert draws(3, temperature=0.0) == [1, 1, 1]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_the_shares_of_the_tokens_are_their_probabilities(temperature):
    num = 20_000
    counts = torch.bincount(torch.tensor(draws(num, temperature=temperature)), minlength=5)
    expected = (LOGITS.double() / temperature).softmax(-1)
    spread = (expected * (1 - expected) / num).sqrt()
    assert ((counts / num - expected).abs() < 5 * spread).all()


def test_top_p_keeps_the_smallest_set_that_reaches_it():
    p = LOGITS.double().softmax(-1)
    assert float(p[1] + p[4]) == pytest.approx(0.78, abs=0.01)
    assert set(draws(500, top_p=0.7)) == {1, 4}
    assert set(draws(500, top_p=0.8)) == {1, 2, 4}
    assert set(draws(500, top_p=1e-9)) <= {1, 4}
    assert len(set(draws(50, top_p=1e-9))) == 1


def test_top_p_looks_beyond_the_first_candidates_where_it_must():
    sampler = TokenSampler(temperature=1.0, top_p=0.999, seed=0)
    flat = torch.zeros(5000)
    assert len({sampler.choose(flat) for _ in range(600)}) > 500


def test_a_seed_decides_and_no_seed_does_not():
    assert draws(50) == draws(50)
    assert draws(50) != draws(50, seed=4)
    assert draws(50, seed=None) != draws(50, seed=None)


def test_drawing_leaves_the_random_state_of_the_process_alone():
    before = torch.random.get_rng_state()
    draws(5)
    assert torch.equal(before, torch.random.get_rng_state())


def test_a_probability_of_zero_is_never_drawn():
    sampler = TokenSampler(temperature=1.0, top_p=1.0, seed=0)
    logits = torch.tensor([-torch.inf, 0.0, -torch.inf])
    assert {sampler.choose(logits) for _ in range(200)} == {1}
