"""Cutting the weakest directions: what goes, what stays exactly, and what it costs."""

import dataclasses
import itertools
from pathlib import Path

import pytest
import torch
from peft import PeftModel

from grit_core.compaction import (
    Compaction,
    compact,
    droppable,
    enter_gauge,
    predicted_divergences,
)
from grit_core.models.pretrained import load_base_model
from grit_core.models.vlm_adapter import inject_lora, lora_layers
from grit_core.training import train
from grit_core.training_job import TrainingJob
from tests.grit_core.adapted_models import calibration_of, load_trained, rows_of
from tests.grit_core.training_jobs import tiny_job

VISION = "model.vision_model.encoder.layers.1.self_attn.q_proj"


@pytest.fixture(scope="module")
def tmp(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("compaction")


@pytest.fixture(scope="module")
def job(tmp: Path) -> TrainingJob:
    # Plain AdamW: what is shown here must not depend on what trained the adapter.
    options = {"max_steps": 40, "learning_rate": 2e-2, "batch_size": 4, "optimizer": "adamw"}
    job = tiny_job(tmp, num_rows=24, seed=1, **options)
    list(train(job))
    return job


@pytest.fixture
def model(job: TrainingJob) -> PeftModel:
    return load_trained(job)


def products(model: PeftModel) -> dict[str, torch.Tensor]:
    """s B A of every layer, in float64."""
    return {
        name: layer.lora_B.default.weight.detach().double()
        @ layer.lora_A.default.weight.detach().double()
        * layer.scaling["default"]
        for name, layer in lora_layers(model).items()
    }


@torch.no_grad()
def logits_of(job: TrainingJob, model: PeftModel) -> torch.Tensor:
    (batch,) = rows_of(job, range(8), size=8)
    return model.eval()(**batch.inputs).logits


@pytest.mark.parametrize("max_kl", [3e-7, 1e-6, 3e-6])
def test_given_draws_enough_the_prediction_of_a_small_cut_is_within_a_half_of_what_is_measured(
    job: TrainingJob, model: PeftModel, max_kl: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sum of independent layers' energies is a third or less of it.

    With the usual number of draws the noise alone is a fifth on so few rows, with these a tenth.
    """
    monkeypatch.setattr("grit_core.compaction.NUM_DRAWS", 1 << 11)
    monkeypatch.setattr("grit_core.compaction.MAX_DRAWS_PER_BATCH", 1 << 9)
    compaction = compact(calibration_of(job, model), max_kl=max_kl)
    assert compaction.parameters_after < compaction.parameters_before
    assert compaction.predicted_kl == pytest.approx(compaction.measured_kl, rel=0.5)


@pytest.mark.parametrize("max_kl", [1e-5, 1e-3, 1e-1, 1.0])
def test_neither_prediction_nor_measurement_is_above_the_limit(
    job: TrainingJob, model: PeftModel, max_kl: float
) -> None:
    """Also where the second order says little, as for cuts that cost a nat."""
    compaction = compact(calibration_of(job, model), max_kl=max_kl)
    assert 0 < compaction.predicted_kl <= max_kl
    assert 0 < compaction.measured_kl <= max_kl


def test_the_measured_divergence_is_that_of_the_model_that_is_left(
    job: TrainingJob, model: PeftModel
) -> None:
    whole = load_trained(job)
    compaction = compact(calibration_of(job, model), max_kl=1e-2)
    (batch,) = rows_of(job, range(24), size=24)
    labelled = batch.labels[:, 1:] != -100
    with torch.no_grad():
        log_p, log_q = (
            m.eval()(**batch.inputs).logits[:, :-1][labelled].double().log_softmax(-1)
            for m in (whole, model)
        )
    divergence = float((log_p.exp() * (log_p - log_q)).sum(-1).mean())
    assert compaction.measured_kl == pytest.approx(divergence, rel=1e-3)


def test_the_gauge_changes_no_product_and_no_logit(job: TrainingJob, model: PeftModel) -> None:
    before, logits = products(model), logits_of(job, model)
    for layer in lora_layers(model).values():  # as compaction does before
        layer.lora_B.default.weight.data.mul_(layer.scaling["default"])
        layer.scaling["default"] = 1.0
    factors = calibration_of(job, model).observe_factors()
    assert enter_gauge(lora_layers(model), factors) == set(before)
    for name, product in products(model).items():
        assert (product - before[name]).norm() <= 1e-6 * before[name].norm()
    changed = (logits_of(job, model) - logits).abs().max()
    assert 0 < changed <= 1e-6 * logits.abs().max()


def test_a_limit_that_allows_nothing_changes_no_bit_of_the_adapter(
    job: TrainingJob, model: PeftModel
) -> None:
    before, logits = products(model), logits_of(job, model)
    weights = {n: layer.lora_A.default.weight.clone() for n, layer in lora_layers(model).items()}
    compaction = compact(calibration_of(job, model), max_kl=1e-30)
    assert compaction.parameters_after == compaction.parameters_before == 1920
    assert compaction.predicted_kl == compaction.measured_kl == 0
    for name, layer in lora_layers(model).items():
        assert layer.scaling["default"] == 1
        assert torch.equal(layer.lora_A.default.weight, weights[name])
        assert torch.equal(products(model)[name], before[name])
    assert (logits_of(job, model) - logits).abs().max() <= 1e-6 * logits.abs().max()


def test_what_goes_is_zero_and_a_layer_of_which_nothing_goes_is_as_it_was(
    job: TrainingJob, model: PeftModel
) -> None:
    before = products(model)
    compaction = compact(calibration_of(job, model), max_kl=1e-7)
    whole = [name for name, rank in compaction.ranks.items() if rank == lora_rank(model, name)]
    cut = [name for name, rank in compaction.ranks.items() if 0 < rank < lora_rank(model, name)]
    assert whole
    assert cut
    after = products(model)
    for name in whole:
        assert torch.equal(after[name], before[name])
    for name, layer in lora_layers(model).items():
        gone = sorted(set(range(lora_rank(model, name))) - set(compaction.kept[name]))
        assert not layer.lora_A.default.weight[gone].any()
        assert not layer.lora_B.default.weight[:, gone].any()
        assert torch.linalg.matrix_rank(after[name].float()) == compaction.ranks[name]


def test_the_cut_is_the_cheapest_of_all_with_as_many_directions(
    job: TrainingJob, model: PeftModel
) -> None:
    """By each direction's own cost, over all subsets of the ten largest of two layers."""
    calibration = calibration_of(job, model)
    lora = {name: lora_layers(model)[name] for name in list(lora_layers(model))[1:3]}
    enter_gauge(lora, {name: calibration.observe_factors()[name] for name in lora})
    costs_D = calibration.gate_gradients(num_draws=8).square().sum(1).mean(0)[2:10]
    order = droppable(costs_D)
    assert len(order) == len(costs_D) - 1
    for count in range(1, len(order) + 1):
        chosen = float(costs_D[order[:count]].sum())
        best = min(
            float(costs_D[list(subset)].sum())
            for subset in itertools.combinations(range(len(costs_D)), count)
        )
        assert chosen == pytest.approx(best, rel=1e-12)


def test_a_direction_without_a_finite_cost_stays_and_so_does_the_last_of_all() -> None:
    costs_D = torch.tensor([3.0, torch.inf, 1.0, torch.nan, 1.0])
    assert droppable(costs_D) == [2, 4, 0]
    assert droppable(torch.tensor([2.0, 1.0])) == [1]
    assert droppable(torch.tensor([1.0])) == []


def test_the_prediction_is_half_the_fisher_form_of_the_whole_cut() -> None:
    changes_PBD = torch.randn(4, 3, 5, generator=torch.Generator().manual_seed(0)).double()
    changes_PBD[..., 1] = -0.5 * changes_PBD[..., 0]
    predicted_K = predicted_divergences(changes_PBD, num_label_tokens=7)
    fisher_DD = torch.einsum("pbi,pbj->ij", changes_PBD, changes_PBD) / 4
    exact_K = [0.5 * float(fisher_DD[:k, :k].sum()) / 7 for k in range(6)]
    assert predicted_K.tolist() == pytest.approx(exact_K)
    assert exact_K[2] < exact_K[1]  # these two cancel


def test_whatever_the_random_state_a_compaction_repeats_itself_bit_for_bit(
    job: TrainingJob, model: PeftModel
) -> None:
    torch.manual_seed(1)
    first = compact(calibration_of(job, model), max_kl=1e-3)
    other = load_trained(job)
    torch.manual_seed(2)
    second = compact(calibration_of(job, other), max_kl=1e-3)
    assert first == second
    for name, product in products(model).items():
        assert torch.equal(product, products(other)[name])


def test_an_adapter_that_never_moved_costs_nothing_and_keeps_one_direction(
    job: TrainingJob,
) -> None:
    model = inject_lora(load_base_model(job.model), job.plan)
    compaction = compact(calibration_of(job, model), max_kl=1e-9)
    assert sum(compaction.ranks.values()) == 1
    assert compaction.predicted_kl == compaction.measured_kl == 0
    assert not compaction.moved
    assert compaction.refused == ()


def test_a_layer_that_never_moved_goes_whole_and_nothing_else_has_to(
    job: TrainingJob, model: PeftModel
) -> None:
    name = "model.text_model.layers.0.self_attn.k_proj"
    lora_layers(model)[name].lora_B.default.weight.data.zero_()
    compaction = compact(calibration_of(job, model), max_kl=1e-12)
    assert {n for n, rank in compaction.ranks.items() if rank == 0} == {name}
    assert compaction.moved
    assert compaction.measured_kl == 0


def test_a_layer_that_the_rows_do_not_reach_is_kept_whole_and_named(tmp: Path) -> None:
    """Rows without images say nothing of the vision tower."""
    with_images = tiny_job(tmp)
    text_rows = tiny_job(tmp, text_only=True).dataset
    model = inject_lora(load_base_model(with_images.model), with_images.plan)
    generator = torch.Generator().manual_seed(0)
    for layer in lora_layers(model).values():
        layer.lora_B.default.weight.data.normal_(std=0.05, generator=generator)
    before = products(model)[VISION]
    compaction = compact_on(text_rows, with_images, model)
    assert compaction.refused == (VISION,)
    assert compaction.ranks[VISION] == 2
    assert torch.equal(products(model)[VISION], before)
    assert compaction.parameters_after < compaction.parameters_before


@pytest.mark.parametrize("max_kl", [0.0, -1.0, float("nan")])
def test_a_limit_that_is_no_positive_number_is_refused(
    job: TrainingJob, model: PeftModel, max_kl: float
) -> None:
    with pytest.raises(ValueError, match="give a number above 0, such as 1e-3"):
        compact(calibration_of(job, model), max_kl=max_kl)


def lora_rank(model: PeftModel, name: str) -> int:
    return int(lora_layers(model)[name].r["default"])


def compact_on(rows: Path, job: TrainingJob, model: PeftModel) -> Compaction:
    return compact(calibration_of(dataclasses.replace(job, dataset=rows), model), max_kl=1e-1)
