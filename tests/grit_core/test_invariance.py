"""What does and what does not depend on how BA is split: (A, B) or (R A, B R^-1).

The theorem. In the canonical gauge the coordinates of rank space are those of BA, up to signs, and
Adam does not see signs. So two runs of the `gauge` rule whose adapters have equal products, whose
factors have been observed and whose moments are empty when they first enter the gauge stay equal
in exact arithmetic. What it does not say: the steps before the first reprojection are Adam's in the
coordinates of the split, and are not invariant.
"""

import pytest
import torch

from tests.grit_core.rank_space import Regression, conditioned, optimizer_of, train

STEPS = range(100)


def enter_the_gauge(problem, optimizer):
    """Reproject before any step: no gradient, so that nothing else moves."""
    optimizer.observe(problem.sums())
    optimizer.step()
    assert optimizer.reprojection is not None
    assert not optimizer.reprojection.refused


def trajectory(*, split=None, entered=True, **options):
    problem = Regression(split=split)
    optimizer = optimizer_of(problem, **options)
    if entered:
        enter_the_gauge(problem, optimizer)
    return problem, train(problem, optimizer, STEPS)


def largest_difference(one, other):
    """Between two trajectories of BA, relative to how far the first one has gone."""
    start = Regression().product()
    return max(float((a - b).norm() / (a - start).norm()) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize(
    ("condition", "damping", "tolerance"),
    [(1, 1e-4, 1e-12), (1e2, 1e-4, 1e-7), (1e3, 1e-4, 1e-6), (1e3, 1e-12, 1e-8)],
)
def test_the_gauge_rule_trains_the_same_product_from_every_split(condition, damping, tolerance):
    options = {"step_rule": "gauge", "damping": damping}
    problem, one = trajectory(**options)
    _, other = trajectory(split=3 * conditioned(condition), **options)
    assert problem.loss().item() < 0.7 * Regression().loss().item()
    assert largest_difference(one, other) < tolerance


def test_in_float32_what_is_left_is_the_rounding_of_the_split():
    results = []
    for split in (None, 3 * conditioned(10)):
        problem = Regression(split=split, dtype=torch.float32)
        optimizer = optimizer_of(problem, step_rule="gauge")
        enter_the_gauge(problem, optimizer)
        results.append(train(problem, optimizer, STEPS))
    assert largest_difference(*results) < 1e-2


@pytest.mark.parametrize("step_rule", ["ekfac", "kfac", "paper"])
def test_rules_without_a_gauge_do_depend_on_the_split(step_rule):
    """The negative controls: at least a million times further apart than the gauge rule."""
    options = {"step_rule": step_rule, "entered": False}
    _, one = trajectory(**options)
    _, other = trajectory(split=3 * conditioned(1e2), **options)
    assert largest_difference(one, other) > 0.1


def test_adamw_does_depend_on_the_split():
    results = []
    for split in (None, 3 * conditioned(1e2)):
        problem = Regression(split=split)
        optimizer = torch.optim.AdamW([problem.A, problem.B], lr=1e-2, weight_decay=0.0)
        results.append(train(problem, optimizer, STEPS))
    assert largest_difference(*results) > 0.1


def test_steps_before_the_first_reprojection_are_not_invariant():
    """The limit of the theorem: the first step is Adam's in the coordinates of the split."""
    _, one = trajectory(step_rule="gauge", entered=False)
    _, other = trajectory(split=3 * conditioned(1e2), step_rule="gauge", entered=False)
    assert largest_difference(one, other) > 0.1


def directions(step_rule, split):
    """What a rule makes of the first gradients before Adam sees them, as changes of BA."""
    problem = Regression(split=split)
    optimizer = optimizer_of(problem, step_rule=step_rule, damping=1e-12)
    optimizer.observe(problem.sums())
    torch.autograd.backward(problem.loss())
    A, B = problem.A.detach().clone(), problem.B.detach().clone()
    optimizer.step()
    moments = {stack.side: stack.m_LMN[0] for stack in optimizer.stacks}
    return B @ moments["lora_A"], moments["lora_B"] @ A


def cosine(one, other):
    return float((one * other).sum() / (one.norm() * other.norm()))


@pytest.mark.parametrize("side", [0, 1])
def test_the_direction_of_kfac_is_that_of_the_product_whatever_the_split(side):
    split = 3 * conditioned(1e3)
    one, other = (directions("kfac", R)[side] for R in (None, split))
    assert cosine(one, other) == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("side", [0, 1])
def test_the_direction_of_the_released_rule_turns_with_the_split(side):
    split = 3 * conditioned(1e3)
    one, other = (directions("paper", R)[side] for R in (None, split))
    assert cosine(one, other) < 0.9
