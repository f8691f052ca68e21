"""The step rules, each against its equations."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.optimizers import create_riemannian_optimizer
from torch import nn

from grit_core.curvature.capture import LayerSums
from grit_core.curvature.side_stack import PAPER_DAMPING
from grit_core.optimizer import STEP_RULES, AdaptedLayer, FisherSettings, GRITOptimizer
from tests.grit_core.rank_space import (
    INPUTS,
    OUTPUTS,
    RANK,
    Regression,
    normal,
    optimizer_of,
    sums_of,
    train,
)

SIDES = ("lora_A", "lora_B")


def first_step(step_rule, *, damping=1e-4, sums=None, **options):
    """Take one observed step; return the factors, the gradients and the stacks by side."""
    problem = Regression()
    optimizer = optimizer_of(
        problem, step_rule=step_rule, damping=damping, projection=False, **options
    )
    sums = sums or problem.sums()
    optimizer.observe(sums)
    torch.autograd.backward(problem.loss())
    before = {"lora_A": problem.A.detach().clone(), "lora_B": problem.B.detach().clone()}
    gradients = {"lora_A": problem.A.grad.clone(), "lora_B": problem.B.grad.clone()}
    optimizer.step()
    seen = sums["l"]
    Z, H = seen.zz_RR / seen.num_positions, seen.hh_RR / seen.num_positions
    return problem, optimizer, before, gradients, Z.double(), H.double()


def seen_by_adam(optimizer, side):
    """What Adam took for the gradient in the first step."""
    (stack,) = (stack for stack in optimizer.stacks if stack.side == side)
    return stack.m_LMN[0] / (1 - 0.9)


def ridge(factor, damping):
    return factor + damping * factor.trace() / RANK * torch.eye(RANK, dtype=torch.float64)


@pytest.mark.parametrize("damping", [1e-1, 1e-4])
def test_the_kfac_direction_solves_the_damped_kronecker_system(damping):
    """(I x Z_d) vec P_B = vec dB and (H_d x I) vec P_A = vec dA, written out in full; grafted."""
    _, optimizer, _, gradients, Z, H = first_step("kfac", damping=damping)
    for side, factor in (("lora_B", Z), ("lora_A", H)):
        gradient = gradients[side] if side == "lora_A" else gradients[side].mT
        identity = torch.eye(gradient.shape[1], dtype=torch.float64)
        # vec stacks rows here, so that the factor of the rank axis comes first.
        system = torch.kron(ridge(factor, damping), identity)
        solved = torch.linalg.solve(system, gradient.reshape(-1)).reshape(gradient.shape)
        expected = solved * gradient.norm() / solved.norm()
        found = seen_by_adam(optimizer, side)
        found = found if side == "lora_A" else found.mT
        torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-12)
        assert (found - gradient).norm() > 0.1 * gradient.norm()


def test_a_kfac_step_is_adams_on_the_grafted_direction():
    problem, optimizer, before, gradients, *_ = first_step("kfac", lr=0.02, weight_decay=0.1)
    after = {"lora_A": problem.A.detach(), "lora_B": problem.B.detach()}
    for side in SIDES:
        parameter = nn.Parameter(before[side].clone())
        parameter.grad = seen_by_adam(optimizer, side)
        torch.optim.AdamW([parameter], lr=0.02, weight_decay=0.1).step()
        torch.testing.assert_close(after[side], parameter.detach(), rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(parameter.grad.norm(), gradients[side].norm())


def test_with_isotropic_inputs_and_gradients_kfac_is_pefts_riemannian_direction():
    """X = I and G = I make Z = A A' and H = B' B; traces of 1 make both dampings PEFT's `reg`."""
    reg = 1e-3
    with torch.random.fork_rng():
        torch.manual_seed(0)
        base = nn.Sequential(nn.Linear(INPUTS, OUTPUTS, bias=False)).double()
        options = {"r": RANK, "lora_alpha": RANK, "target_modules": ["0"]}
        model = get_peft_model(base, LoraConfig(**options)).double()
    layer = model.get_base_model()[0]
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    with torch.no_grad():
        A.copy_(normal(RANK, INPUTS, seed=5) * torch.logspace(0, -1, RANK)[:, None])
        B.copy_(normal(OUTPUTS, RANK, seed=6) @ normal(RANK, RANK, seed=7))
        for parameter in (A, B):
            parameter.div_(parameter.norm())
    start = {"lora_A": A.detach().clone(), "lora_B": B.detach().clone()}
    ours = [nn.Parameter(value.clone()) for value in start.values()]
    gradients = [normal(*parameter.shape, seed=30 + i) for i, parameter in enumerate((A, B))]
    for parameters in ((A, B), ours):
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient.clone()

    create_riemannian_optimizer(model, torch.optim.SGD, lr=1.0, reg=reg).step()
    adapter = AdaptedLayer(name="l", modality="text", lora_A=ours[0], lora_B=ours[1])
    fisher = FisherSettings(damping=reg * RANK)
    optimizer = GRITOptimizer([adapter], step_rule="kfac", fisher=fisher)
    one = torch.ones(())
    zz, hh = start["lora_A"] @ start["lora_A"].mT, start["lora_B"].mT @ start["lora_B"]
    optimizer.observe({"l": LayerSums(zz, hh, one, one, 1)})
    optimizer.step()
    for side, parameter, gradient in zip(SIDES, layer_parameters(layer), gradients, strict=True):
        riemannian = start[side] - parameter.detach()
        found = seen_by_adam(optimizer, side)
        torch.testing.assert_close(
            found / found.norm(), riemannian / riemannian.norm(), rtol=1e-8, atol=1e-10
        )
        assert (found / found.norm() - gradient / gradient.norm()).norm() > 0.3


def layer_parameters(layer):
    return layer.lora_A["default"].weight, layer.lora_B["default"].weight


def test_the_released_rule_takes_the_other_sides_factor_and_an_absolute_damping():
    _, optimizer, _, gradients, Z, H = first_step("paper")
    axes = PAPER_DAMPING * torch.eye(RANK, dtype=torch.float64)
    expected = {
        "lora_A": torch.linalg.solve(Z + axes, gradients["lora_A"]),
        "lora_B": torch.linalg.solve(H + axes, gradients["lora_B"].mT).mT,
    }
    for side in SIDES:
        torch.testing.assert_close(
            seen_by_adam(optimizer, side), expected[side], rtol=1e-8, atol=1e-12
        )


def test_the_gauge_rule_is_adamw_between_its_reprojections():
    problem, reference = Regression(), Regression()
    ours = optimizer_of(problem, step_rule="gauge", weight_decay=0.1)
    theirs = torch.optim.AdamW([reference.A, reference.B], lr=1e-2, weight_decay=0.1)
    ours.observe(problem.sums())
    ours.step()  # without gradients: the first reprojection alone
    with torch.no_grad():
        reference.A.copy_(problem.A)
        reference.B.copy_(problem.B)
    found, expected = (
        train(problem, ours, range(18)),
        train(reference, theirs, range(18)),
    )
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


def trajectory(step_rule, approximation, *, block_size=4):
    problem = Regression()
    optimizer = optimizer_of(
        problem,
        step_rule=step_rule,
        fisher_approximation=approximation,
        fisher_block_size=block_size,
        projection=True,
    )
    return train(problem, optimizer, range(50))[-1]


@pytest.mark.parametrize("step_rule", ["ekfac", "kfac", "gauge"])
def test_blocks_of_one_are_the_diagonal_blocks_of_the_rank_are_kfac_others_are_neither(step_rule):
    diagonal, kfac = (trajectory(step_rule, kind) for kind in ("diagonal", "kfac"))
    assert torch.equal(trajectory(step_rule, "block_diagonal", block_size=1), diagonal)
    assert torch.equal(trajectory(step_rule, "block_diagonal", block_size=RANK), kfac)
    between = trajectory(step_rule, "block_diagonal", block_size=2)
    for other in (diagonal, kfac):
        assert (between - other).norm() > 1e-3 * kfac.norm()


@pytest.mark.parametrize("step_rule", ["ekfac", "kfac"])
def test_each_approximation_reads_its_own_part_of_the_factors(step_rule):
    """Changing what lies outside the blocks changes no step; changing what lies inside does."""
    problem = Regression()
    whole = problem.sums()["l"]
    block = torch.arange(RANK) // 2
    outside = block[:, None] != block[None, :]
    steps = {}
    for name, factor in (("as it is", 1.0), ("outside", 0.5), ("inside", 1.0)):
        zz, hh = whole.zz_RR.clone(), whole.hh_RR.clone()
        for sums in (zz, hh):
            sums[outside] *= factor
            if name == "inside":
                sums[0, 1] *= 0.5
                sums[1, 0] *= 0.5
        changed = LayerSums(zz, hh, whole.num_positions, whole.num_label_tokens, 1)
        moved, *_ = first_step(
            step_rule,
            sums={"l": changed},
            fisher_approximation="block_diagonal",
            fisher_block_size=2,
        )
        steps[name] = moved.product()
    torch.testing.assert_close(steps["outside"], steps["as it is"], rtol=1e-10, atol=1e-12)
    assert (steps["inside"] - steps["as it is"]).norm() > 1e-6


@pytest.mark.parametrize("damping", [1e-300, 1e-9, 1e-4])
def test_a_preconditioner_of_few_positions_points_downhill(damping):
    """Of a float32 factor whose zero eigenvalues have been rounded below zero."""
    z, h = normal(2, RANK, seed=40).float() * 100, normal(2, RANK, seed=41).float()
    problem = Regression(dtype=torch.float32)
    optimizer = optimizer_of(problem, step_rule="kfac", damping=damping, projection=False)
    optimizer.observe({"l": sums_of(z, h)})
    torch.autograd.backward(problem.loss())
    gradients = {"lora_A": problem.A.grad.clone(), "lora_B": problem.B.grad.clone()}
    optimizer.step()
    for side in SIDES:
        direction = seen_by_adam(optimizer, side)
        assert direction.isfinite().all()
        assert (direction * gradients[side]).sum() > 0


@pytest.mark.parametrize("step_rule", STEP_RULES)
def test_the_first_moment_is_carried_into_the_gauge_exactly(step_rule):
    """As if every gradient, or kfac direction, had been taken in the new coordinates."""
    problem = Regression()
    optimizer = optimizer_of(problem, step_rule=step_rule, lr=0.0, projection=True)
    optimizer.observe(problem.sums())
    optimizer.step()  # the first reprojection
    (group,) = optimizer.rank_groups
    train(problem, optimizer, range(1, 19))
    gauge = group.gauge({0: (problem.A.detach(), problem.B.detach())}, damping=1e-4)
    T, inverse = gauge.T_LRR[0], gauge.inverse_LRR[0]
    assert (T - torch.eye(RANK)).norm() > 1e-3
    before = {stack.side: stack.m_LMN[0].clone() for stack in optimizer.stacks}
    gradient = {}
    torch.autograd.backward(problem.loss())
    for side, parameter in (("lora_A", problem.A), ("lora_B", problem.B)):
        (stack,) = (stack for stack in optimizer.stacks if stack.side == side)
        gradient[side] = stack._preconditioned(parameter.grad[None], slice(None))[0]
    optimizer.step()
    assert optimizer.reprojection is not None
    covectors = {"lora_A": lambda m: T.mT @ m, "lora_B": lambda m: m @ inverse.mT}
    vectors = {"lora_A": lambda m: inverse @ m, "lora_B": lambda m: m @ T}
    carried = vectors if step_rule == "kfac" else covectors
    for stack in optimizer.stacks:
        carry = carried[stack.side]
        expected = 0.9 * carry(before[stack.side]) + 0.1 * carry(gradient[stack.side])
        torch.testing.assert_close(stack.m_LMN[0], expected, rtol=1e-9, atol=1e-12)


def test_second_moments_of_a_diagonal_approximation_are_carried_into_the_gauge_exactly():
    """Its gauge only scales and permutes, so that squares move with their gradients."""
    problem = Regression()
    optimizer = optimizer_of(
        problem, step_rule="gauge", lr=0.0, projection=True, fisher_approximation="diagonal"
    )
    gradients = {side: [] for side in SIDES}
    for step in range(4):
        rows = torch.randint(0, 400, (32,), generator=torch.Generator().manual_seed(step))
        torch.autograd.backward(problem.loss(rows))
        gradients["lora_A"].append(problem.A.grad.clone())
        gradients["lora_B"].append(problem.B.grad.clone())
        if step == 3:
            optimizer.observe(problem.sums(rows))
            gauge = optimizer.rank_groups[0].gauge(
                {0: (problem.A.detach(), problem.B.detach())}, damping=1e-4
            )
        optimizer.step()
        optimizer.zero_grad()
    T, inverse = gauge.T_LRR[0], gauge.inverse_LRR[0]
    assert int((T.abs() > 1e-9).sum()) == RANK
    for stack in optimizer.stacks:
        expected = torch.zeros_like(stack.v_LMN[0])
        for gradient in gradients[stack.side]:
            moved = T.mT @ gradient if stack.side == "lora_A" else gradient @ inverse.mT
            expected = 0.999 * expected + 0.001 * moved.square()
        torch.testing.assert_close(stack.v_LMN[0], expected, rtol=1e-9, atol=1e-18)
