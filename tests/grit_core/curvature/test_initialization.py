"""The start of A from the first gradient, against the gradient written out."""

from pathlib import Path

import pytest
import torch
from torch import nn

from grit_core.curvature.initialization import GradientInitialization
from grit_core.curvature.rank_group import ROW_NORM, AdaptedLayer
from grit_core.events import Warned
from grit_core.models.vlm_adapter import lora_layers
from grit_core.training import _step
from grit_core.training_run import TrainingRun
from tests.grit_core.rank_space import normal
from tests.grit_core.training_jobs import tiny_job

INPUTS, OUTPUTS, RANK, SCALE = 30, 20, 5, 2.0


def layer_of(name="l", *, rank=RANK, inputs=INPUTS, outputs=OUTPUTS, natural_gradient=True):
    return AdaptedLayer(
        name=name,
        modality="text",
        lora_A=nn.Parameter(normal(rank, inputs, seed=1)),
        lora_B=nn.Parameter(torch.zeros(outputs, rank, dtype=torch.float64)),
        natural_gradient=natural_gradient,
    )


def leave_gradients(layer, dW):
    """Of a loss whose gradient in the layer's weight is dW: W + s B A."""
    layer.lora_A.grad = SCALE * layer.lora_B.detach().mT @ dW
    layer.lora_B.grad = SCALE * dW @ layer.lora_A.detach().mT


def started(layer, dW):
    start = GradientInitialization([layer])
    leave_gradients(layer, dW)
    start.sketch_outputs()
    assert not (layer.lora_B @ layer.lora_A).any()
    leave_gradients(layer, dW)
    return start.read_inputs()


def gradient_of(*, rank, decay=0.0):
    values = torch.logspace(0, -decay, rank, dtype=torch.float64)
    return normal(OUTPUTS, rank, seed=2) * values @ normal(rank, INPUTS, seed=3)


def test_of_a_gradient_within_the_rank_the_rows_are_its_right_singular_vectors():
    layer, dW = layer_of(), gradient_of(rank=RANK)
    assert started(layer, dW) == ("l",)
    vectors = torch.linalg.svd(dW).Vh[:RANK]
    overlap = (layer.lora_A.detach() / ROW_NORM) @ vectors.mT
    torch.testing.assert_close(overlap.abs(), torch.eye(RANK).double(), rtol=0, atol=1e-9)
    assert not layer.lora_B.any()


def test_of_a_larger_gradient_the_rows_see_nearly_all_that_so_many_rows_can_see():
    layer, dW = layer_of(), gradient_of(rank=OUTPUTS, decay=3)
    before = layer.lora_A.detach().clone()
    started(layer, dW)

    def seen(rows):
        """Share of the gradient within the row space."""
        basis = torch.linalg.qr(rows.mT)[0]
        return float((dW @ basis).norm() / dW.norm())

    best = seen(torch.linalg.svd(dW).Vh[:RANK])
    assert seen(layer.lora_A.detach()) > 0.97 * best
    assert seen(before) < 0.7 * best


def test_rows_are_orthogonal_and_of_kaimings_length_whatever_the_scale_of_the_gradient():
    for scale in (1e-8, 1.0, 1e8):
        layer = layer_of()
        started(layer, gradient_of(rank=OUTPUTS) * scale)
        rows = layer.lora_A.detach()
        expected = torch.eye(RANK).double() / 3
        torch.testing.assert_close(rows @ rows.mT, expected, rtol=0, atol=1e-9)


def test_layers_without_a_finite_gradient_or_without_room_keep_their_random_a():
    dW = gradient_of(rank=RANK)
    layers = {
        "bad": layer_of("bad"),
        "unused": layer_of("unused"),
        "wide": layer_of("wide", rank=25),
        "plain": layer_of("plain", natural_gradient=False),
        "sound": layer_of("sound"),
    }
    before = {name: layer.lora_A.detach().clone() for name, layer in layers.items()}
    start = GradientInitialization(list(layers.values()))
    for name in ("bad", "wide", "plain", "sound"):
        leave_gradients(layers[name], dW)
    layers["bad"].lora_B.grad[0, 0] = float("nan")
    start.sketch_outputs()
    for name in ("wide", "plain", "sound"):
        leave_gradients(layers[name], dW)
    assert start.read_inputs() == ("sound",)
    for name, layer in layers.items():
        assert torch.equal(layer.lora_A.detach(), before[name]) is (name != "sound")
        assert not layer.lora_B.any()


def test_a_gradient_that_vanishes_in_the_second_pass_gives_the_random_a_back():
    layer = layer_of()
    before = layer.lora_A.detach().clone()
    start = GradientInitialization([layer])
    leave_gradients(layer, gradient_of(rank=RANK))
    start.sketch_outputs()
    layer.lora_A.grad.zero_()
    assert start.read_inputs() == ()
    assert torch.equal(layer.lora_A.detach(), before)
    assert not layer.lora_B.any()


@pytest.fixture(scope="module")
def tmp(tmp_path_factory):
    return tmp_path_factory.mktemp("initialization")


@pytest.mark.parametrize("accumulated", [1, 2])
def test_a_job_starts_from_the_gradient_of_its_first_step(tmp: Path, accumulated):
    """Compared with the gradient of the base weights themselves, dropout off."""
    job = tiny_job(tmp, work="start", batch_size=2, gradient_accumulation_steps=accumulated)
    job.config.global_dropout = 0.0
    run = TrainingRun(job, num_threads=1)
    for layer in lora_layers(run.model).values():
        layer.lora_dropout["default"] = nn.Identity()
    rows = run.rows_of(0)
    events = list(run.initialize(rows))
    assert not [event for event in events if isinstance(event, Warned)]
    wrapped = lora_layers(run.model)
    for layer in wrapped.values():
        layer.base_layer.weight.requires_grad_()
    run.forward_backward(rows)
    for name, layer in wrapped.items():
        dW = layer.base_layer.weight.grad
        A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        assert not B.any()
        rank = A.shape[0]
        torch.testing.assert_close(A @ A.mT, torch.eye(rank) / 3, rtol=0, atol=1e-5)
        seen = (dW @ A.mT).norm() / ROW_NORM
        best = torch.linalg.svdvals(dW)[:rank].norm()
        assert seen > 0.85 * best, name
    run.close()


def test_the_start_is_made_once_and_not_again_after_it(tmp: Path):
    run = TrainingRun(tiny_job(tmp, work="once"), num_threads=1)
    list(_step(run, 0.0))
    adapter = {name: p.detach().clone() for name, p in run.parameters.items()}
    assert list(run.initialize(run.rows_of(0))) == []
    assert all(torch.equal(p, adapter[name]) for name, p in run.parameters.items())
    run.close()
