"""Adapters and observations that are degenerate or not finite, under every rule."""

import pytest
import torch

from grit_core.optimizer import STEP_RULES, ProjectionSettings
from tests.grit_core.rank_space import (
    NUM_ROWS,
    RANK,
    Regression,
    conditioned,
    normal,
    optimizer_of,
    sums_of,
    train,
)

BUDGET = ProjectionSettings(budget_start=6, budget_end=3, update_freq=5)


def degenerate_problem(kind):
    problem = Regression(dtype=torch.float32)
    with torch.no_grad():
        if kind == "duplicated rows":
            problem.A[1] = problem.A[0]
            problem.B[:, 1] = problem.B[:, 0]
        elif kind == "a zero row":
            problem.A[2] = 0
        elif kind == "B = 0":
            problem.B.zero_()
        elif kind == "rank one":
            problem.A[1:] = 0
            problem.B[:, 1:] = 0
        elif kind == "a bad split":
            R = 1e4 * conditioned(1e4).float()
            problem.B.copy_(problem.B @ torch.linalg.inv(R))
            problem.A.copy_(R @ problem.A)
    return problem


@pytest.mark.parametrize("gradient_scale", [1.0, 1e-8])
@pytest.mark.parametrize(
    "kind", ["duplicated rows", "a zero row", "B = 0", "rank one", "a bad split"]
)
@pytest.mark.parametrize("step_rule", STEP_RULES)
def test_degenerate_adapters_train_on_to_finite_weights(step_rule, kind, gradient_scale):
    problem = degenerate_problem(kind)
    before = problem.loss().item()
    optimizer = optimizer_of(
        problem, step_rule=step_rule, projection=True, budget=BUDGET, total_steps=40
    )
    for step in range(40):
        rows = torch.randint(0, NUM_ROWS, (4,), generator=torch.Generator().manual_seed(step))
        if optimizer.observation_due():
            seen = problem.sums(rows)["l"]
            seen.hh_RR *= gradient_scale**2
            if seen.hh_RR.any():
                optimizer.observe({"l": seen})
        torch.autograd.backward(problem.loss(rows) * gradient_scale)
        optimizer.step()
        optimizer.zero_grad()
    assert problem.A.isfinite().all()
    assert problem.B.isfinite().all()
    for stack in optimizer.stacks:
        assert stack.m_LMN.isfinite().all()
        assert stack.v_LMN.isfinite().all()
    if kind != "a bad split" and gradient_scale == 1:
        assert problem.loss().item() < before


@pytest.mark.parametrize("step_rule", STEP_RULES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_observation_is_counted_and_changes_neither_step_nor_reprojection(step_rule, bad):
    results = []
    for poisoned in (False, True):
        problem = Regression(dtype=torch.float32)
        optimizer = optimizer_of(
            problem, step_rule=step_rule, projection=True, budget=BUDGET, total_steps=20
        )
        train(problem, optimizer, range(7))
        if poisoned:
            z, h = normal(9, RANK, seed=1).float(), normal(9, RANK, seed=2).float()
            h[3, 1] = bad
            assert optimizer.observe({"l": sums_of(z, h)}) == 1
        assert optimizer.skipped_observations == int(poisoned)
        train(problem, optimizer, range(7, 20))
        results.append(problem.product())
    assert torch.equal(results[0], results[1])
