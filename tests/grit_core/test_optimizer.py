"""The step rule: equal to AdamW where it must be, curvature-aware where it says so."""

import copy
import json

import pytest
import torch
from torch import nn

from grit_core.checkpoints import flatten_state, join_state
from grit_core.curvature.capture import CurvatureCapture, LayerSums
from grit_core.optimizer import AdaptedLayer, FisherSettings, GRITOptimizer

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
        found[name] = LayerSums(
            z.mT @ z * scale, h.mT @ h * scale, torch.tensor(30.0), torch.tensor(10.0), 1
        )
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
        assert torch.equal(mine, other)


def test_a_layer_that_was_not_observed_is_stepped_by_adamw_beside_one_that_was():
    ours, theirs = pairs(), pairs()
    optimizer = optimizer_of(ours, lr=1e-2, weight_decay=0.1)
    reference = torch.optim.AdamW(parameters_of(theirs), lr=1e-2, weight_decay=0.1)
    for step in range(6):
        if step == 2:
            sums = sums_of(step)
            sums["b"] = LayerSums.empty(RANK, torch.device("cpu"))
            optimizer.observe(sums)
        for models, stepping in ((ours, optimizer), (theirs, reference)):
            fill_gradients(models, step)
            stepping.step()
    assert torch.equal(ours["b"].lora_A, theirs["b"].lora_A)
    assert torch.equal(ours["b"].lora_B, theirs["b"].lora_B)
    assert (ours["a"].lora_A - theirs["a"].lora_A).abs().max() > 1e-3


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
    """(A, B) -> (R A, B R') with R orthogonal moves the factors too; BA must not notice."""
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
                "c": LayerSums(
                    R @ s.zz_RR @ R.mT, R @ s.hh_RR @ R.mT, s.num_positions, s.num_label_tokens, 1
                )
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


def through_a_checkpoint(state):
    """As a checkpoint keeps it: tensors, and JSON text."""
    tensors, values = flatten_state(state)
    return join_state(tensors, json.loads(json.dumps(values)))


def test_continuing_from_a_saved_state_is_bit_identical():
    def optimizer_over(models, lr):
        layers = optimizer_of({name: models[name] for name in "ac"}).layers
        return GRITOptimizer(layers, plain=models["b"].parameters(), lr=lr, weight_decay=0.1)

    def run(models, optimizer, steps):
        for step in steps:
            if step % 3 == 0:
                sums = sums_of(step)
                if step < 6:  # one layer is still unobserved when the state is saved
                    sums["c"] = LayerSums.empty(RANK, torch.device("cpu"))
                optimizer.observe(sums)
            fill_gradients(models, step)
            optimizer.step()

    whole = pairs()
    run(whole, optimizer_over(whole, 1e-2), range(10))
    part = pairs()
    first = optimizer_over(part, 1e-2)
    run(part, first, range(5))
    state = through_a_checkpoint(first.state_dict())
    resumed = copy.deepcopy(part)
    second = optimizer_over(resumed, 9.0)
    second.load_state_dict(state)
    run(resumed, second, range(5, 10))
    for one, other in zip(parameters_of(whole), parameters_of(resumed), strict=True):
        assert torch.equal(one, other)


def test_a_state_of_other_layers_is_refused():
    with pytest.raises(ValueError, match="other layers"):
        optimizer_of(pairs()).load_state_dict(optimizer_of({"c": pairs()["c"]}).state_dict())
    swapped = dict(zip(("b", "a", "c"), pairs().values(), strict=True))
    with pytest.raises(ValueError, match="other layers"):
        optimizer_of(pairs()).load_state_dict(optimizer_of(swapped).state_dict())


def test_a_half_precision_adapter_is_refused():
    models = pairs()
    models["b"].to(torch.bfloat16)
    with pytest.raises(ValueError, match=r"adapter of b .* float32"):
        optimizer_of(models)


def test_layers_cannot_be_added_later():
    with pytest.raises(ValueError, match="one parameter group"):
        optimizer_of(pairs()).add_param_group({"params": [nn.Parameter(torch.zeros(2))]})


class LowRank(nn.Module):
    """x -> 3 B A x, whose A is badly conditioned in rank space and turned against its axes."""

    def __init__(self, generator, *, inputs=32, outputs=24, rank=8):
        super().__init__()
        self.lora_A = nn.Linear(inputs, rank, bias=False)
        self.lora_B = nn.Linear(rank, outputs, bias=False)
        left, right = (
            torch.linalg.qr(torch.randn(rank, rank, generator=generator))[0] for _ in range(2)
        )
        mixing = left * torch.logspace(0, -2.5, rank) @ right
        with torch.no_grad():
            start = torch.randn(rank, inputs, generator=generator) / inputs**0.5
            self.lora_A.weight.copy_(mixing @ start)
            self.lora_B.weight.zero_()

    def forward(self, x):
        return 3 * self.lora_B(self.lora_A(x))


def final_loss(seed, lr, *, natural, steps=120, batch=128):
    """The loss of a linear classifier of rank 4, learnt through `LowRank`."""
    generator = torch.Generator().manual_seed(seed)
    model = LowRank(generator)
    teacher = torch.randn(24, 4, generator=generator) @ torch.randn(4, 32, generator=generator)
    data = torch.randn(2048, 32, generator=generator)
    labels = (data @ teacher.mT).argmax(-1)
    pair = AdaptedLayer(
        name="l", modality="text", lora_A=model.lora_A.weight, lora_B=model.lora_B.weight
    )
    if natural:
        optimizer = GRITOptimizer([pair], lr=lr, fisher=FisherSettings(update_freq=5))
    else:
        optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)
    capture = CurvatureCapture({"l": model.lora_A}, {"l": model.lora_B})
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = lr * (1 - step / steps)
        chosen = torch.randint(0, len(data), (batch,), generator=generator)
        with capture.observing(gradient_scale=float(batch), num_label_tokens=batch) as sums:
            nn.functional.cross_entropy(model(data[chosen]), labels[chosen]).backward()
        if natural and optimizer.observation_due():
            optimizer.observe(sums)
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        return nn.functional.cross_entropy(model(data), labels).item()


@pytest.mark.slow
def test_in_a_badly_conditioned_rank_space_each_at_its_best_rate_the_eigenbasis_gets_further():
    rates = (0.04, 0.08, 0.16, 0.32)
    best = {
        natural: [min(final_loss(seed, lr, natural=natural) for lr in rates) for seed in range(4)]
        for natural in (True, False)
    }
    assert all(ours < theirs for ours, theirs in zip(best[True], best[False], strict=True))
