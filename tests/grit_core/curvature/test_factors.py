"""Factors, bases and spectra, against closed forms."""

import pytest
import torch

from grit_core.curvature.factors import (
    RunningFactor,
    approximate,
    damped_spectrum,
    effective_rank,
    eigenbases,
    fisher_energies,
)
from grit_core.curvature.gauge import canonical_gauge, transport_squares

RANK = 6


def covariance(seed, *, layers=3, rank=RANK):
    generator = torch.Generator().manual_seed(seed)
    root = torch.randn(layers, rank, rank, generator=generator, dtype=torch.float64)
    return root @ root.mT


def _energies(Z, H, *, damping):
    return canonical_gauge(Z, H, damping=damping).singular_LR.square()


def test_the_average_is_the_bias_corrected_exponential_one():
    factor = RunningFactor.empty(1, RANK)
    seen = torch.tensor([True])
    observations = [covariance(seed, layers=1).float() for seed in range(5)]
    for observation in observations:
        factor.update(observation, seen, decay=0.9)
    weights = torch.tensor([0.9**age for age in reversed(range(5))], dtype=torch.float64)
    expected = (
        sum(w * o.double() for w, o in zip(weights, observations, strict=True)) / weights.sum()
    )
    torch.testing.assert_close(factor.corrected_LRR(), expected, rtol=1e-6, atol=1e-6)


def test_a_layer_that_was_not_seen_keeps_its_average():
    factor = RunningFactor.empty(2, RANK)
    factor.update(covariance(0, layers=2).float(), torch.tensor([True, True]), decay=0.9)
    before = factor.corrected_LRR()
    factor.update(covariance(1, layers=2).float(), torch.tensor([True, False]), decay=0.9)
    after = factor.corrected_LRR()
    assert not torch.equal(after[0], before[0])
    assert torch.equal(after[1], before[1])


def test_bases_diagonalise_their_factors():
    factor = covariance(0)
    basis = eigenbases(factor)
    turned = basis.mT @ factor @ basis
    off_diagonal = turned - torch.diag_embed(turned.diagonal(dim1=-2, dim2=-1))
    assert off_diagonal.abs().max() < 1e-10 * factor.abs().max()
    identity = torch.eye(RANK, dtype=torch.float64).expand_as(factor)
    torch.testing.assert_close(basis.mT @ basis, identity)


@pytest.mark.parametrize("scale", [1e-16, 1e-8, 1e8])
def test_bases_do_not_depend_on_the_scale_of_a_factor(scale):
    factor = covariance(0)
    turned = eigenbases(factor * scale)
    off = turned.mT @ factor @ turned
    off = off - torch.diag_embed(off.diagonal(dim1=-2, dim2=-1))
    assert off.abs().max() < 1e-8 * factor.abs().max()


def test_rank_deficient_and_zero_factors_have_bases_and_spectra():
    factor = covariance(0)
    factor[0] = 0
    factor[1] = torch.outer(torch.ones(RANK), torch.ones(RANK)).double()
    assert eigenbases(factor).isfinite().all()
    energies = _energies(factor, covariance(1), damping=1e-4)
    assert energies.isfinite().all()
    assert energies[0].max() < 1e-12


def test_damping_is_relative_to_the_mean_eigenvalue():
    factor = covariance(0)
    basis, e = damped_spectrum(factor * 1e6, 0.1)
    added = basis * e[:, None, :] @ basis.mT - factor * 1e6
    mean = factor.diagonal(dim1=-2, dim2=-1).mean(-1) * 1e6
    expected = 0.1 * mean[:, None, None] * torch.eye(RANK, dtype=torch.float64)
    torch.testing.assert_close(added, expected, rtol=1e-6, atol=1e-2)


def test_each_layer_keeps_of_its_factor_what_its_approximation_says():
    factor = covariance(0)
    kept = approximate(factor, [1, 4, 8])
    assert torch.equal(kept[0], torch.diag(factor[0].diagonal()))
    assert torch.equal(kept[1][:4, :4], factor[1][:4, :4])
    assert kept[1][:4, 4:].abs().max() == 0
    assert torch.equal(kept[2], factor[2])


def test_the_spectrum_is_the_same_for_every_split_of_ba():
    """Z -> R Z R', H -> R^-T H R^-1 under (A, B) -> (R A, B R^-1)."""
    Z, H = covariance(0), covariance(1)
    R = torch.randn(RANK, RANK, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    inverse = torch.linalg.inv(R)
    moved = _energies(R @ Z @ R.mT, inverse.mT @ H @ inverse, damping=1e-12)
    torch.testing.assert_close(moved, _energies(Z, H, damping=1e-12), rtol=1e-5, atol=1e-6)


def test_the_energies_sum_to_the_trace_of_the_product_of_the_factors():
    Z, H = covariance(0), covariance(1)
    total = _energies(Z, H, damping=1e-12).sum(-1)
    expected = (Z @ H).diagonal(dim1=-2, dim2=-1).sum(-1)
    torch.testing.assert_close(total, expected, rtol=1e-6, atol=1e-9)


def test_effective_rank_counts_equal_directions():
    energies = torch.zeros(3, RANK, dtype=torch.float64)
    energies[0, 0] = 5
    energies[1, :4] = 2
    found = effective_rank(energies)
    torch.testing.assert_close(found, torch.tensor([1.0, 4.0, 0.0], dtype=torch.float64))


def test_transport_to_the_same_basis_changes_nothing():
    basis = eigenbases(covariance(0))
    moments = torch.rand(3, RANK, 7, dtype=torch.float64)
    torch.testing.assert_close(transport_squares(moments, basis.mT @ basis), moments)


def test_transport_is_exact_for_gradients_that_are_uncorrelated_in_the_old_basis():
    old, new = eigenbases(covariance(0, layers=1)), eigenbases(covariance(1, layers=1))
    generator = torch.Generator().manual_seed(3)
    scales = torch.linspace(0.1, 2, RANK, dtype=torch.float64)
    coordinates = torch.randn(200_000, RANK, generator=generator, dtype=torch.float64) * scales
    gradients = coordinates @ old[0].mT
    old_moments = coordinates.square().mean(0)[None, :, None]
    new_moments = (gradients @ new[0]).square().mean(0)
    carried = transport_squares(old_moments, new.mT @ old)[0, :, 0]
    torch.testing.assert_close(carried, new_moments, rtol=0.02, atol=0.01)


def test_energies_are_those_of_the_gauge_without_its_vectors():
    Z, H = covariance(0, layers=3), covariance(1, layers=3)
    gauge = canonical_gauge(Z, H, damping=1e-12).singular_LR.square()
    torch.testing.assert_close(fisher_energies(Z, H), gauge, rtol=1e-7, atol=0)
    torch.testing.assert_close(
        fisher_energies(Z * 1e-16, H * 1e16), fisher_energies(Z, H), rtol=1e-9, atol=0
    )


def test_energies_of_singular_and_unusable_factors_are_finite():
    Z, H = covariance(0, layers=4), covariance(1, layers=4)
    vectors = torch.randn(2, RANK, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    Z[0] = vectors.mT @ vectors
    Z[1], Z[2, 0, 0], H[3] = 0.0, float("nan"), -1e-9 * H[3]
    energies = fisher_energies(Z, H)
    expected = torch.linalg.eigvals(Z[0] @ H[0]).real.sort(descending=True).values
    torch.testing.assert_close(energies[0], expected, rtol=1e-8, atol=1e-10 * float(expected[0]))
    assert energies.isfinite().all()
    assert not energies[1:].any()
