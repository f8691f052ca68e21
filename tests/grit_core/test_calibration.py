"""What the passes over calibration rows measure, each against its definition."""

import pytest
import torch
from peft import PeftModel

from grit_core.calibration import SEED, Calibration
from grit_core.data.collate import Batch
from grit_core.data.encoder import IGNORED
from grit_core.errors import Interrupted
from grit_core.models.vlm_adapter import lora_layers
from grit_core.softmax_fisher import RandomSigns, SoftmaxFisher
from grit_core.training import train
from grit_core.training_job import TrainingJob
from tests.grit_core.adapted_models import calibration_of, load_trained, rows_of
from tests.grit_core.training_jobs import tiny_job

LABELLED_ROWS = 12


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> TrainingJob:
    job = tiny_job(
        tmp_path_factory.mktemp("calibration"),
        num_rows=LABELLED_ROWS,
        max_steps=8,
        learning_rate=2e-2,
    )
    list(train(job))
    return job


@pytest.fixture
def model(job: TrainingJob) -> PeftModel:
    return load_trained(job)


@pytest.mark.parametrize("size", [1, 3, 12])
def test_the_factors_do_not_depend_on_how_rows_are_batched(
    job: TrainingJob, model: PeftModel, size: int
) -> None:
    whole = calibration_of(job, model).observe_factors()
    split = calibration_of(job, model, size=size).observe_factors()
    assert whole
    for name, sums in whole.items():
        assert split[name].num_positions == sums.num_positions > 0
        assert split[name].num_label_tokens == sums.num_label_tokens
        for found, expected in (
            (split[name].zz_RR, sums.zz_RR),
            (split[name].hh_RR, sums.hh_RR),
        ):
            torch.testing.assert_close(
                found, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max())
            )


def test_observing_changes_neither_weights_nor_gradients_nor_random_state(
    job: TrainingJob, model: PeftModel
) -> None:
    model.train()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    state = torch.get_rng_state()
    calibration = calibration_of(job, model)
    calibration.observe_factors()
    calibration.gate_gradients(num_draws=2)
    calibration.divergence({})
    calibration.loss()
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name])
        assert parameter.grad is None
    hooked = [n for n, layer in lora_layers(model).items() if layer.lora_A.default._forward_hooks]
    assert hooked == []


def test_a_gates_gradient_is_what_its_row_times_that_rows_gradient(
    job: TrainingJob, model: PeftModel
) -> None:
    """d/dm of l(m a_j) at m = 1 is a_j . dl/da_j, for the same drawn l."""
    calibration = calibration_of(job, model, size=LABELLED_ROWS)
    found_D = calibration.gate_gradients(num_draws=1)[0, 0]
    (batch,) = rows_of(job, range(LABELLED_ROWS), size=LABELLED_ROWS)
    logits_NV = label_logits(model, batch)
    layers = lora_layers(model).values()
    weights = [layer.lora_A.default.weight for layer in layers]
    drawn_NV = SoftmaxFisher(logits_NV).draw(RandomSigns(SEED))
    gradients = torch.autograd.grad(logits_NV, weights, drawn_NV)
    expected_D = torch.cat([
        (weight * gradient).sum(1) for weight, gradient in zip(weights, gradients, strict=True)
    ])
    torch.testing.assert_close(found_D, expected_D.double(), rtol=1e-3, atol=1e-6)


def test_of_many_batches_the_draws_are_added_up(
    job: TrainingJob, model: PeftModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole_PBD = calibration_of(job, model, size=2).gate_gradients(num_draws=2)
    monkeypatch.setattr("grit_core.calibration.MAX_SUMS", 4)
    added_PBD = calibration_of(job, model, size=2).gate_gradients(num_draws=2)
    expected_PBD = whole_PBD[:, :4].clone()
    expected_PBD[:, :2] += whole_PBD[:, 4:]
    torch.testing.assert_close(added_PBD, expected_PBD)


def test_the_divergence_is_that_of_a_model_whose_rows_are_zeroed(
    job: TrainingJob, model: PeftModel
) -> None:
    layers = lora_layers(model)
    dropped = {name: torch.arange(layer.r["default"]) == 1 for name, layer in layers.items()}
    found = calibration_of(job, model, size=5).divergence(dropped)
    (batch,) = rows_of(job, range(LABELLED_ROWS), size=LABELLED_ROWS)
    with torch.no_grad():
        log_p_NV = label_logits(model, batch).double().log_softmax(-1)
        for layer in layers.values():
            layer.lora_A.default.weight[1] = 0
        log_q_NV = label_logits(model, batch).double().log_softmax(-1)
    expected = (log_p_NV.exp() * (log_p_NV - log_q_NV)).sum(-1).mean()
    assert found > 1e-6
    assert found == pytest.approx(float(expected), rel=1e-3)


def test_nothing_taken_out_diverges_by_nothing(job: TrainingJob, model: PeftModel) -> None:
    assert calibration_of(job, model).divergence({}) == 0.0


def test_the_loss_is_the_mean_over_all_label_tokens(job: TrainingJob, model: PeftModel) -> None:
    (batch,) = rows_of(job, range(LABELLED_ROWS), size=LABELLED_ROWS)
    with torch.no_grad():
        logits_NV = label_logits(model, batch)
    tokens_N = batch.labels[:, 1:][batch.labels[:, 1:] != IGNORED]
    expected = torch.nn.functional.cross_entropy(logits_NV, tokens_N)
    assert calibration_of(job, model, size=5).loss() == pytest.approx(float(expected), rel=1e-5)


def test_asked_to_stop_it_stops_at_the_next_batch(job: TrainingJob, model: PeftModel) -> None:
    asked = iter([False, True])
    model.train()
    calibration = Calibration(
        model, rows_of(job, range(LABELLED_ROWS)), should_stop=lambda: next(asked)
    )
    with pytest.raises(Interrupted, match="Stopped as asked"):
        calibration.gate_gradients(num_draws=1)
    assert model.training


def label_logits(model: PeftModel, batch: Batch) -> torch.Tensor:
    """All logits, and of these the ones that predict a label."""
    model.eval()
    logits = model(**batch.inputs).logits[:, :-1]
    return logits[batch.labels[:, 1:] != IGNORED].float()
