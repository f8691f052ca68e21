"""The step rule: equal to AdamW where it must be, curvature-aware where it says so."""

import copy

import pytest
import torch
from torch import nn

from grit_core.curvature.capture import LayerSums
from grit_core.optimizer import AdaptedLayer, FisherSettings, GRITOptimizer, summarise_by_modality

RANK = 4
SHAPES = {"a": (12, 9), "b": (12, 9), "c": (7, 5)}


class Pair(nn.Module):
    def __init__(self, inputs, outputs):
        super().__init__()
        self.lora_A = nn.Parameter(torch.randn(RANK, inputs))
        self.lora_B = nn.Parameter(torch.randn(outputs, RANK))


def pairs(seed=0):
    torch.manual_seed(seed)
    return {name: Pair(*shape) for name, shape in SHAPES.items()}


def optimizer_of(models, *, approximation="kfac", fisher=None, **options):
    layers = [
        AdaptedLayer(
            name=name,
            modality="text",
            lora_A=pair.lora_A,
            lora_B=pair.lora_B,
            fisher_approximation=approximation,
        )
        for name, pair in models.items()
    ]
    return GRITOptimizer(layers, fisher=fisher, **options)


def fill_gradients(models, step):
    generator = torch.Generator().manual_seed(100 + step)
    for pair in models.values():
        for parameter in pair.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)


def sums_of(step, *, scale=1.0):
    generator = torch.Generator().manual_seed(1000 + step)
    found = {}
    for name in SHAPES:
        z = torch.randn(30, RANK, generator=generator) * torch.tensor([3.0, 1, 0.3, 0.1])
        h = torch.randn(30, RANK, generator=generator) @ torch.randn(
            RANK, RANK, generator=generator
        )
        found[name] = LayerSums(z.mT @ z * scale, h.mT @ h * scale, torch.tensor(30.0), 1)
    return found


def parameters_of(models):
    return [p for pair in models.values() for p in pair.parameters()]


def test_without_natural_gradient_every_byte_is_that_of_adamw():
    ours, theirs = pairs(), pairs()
    optimizer = GRITOptimizer([], plain=parameters_of(ours), lr=1e-2, weight_decay=0.1)
    reference = torch.optim.AdamW(parameters_of(theirs), lr=1e-2, weight_decay=0.1)
    for step in range(20):
        for models, stepping in ((ours, optimizer), (theirs, reference)):
            fill_gradients(models, step)
            stepping.step()
    for mine, other in zip(parameters_of(ours), parameters_of(theirs), strict=True):
        assert torch.equal(mine, other)


@pytest.mark.parametrize("approximation", ["kfac", "diagonal"])
def test_before_the_first_observation_a_step_is_that_of_adamw(approximation):
    ours, theirs = pairs(), pairs()
    optimizer = optimizer_of(ours, approximation=approximation, lr=1e-2, weight_decay=0.1)
    reference = torch.optim.AdamW(parameters_of(theirs), lr=1e-2, weight_decay=0.1)
    for step in range(10):
        for models, stepping in ((ours, optimizer), (theirs, reference)):
            fill_gradients(models, step)
            stepping.step()
    for mine, other in zip(parameters_of(ours), parameters_of(theirs), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-6, atol=1e-6)


def test_a_step_is_adam_in_the_eigenbasis_of_the_factors():
    """The whole rule, written out for one layer in float64."""
    models = {"c": pairs()["c"]}
    damping, lr, beta1, beta2 = 1e-3, 1e-2, 0.9, 0.999
    optimizer = optimizer_of(models, lr=lr, fisher=FisherSettings(damping=damping, ema_decay=0.0))
    sums = sums_of(0)["c"]
    before = {n: p.detach().double().clone() for n, p in models["c"].named_parameters()}
    optimizer.observe({"c": sums})
    fill_gradients(models, 0)
    gradients = {n: p.grad.double().clone() for n, p in models["c"].named_parameters()}
    optimizer.step()
    for side, factor in (("lora_A", sums.hh_RR), ("lora_B", sums.zz_RR)):
        basis = torch.linalg.eigh(factor.double()).eigenvectors
        gradient = gradients[side] if side == "lora_A" else gradients[side].mT
        turned = basis.mT @ gradient
        second = turned.square() * (1 - beta2) / (1 - beta2)
        first = basis.mT @ (gradient * (1 - beta1)) / (1 - beta1)
        update = basis @ (first / ((second + damping * second.mean()).sqrt() + 1e-8))
        expected = before[side] - lr * (update if side == "lora_A" else update.mT)
        found = getattr(models["c"], side).detach().double()
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_turning_rank_space_turns_the_step_with_it():
    """(A, B) -> (R A, B R') for orthogonal R moves the factors too; the product BA must not notice."""
    turn = torch.linalg.qr(torch.randn(RANK, RANK, generator=torch.Generator().manual_seed(5)))[0]
    products = []
    for R in (torch.eye(RANK), turn):
        models = {"c": pairs()["c"]}
        pair = models["c"]
        with torch.no_grad():
            pair.lora_A.copy_(R @ pair.lora_A)
            pair.lora_B.copy_(pair.lora_B @ R.mT)
        optimizer = optimizer_of(models, lr=1e-2, fisher=FisherSettings(ema_decay=0.5))
        for step in range(6):
            s = sums_of(step)["c"]
            optimizer.observe({
                "c": LayerSums(R @ s.zz_RR @ R.mT, R @ s.hh_RR @ R.mT, s.num_positions, 1)
            })
            fill_gradients(models, step)
            pair.lora_A.grad = R @ pair.lora_A.grad
            pair.lora_B.grad = pair.lora_B.grad @ R.mT
            optimizer.step()
        products.append((pair.lora_B @ pair.lora_A).detach())
    torch.testing.assert_close(products[1], products[0], rtol=1e-3, atol=1e-4)


def test_adamw_does_notice_how_rank_space_is_turned():
    """The negative control of the test above."""
    turn = torch.linalg.qr(torch.randn(RANK, RANK, generator=torch.Generator().manual_seed(5)))[0]
    products = []
    for R in (torch.eye(RANK), turn):
        pair = pairs()["c"]
        with torch.no_grad():
            pair.lora_A.copy_(R @ pair.lora_A)
            pair.lora_B.copy_(pair.lora_B @ R.mT)
        optimizer = torch.optim.AdamW(pair.parameters(), lr=1e-2, weight_decay=0.0)
        for step in range(6):
            fill_gradients({"c": pair}, step)
            pair.lora_A.grad = R @ pair.lora_A.grad
            pair.lora_B.grad = pair.lora_B.grad @ R.mT
            optimizer.step()
        products.append((pair.lora_B @ pair.lora_A).detach())
    assert (products[1] - products[0]).abs().max() > 1e-2


def test_a_diagonal_approximation_is_adam_in_the_original_coordinates():
    ours, theirs = pairs(), pairs()
    fisher = FisherSettings(damping=1e-30)
    optimizer = optimizer_of(ours, approximation="diagonal", fisher=fisher, lr=1e-2)
    reference = torch.optim.AdamW(parameters_of(theirs), lr=1e-2, weight_decay=0.0)
    for step in range(10):
        optimizer.observe(sums_of(step))
        for models, stepping in ((ours, optimizer), (theirs, reference)):
            fill_gradients(models, step)
            stepping.step()
    for mine, other in zip(parameters_of(ours), parameters_of(theirs), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6)


def test_observations_are_due_at_their_frequency_once_one_has_succeeded():
    models = pairs()
    optimizer = optimizer_of(models, fisher=FisherSettings(update_freq=3))
    due = []
    for step in range(8):
        due.append(optimizer.observation_due())
        if step >= 1 and due[-1]:  # at step 0 B is zero: nothing to observe
            optimizer.observe(sums_of(step))
        fill_gradients(models, step)
        optimizer.step()
    assert due == [True, True, False, True, False, False, True, False]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_an_observation_that_is_not_finite_is_refused_and_counted(bad):
    models = pairs()
    optimizer = optimizer_of(models)
    optimizer.observe(sums_of(0))
    before = optimizer.curvature()
    poisoned = sums_of(1)
    poisoned["b"].hh_RR[0, 0] = bad
    assert optimizer.observe(poisoned) == 1
    assert optimizer.skipped_observations == 1
    after = optimizer.curvature()
    assert after["b"] == before["b"]
    assert after["a"] != before["a"]


@pytest.mark.parametrize("scale", [1e-16, 1e12])
def test_the_step_does_not_depend_on_the_scale_of_the_factors(scale):
    results = []
    for factor_scale in (1.0, scale):
        models = pairs()
        optimizer = optimizer_of(models, lr=1e-2)
        optimizer.observe(sums_of(0, scale=factor_scale))
        fill_gradients(models, 0)
        optimizer.step()
        results.append([p.detach().clone() for p in parameters_of(models)])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_layers_without_a_gradient_are_left_alone():
    models = pairs()
    optimizer = optimizer_of(models, lr=1e-2)
    optimizer.observe(sums_of(0))
    fill_gradients(models, 0)
    for parameter in models["b"].parameters():
        parameter.grad = None
    before = [p.detach().clone() for p in models["b"].parameters()]
    optimizer.step()
    assert all(torch.equal(x, y) for x, y in zip(before, models["b"].parameters(), strict=True))


def test_continuing_from_a_saved_state_is_bit_identical():
    def run(models, optimizer, steps):
        for step in steps:
            if step % 3 == 0:
                optimizer.observe(sums_of(step))
            fill_gradients(models, step)
            optimizer.step()

    whole = pairs()
    run(whole, optimizer_of(whole, lr=1e-2), range(10))
    part = pairs()
    first = optimizer_of(part, lr=1e-2)
    run(part, first, range(5))
    state = copy.deepcopy(first.state_dict())
    resumed = copy.deepcopy(part)
    second = optimizer_of(resumed, lr=9.0)
    second.load_state_dict(state)
    run(resumed, second, range(5, 10))
    for one, other in zip(parameters_of(whole), parameters_of(resumed), strict=True):
        assert torch.equal(one, other)


def test_a_state_of_other_layers_is_refused():
    with pytest.raises(ValueError, match="other layers"):
        optimizer_of(pairs()).load_state_dict(optimizer_of({"c": pairs()["c"]}).state_dict())


def test_curvature_is_told_by_layer_and_by_modality():
    optimizer = optimizer_of(pairs())
    assert optimizer.curvature() == {}
    optimizer.observe(sums_of(0))
    curvature = optimizer.curvature()
    assert set(curvature) == set(SHAPES)
    for layer in curvature.values():
        assert list(layer.spectrum) == sorted(layer.spectrum, reverse=True)
        assert 1 <= layer.effective_rank <= RANK
    text = summarise_by_modality(curvature, dict.fromkeys(SHAPES, "text"))["text"]
    assert text["fisher_energy"] == pytest.approx(sum(c.fisher_energy for c in curvature.values()))
