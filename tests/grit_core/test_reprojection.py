"""Reprojection and the budget within the optimizer: what moves, what stays, what is remembered."""

import copy
import json

import pytest
import torch
from torch import nn

from grit_core.checkpoints import flatten_state, join_state
from grit_core.curvature.capture import LayerSums
from grit_core.curvature.rank_group import RankGroup
from grit_core.optimizer import (
    STEP_RULES,
    AdaptedLayer,
    FisherSettings,
    GRITOptimizer,
    ProjectionSettings,
    budgets_by_modality,
)
from tests.grit_core.rank_space import (
    EVERYTHING,
    NUM_ROWS,
    RANK,
    Regression,
    normal,
    optimizer_of,
    train,
)


def constant(budget, *, every=20):
    return ProjectionSettings(schedule="constant", budget_start=budget, update_freq=every)


def moving(start, end, *, every=5, schedule="linear"):
    return ProjectionSettings(
        budget_start=start, budget_end=end, schedule=schedule, update_freq=every
    )


def active_of(optimizer):
    (group,) = optimizer.rank_groups
    return group.active_LR[0]


def first_moment(optimizer, side):
    (stack,) = (stack for stack in optimizer.stacks if stack.side == side)
    return stack.m_LMN[0]


def second_moment(optimizer, side):
    (stack,) = (stack for stack in optimizer.stacks if stack.side == side)
    return stack.v_LMN[0]


@pytest.mark.parametrize("step_rule", STEP_RULES)
def test_a_reprojection_leaves_the_product_and_makes_both_factors_diagonal(step_rule):
    problem = Regression()
    optimizer = optimizer_of(problem, step_rule=step_rule, projection=True)
    optimizer.observe(problem.sums())
    before = problem.product()
    optimizer.step()  # without gradients: the reprojection alone
    assert optimizer.reprojection is not None
    torch.testing.assert_close(problem.product(), before, rtol=1e-12, atol=1e-14)
    sums = problem.sums()["l"]
    Z, H = sums.zz_RR / NUM_ROWS, sums.hh_RR / NUM_ROWS
    (group,) = optimizer.rank_groups
    for factor, kept in ((Z, group.Z), (H, group.H)):
        torch.testing.assert_close(kept.corrected_LRR()[0], factor, rtol=1e-9, atol=1e-12)
        unit = factor / (factor.diagonal()[:, None] * factor.diagonal()[None, :]).sqrt()
        torch.testing.assert_close(unit, torch.eye(RANK).double(), rtol=0, atol=1e-3)
    energies = torch.tensor(optimizer.curvature()["l"].spectrum, dtype=torch.float64)
    torch.testing.assert_close(Z.diagonal() * H.diagonal(), energies, rtol=1e-3, atol=0)


def test_reprojecting_twice_changes_signs_at_most():
    problem = Regression()
    optimizer = optimizer_of(problem, step_rule="gauge", budget=constant(10**6, every=1))
    optimizer.observe(problem.sums())
    optimizer.step()
    before = [problem.A.detach().clone(), problem.B.detach().clone()]
    optimizer.step()
    assert optimizer.reprojection is not None
    for one, other in zip(before, (problem.A, problem.B), strict=True):
        torch.testing.assert_close(other.detach().abs(), one.abs(), rtol=1e-4, atol=1e-6)


def observed_badly(step_rule):
    """Three layers: zero gradients, gradients in one direction only, and a sound one."""
    models = {name: Regression() for name in ("zero", "flat", "sound")}
    optimizer = GRITOptimizer(
        [
            AdaptedLayer(
                name=name, modality="text", lora_A=model.A, lora_B=model.B, projection=True
            )
            for name, model in models.items()
        ],
        step_rule=step_rule,
        projection=EVERYTHING,
        fisher=FisherSettings(damping=1e-12),
    )
    sums = {name: model.sums()["l"] for name, model in models.items()}
    sums["zero"].hh_RR.zero_()
    sums["flat"].hh_RR.zero_()[0, 0] = 1.0
    optimizer.observe(sums)
    return models, optimizer


@pytest.mark.parametrize("step_rule", STEP_RULES)
def test_a_refused_gauge_is_named_and_moves_nothing(step_rule):
    models, optimizer = observed_badly(step_rule)
    before = {name: (m.A.detach().clone(), m.B.detach().clone()) for name, m in models.items()}
    optimizer.step()
    assert optimizer.reprojection is not None
    assert optimizer.reprojection.refused == ("zero", "flat")
    for name in ("zero", "flat"):
        assert torch.equal(models[name].A.detach(), before[name][0])
        assert torch.equal(models[name].B.detach(), before[name][1])
    assert (models["sound"].A.detach() - before["sound"][0]).abs().max() > 1e-3


def test_rows_that_come_out_as_zero_keep_their_columns_of_b():
    """An A of rank three in six rows: three directions of rank space read nothing."""
    problem = Regression()
    with torch.no_grad():
        problem.A[3:] = 2 * problem.A[:3]
    before = problem.product()
    optimizer = optimizer_of(problem, step_rule="gauge")
    optimizer.observe(problem.sums())
    optimizer.step()
    assert optimizer.reprojection is not None
    assert not optimizer.reprojection.refused
    torch.testing.assert_close(problem.product(), before, rtol=1e-9, atol=1e-12)
    lengths = problem.A.detach().norm(dim=1)
    assert int((lengths > 0.5).sum()) == int((lengths < 1e-6).sum()) == 3
    assert problem.B.detach().norm(dim=0).min() > 1e-2


@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
@pytest.mark.parametrize("natural_gradient", [True, False])
@pytest.mark.parametrize("step_rule", STEP_RULES)
def test_frozen_directions_keep_every_byte_and_the_others_move(
    step_rule, natural_gradient, weight_decay
):
    problem = Regression(dtype=torch.float32)
    optimizer = optimizer_of(
        problem,
        step_rule=step_rule,
        natural_gradient=natural_gradient,
        projection=True,
        budget=constant(2, every=40),
        weight_decay=weight_decay,
    )
    train(problem, optimizer, range(5))
    active = active_of(optimizer)
    assert int(active.sum()) == 2
    kept = {
        "A": problem.A.detach().clone(),
        "B": problem.B.detach().clone(),
        "m of A": first_moment(optimizer, "lora_A").clone(),
        "m of B": first_moment(optimizer, "lora_B").clone(),
    }
    train(problem, optimizer, range(5, 35))  # observes at 10, 20 and 30
    assert torch.equal(active_of(optimizer), active)
    now = {
        "A": problem.A.detach(),
        "B": problem.B.detach(),
        "m of A": first_moment(optimizer, "lora_A"),
        "m of B": first_moment(optimizer, "lora_B"),
    }
    for name, value in now.items():
        axis = 0 if name.endswith("A") else 1
        same = (value == kept[name]).all(1 - axis)
        assert torch.equal(same, ~active), name


@pytest.mark.parametrize("step_rule", STEP_RULES)
def test_frozen_second_moments_keep_every_byte_between_observations(step_rule):
    problem = Regression()
    optimizer = optimizer_of(
        problem, step_rule=step_rule, projection=True, budget=constant(2, every=40)
    )
    train(problem, optimizer, range(11))
    kept = {side: second_moment(optimizer, side).clone() for side in ("lora_A", "lora_B")}
    train(problem, optimizer, range(11, 20))
    for side, before in kept.items():
        same = (second_moment(optimizer, side) == before).all(1 if side == "lora_A" else 0)
        assert int(same.sum()) == RANK - 2


@pytest.mark.parametrize("step_rule", ["ekfac", "kfac"])
def test_what_is_frozen_has_no_say_in_how_the_others_move(step_rule):
    """Gradients of frozen directions, however large, change no active entry."""
    results = []
    for scale in (1.0, 1e6):
        problem = Regression()
        optimizer = optimizer_of(
            problem, step_rule=step_rule, projection=True, budget=constant(2, every=100)
        )
        train(problem, optimizer, range(5))
        torch.autograd.backward(problem.loss())
        problem.A.grad[~active_of(optimizer)] *= scale
        problem.B.grad[:, ~active_of(optimizer)] *= scale
        optimizer.step()
        results.append(problem.product())
    assert torch.equal(results[0], results[1])


def test_no_eigenvector_is_half_active_and_half_frozen_where_eigenvalues_coincide():
    layer = AdaptedLayer(
        name="l",
        modality="text",
        lora_A=nn.Parameter(torch.zeros(RANK, 9).double()),
        lora_B=nn.Parameter(torch.zeros(7, RANK).double()),
    )
    group = RankGroup([layer])
    group.active_LR[0] = torch.tensor([True, False, True, False, False, True])
    for seed in range(5):  # of two positions: most eigenvalues are zero
        z = normal(2, RANK, seed=seed)
        factor = z.mT @ z
        one = torch.ones(())
        group.observe({"l": LayerSums(factor, factor, one, one, 1)}, FisherSettings(ema_decay=0.0))
        share = group.basis_Z_LRR[0].square().mT @ group.active_LR[0].double()
        assert ((share < 1e-6) | (share > 1 - 1e-6)).all()


def test_a_frozen_direction_comes_back_when_its_energy_does():
    problem = Regression()
    optimizer = optimizer_of(
        problem, step_rule="gauge", projection=True, budget=constant(3, every=4)
    )
    optimizer.observe(problem.sums())
    optimizer.step()
    assert active_of(optimizer).tolist() == [True] * 3 + [False] * 3
    frozen_row = problem.A[5].detach().clone()
    # Suddenly the sixth direction carries nearly all of the gradient.
    sums = problem.sums()["l"]
    sums.hh_RR[5, 5] *= 1e9
    for _ in range(3):
        optimizer.observe({"l": sums})
        optimizer.step()
    assert optimizer.reprojection is not None
    place = int((problem.A.detach() @ frozen_row).abs().argmax())
    assert bool(active_of(optimizer)[place])
    before = problem.A[place].detach().clone()
    train(problem, optimizer, range(2))
    assert not torch.equal(problem.A[place].detach(), before)


@pytest.mark.parametrize(("start", "end"), [(2, 6), (6, 2)])
@pytest.mark.parametrize("total_steps", [23, 25])
@pytest.mark.parametrize("schedule", ["linear", "cosine", "exponential"])
def test_after_the_last_step_exactly_the_end_of_the_budget_is_active(
    schedule, total_steps, start, end
):
    problem = Regression()
    optimizer = optimizer_of(
        problem,
        projection=True,
        budget=moving(start, end, schedule=schedule),
        total_steps=total_steps,
    )
    active = []
    for step in range(total_steps):
        train(problem, optimizer, [step])
        active.append(int(active_of(optimizer).sum()))
        if optimizer.reprojection is not None:
            assert optimizer.budgets["text"].requested == active[-1]
    assert active[-1] == end
    assert active == sorted(active, reverse=start > end)
    assert min(start, end) <= active[0] <= max(start, end)


def test_the_budget_asked_for_is_that_of_the_steps_done():
    problem = Regression()
    optimizer = optimizer_of(problem, projection=True, budget=moving(1000, 2000), total_steps=40)
    asked = {}
    for step in range(40):
        train(problem, optimizer, [step])
        if optimizer.reprojection is not None:
            asked[step + 1] = optimizer.budgets["text"].requested
    assert asked == {done: 1000 + 25 * done for done in (1, *range(5, 41, 5))}


def test_steps_that_brought_no_update_count_for_the_budget():
    problem = Regression()
    optimizer = optimizer_of(problem, projection=True, budget=moving(6, 2), total_steps=13)
    for step in range(13):
        if step in {0, 4, 12}:
            optimizer.skip_step()
        else:
            train(problem, optimizer, [step])
    assert optimizer.reprojection is not None
    assert int(active_of(optimizer).sum()) == 2


def test_a_budget_is_clamped_to_one_direction_a_layer_and_to_all_directions():
    models = {name: Regression() for name in "abc"}
    for asked, effective in ((1, 3), (7, 7), (10**6, 3 * RANK)):
        optimizer = GRITOptimizer(
            [
                AdaptedLayer(name=name, modality="text", lora_A=m.A, lora_B=m.B, projection=True)
                for name, m in models.items()
            ],
            projection=constant(asked),
        )
        optimizer.observe({name: m.sums()["l"] for name, m in models.items()})
        optimizer.step()
        told = budgets_by_modality(optimizer)["text"]
        assert told["requested_budget"] == asked
        assert told["effective_budget"] == effective
        assert told["num_directions"] == 3 * RANK
        assert sum(int(g.active_LR.sum()) for g in optimizer.rank_groups) == effective
        assert (told["predicted_kl"] == 0) is (effective == 3 * RANK)


def test_modalities_have_budgets_of_their_own_and_layers_without_projection_none():
    models = {name: Regression() for name in ("text", "vision", "free")}
    layers = [
        AdaptedLayer(
            name=name,
            modality=name if name != "free" else "text",
            lora_A=m.A,
            lora_B=m.B,
            projection=name != "free",
        )
        for name, m in models.items()
    ]
    optimizer = GRITOptimizer(layers, projection=constant(2))
    sums = {name: m.sums()["l"] for name, m in models.items()}
    sums["vision"].hh_RR *= 1e6
    optimizer.observe(sums)
    optimizer.step()
    (group,) = optimizer.rank_groups
    active = {
        layer.name: int(a_R.sum()) for layer, a_R in zip(layers, group.active_LR, strict=True)
    }
    assert active == {"text": 2, "vision": 2, "free": RANK}
    assert set(optimizer.budgets) == {"text", "vision"}


def test_what_freezing_costs_is_predicted_from_the_frozen_directions_alone():
    problem = Regression()
    optimizer = optimizer_of(problem, projection=True, budget=constant(4))
    sums = problem.sums()["l"]
    sums.num_label_tokens /= 8
    optimizer.observe({"l": sums})
    optimizer.step()
    told = optimizer.curvature()["l"]
    assert told.active == 4
    expected = 0.5 * 8 * sum(told.spectrum[4:])
    assert told.predicted_kl == pytest.approx(expected, rel=1e-3)
    assert budgets_by_modality(optimizer)["text"]["predicted_kl"] == told.predicted_kl
    resumed = optimizer_of(Regression(), projection=True, budget=constant(4))
    resumed.load_state_dict(through_a_checkpoint(optimizer))
    assert resumed.curvature() == optimizer.curvature()


def test_a_moving_budget_without_the_number_of_steps_is_refused():
    problem = Regression()
    with pytest.raises(ValueError, match="total_steps"):
        optimizer_of(problem, projection=True, budget=moving(1, 5), total_steps=None)
    optimizer_of(problem, projection=False, budget=moving(1, 5), total_steps=None)
    optimizer_of(problem, projection=True, budget=constant(5), total_steps=None)


def through_a_checkpoint(optimizer):
    tensors, values = flatten_state(optimizer.state_dict())
    return join_state(
        {name: t.clone() for name, t in tensors.items()}, json.loads(json.dumps(values))
    )


@pytest.mark.parametrize("natural_gradient", [True, False])
@pytest.mark.parametrize("step_rule", STEP_RULES)
@pytest.mark.parametrize("saved_at", [1, 13, 15, 21])
def test_continuing_amid_a_schedule_is_bit_identical(step_rule, natural_gradient, saved_at):
    """At 1 nothing is observed but once; 13 and 21 lie between reprojections, 15 is one."""
    options = {
        "step_rule": step_rule,
        "natural_gradient": natural_gradient,
        "projection": True,
        "budget": moving(1, 5),
        "total_steps": 30,
        "weight_decay": 0.1,
    }

    def fresh():
        problem = Regression(dtype=torch.float32)
        return problem, optimizer_of(problem, **options)

    whole, optimizer = fresh()
    train(whole, optimizer, range(saved_at))
    state, part = through_a_checkpoint(optimizer), copy.deepcopy(whole)
    train(whole, optimizer, range(saved_at, 30))
    resumed = optimizer_of(part, **options)
    resumed.load_state_dict(state)
    assert 1 <= int(active_of(resumed).sum()) <= RANK
    train(part, resumed, range(saved_at, 30))
    assert torch.equal(part.A, whole.A)
    assert torch.equal(part.B, whole.B)
    assert torch.equal(active_of(resumed), active_of(optimizer))
    assert resumed.budgets == optimizer.budgets
    assert int(active_of(resumed).sum()) == 5


def test_projection_without_natural_gradient_is_adamw_between_reprojections_that_move_no_output():
    problem, reference = Regression(), Regression()
    optimizer = optimizer_of(
        problem, natural_gradient=False, projection=True, budget=constant(10**6, every=10)
    )
    theirs = torch.optim.AdamW([reference.A, reference.B], lr=1e-2, weight_decay=0.0)
    moves = 0
    for step in range(30):
        with torch.no_grad():
            reference.A.copy_(problem.A)
            reference.B.copy_(problem.B)
        load_moments(theirs, optimizer, reference, step)
        train(problem, optimizer, [step])
        train(reference, theirs, [step])
        torch.testing.assert_close(problem.product(), reference.product(), rtol=1e-9, atol=1e-12)
        if optimizer.reprojection is not None:
            moves += 1
            assert (problem.A - reference.A).detach().abs().max() > 1e-6
        else:
            torch.testing.assert_close(problem.A.detach(), reference.A.detach(), rtol=1e-9, atol=0)
    assert moves == 4


def load_moments(theirs, optimizer, reference, step):
    """Give torch's AdamW the moments that the optimizer has now."""
    for side, parameter in (("lora_A", reference.A), ("lora_B", reference.B)):
        theirs.state[parameter] = {
            "step": torch.tensor(float(step)),
            "exp_avg": first_moment(optimizer, side).clone(),
            "exp_avg_sq": second_moment(optimizer, side).clone(),
        }
