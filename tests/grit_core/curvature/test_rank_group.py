"""Layers of equal rank together: what is taken, what is refused, what is told."""

import math

import pytest
import torch
from torch import nn

from grit_core.curvature.capture import LayerSums
from grit_core.curvature.rank_group import (
    AdaptedLayer,
    FisherSettings,
    LayerCurvature,
    RankGroup,
    group_by_rank,
    summarise_by_modality,
)

RANK = 4
SETTINGS = FisherSettings(ema_decay=0.9)


def layer_of(name, *, rank=RANK, approximation="kfac"):
    return AdaptedLayer(
        name=name,
        modality="text",
        lora_A=nn.Parameter(torch.zeros(rank, 6)),
        lora_B=nn.Parameter(torch.zeros(5, rank)),
        fisher_approximation=approximation,
    )


def sums_of(*names, seed=0, positions=30, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name in names:
        z, h = (torch.randn(positions, RANK, generator=generator) * scale for _ in range(2))
        found[name] = LayerSums(
            z.mT @ z, h.mT @ h, torch.tensor(float(positions)), torch.tensor(10.0), 1
        )
    return found


def test_factors_are_means_over_the_counted_positions():
    group = RankGroup([layer_of("a")])
    sums = sums_of("a")
    assert group.observe(sums, SETTINGS) == (1, 0)
    torch.testing.assert_close(group.Z.corrected_LRR()[0], sums["a"].zz_RR.double() / 30)
    torch.testing.assert_close(group.H.corrected_LRR()[0], sums["a"].hh_RR.double() / 30)


def test_a_layer_without_a_counted_position_was_not_observed():
    group = RankGroup([layer_of("a"), layer_of("b")])
    sums = sums_of("a", "b") | {"b": LayerSums.empty(RANK, torch.device("cpu"))}
    assert group.observe(sums, SETTINGS) == (1, 0)
    assert group.observed_L == [True, False]
    assert torch.equal(group.basis_Z_LRR[1], torch.eye(RANK))
    assert set(group.curvature()) == {"a"}


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_one_layer_that_is_not_finite_is_refused_and_the_others_are_taken(bad):
    group = RankGroup([layer_of("a"), layer_of("b")])
    sums = sums_of("a", "b")
    sums["a"].zz_RR[1, 2] = bad
    assert group.observe(sums, SETTINGS) == (1, 1)
    assert group.observed_L == [False, True]
    assert all(tensor.isfinite().all() for tensor in group.state().values())


@pytest.mark.parametrize("scale", [1e-8, 1e8])
def test_bases_are_those_of_the_same_factors_at_another_scale(scale):
    groups = [RankGroup([layer_of("a")]) for _ in range(2)]
    groups[0].observe(sums_of("a"), SETTINGS)
    groups[1].observe(sums_of("a", scale=scale), SETTINGS)
    overlap = (groups[0].basis_H_LRR.mT @ groups[1].basis_H_LRR).abs()
    torch.testing.assert_close(overlap[0], torch.eye(RANK), rtol=0, atol=1e-3)


def test_fewer_positions_than_ranks_give_an_orthogonal_basis_and_a_finite_spectrum():
    group = RankGroup([layer_of("a")])
    group.observe(sums_of("a", positions=2), SETTINGS)
    product = group.basis_Z_LRR[0].mT @ group.basis_Z_LRR[0]
    torch.testing.assert_close(product, torch.eye(RANK), rtol=0, atol=1e-5)
    told = group.curvature()["a"]
    assert all(math.isfinite(energy) for energy in told.spectrum)
    assert 1 <= told.effective_rank < 2.5


def test_every_layer_turns_as_its_approximation_says():
    kinds = ("diagonal", "block_diagonal", "kfac")
    group = RankGroup([layer_of(kind, approximation=kind) for kind in kinds])
    group.observe(sums_of(*kinds), SETTINGS)
    assert torch.equal(group.basis_Z_LRR[0], torch.eye(RANK))
    for index in (1, 2):
        assert not torch.equal(group.basis_Z_LRR[index], torch.eye(RANK))


def test_layers_are_grouped_by_rank():
    groups = group_by_rank([layer_of("a"), layer_of("b", rank=8), layer_of("c")])
    assert [[layer.name for layer in group.layers] for group in groups] == [["a", "c"], ["b"]]


def test_what_the_factors_tell_is_sorted_and_sums_up():
    group = RankGroup([layer_of("a"), layer_of("b")])
    assert group.curvature() == {}
    group.observe(sums_of("a", "b"), SETTINGS)
    for layer in group.curvature().values():
        assert list(layer.spectrum) == sorted(layer.spectrum, reverse=True)
        assert 1 <= layer.effective_rank <= RANK
        assert layer.fisher_energy == pytest.approx(sum(layer.spectrum))


def test_a_modality_has_the_mean_effective_rank_and_the_summed_energy_of_its_layers():
    told = {
        name: LayerCurvature(
            spectrum=(energy,),
            effective_rank=rank,
            fisher_energy=energy,
            active=1,
            predicted_kl=0.0,
        )
        for name, energy, rank in (("a", 1.0, 2.0), ("b", 3.0, 4.0), ("v", 5.0, 1.0))
    }
    assert summarise_by_modality(told, {"a": "text", "b": "text", "v": "vision"}) == {
        "text": {"effective_rank": 3.0, "fisher_energy": 4.0},
        "vision": {"effective_rank": 1.0, "fisher_energy": 5.0},
    }
