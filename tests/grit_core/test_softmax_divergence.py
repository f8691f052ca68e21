"""The divergence in float32, against float64."""

import pytest
import torch
from torch import Tensor

from grit_core.softmax_divergence import divergence_sum


def exact(whole: Tensor, cut: Tensor) -> float:
    log_p, log_q = (logits.cpu().double().log_softmax(-1) for logits in (whole, cut))
    p, d = log_p.exp(), log_q - log_p
    term = torch.where(d.abs() < 1, p * (d.expm1() - d), log_q.exp() - p - p * d)
    return float(torch.where(log_p.isneginf(), 0, term).sum())


def logits_like_a_models(num_tokens: int, vocabulary: int, *, peak: float, kl: float):
    """Two sets of logits, one a little off the other, with words as frequent as in a language."""
    generator = torch.Generator().manual_seed(vocabulary)
    rank = torch.rand(num_tokens, vocabulary, generator=generator) * vocabulary + 1
    whole = 15 - 1.1 * rank.log() + torch.randn(num_tokens, vocabulary, generator=generator)
    whole[:, 3] += peak
    noise = torch.randn(num_tokens, vocabulary, generator=generator)
    p = whole.softmax(-1)
    variance = (p * (noise - (p * noise).sum(-1, keepdim=True)).square()).sum(-1).mean()
    return whole, whole + 3.0 + noise * (2 * kl / variance).sqrt()


@pytest.mark.parametrize("vocabulary", [320, 49_280, 152_064])
@pytest.mark.parametrize("kl", [1e-9, 1e-8, 1e-6, 1e-4, 1e-2, 1.0])
def test_it_is_that_of_float64_to_five_digits(vocabulary: int, kl: float) -> None:
    for peak in (0.0, 12.0):
        whole, cut = logits_like_a_models(4, vocabulary, peak=peak, kl=kl)
        assert float(divergence_sum(whole, cut)) == pytest.approx(exact(whole, cut), rel=1e-5)


@pytest.mark.parametrize("size", [30.0, 1e4])
def test_distributions_that_have_nothing_in_common_diverge_by_a_finite_number(size: float) -> None:
    generator = torch.Generator().manual_seed(0)
    whole, cut = torch.randn(2, 5, 1000, generator=generator) * size
    assert float(divergence_sum(whole, cut)) == pytest.approx(exact(whole, cut), rel=1e-5)


def test_equal_logits_diverge_by_exactly_nothing() -> None:
    whole = torch.randn(9, 5000, generator=torch.Generator().manual_seed(0)) * 5
    assert float(divergence_sum(whole, whole.clone())) == 0.0
    assert float(divergence_sum(whole, whole + 7)) <= 1e-10
    assert float(divergence_sum(whole[:0], whole[:0])) == 0.0


def test_tokens_that_the_model_rules_out_count_nothing_and_broken_logits_give_no_number() -> None:
    whole, cut = torch.randn(2, 3, 50, generator=torch.Generator().manual_seed(0))
    whole[:, 4] = cut[:, 4] = -torch.inf
    assert float(divergence_sum(whole, cut)) == pytest.approx(exact(whole, cut), rel=1e-5)
    cut[0, 0] = torch.nan
    assert divergence_sum(whole, cut).isnan()


def test_on_a_device_it_is_the_same_number_and_nothing_waits(accelerator) -> None:
    whole, cut = logits_like_a_models(50, 20_000, peak=3.0, kl=1e-4)
    there = [logits.to("sim") for logits in (whole, cut)]
    with accelerator.waits() as waits:
        found = divergence_sum(*there)
    assert len(waits) == 0, waits
    assert float(found) == float(divergence_sum(whole, cut))
