"""Budgets: schedules by their ends, allocation against every other allocation."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from grit_core.curvature.projection import ProjectionSettings, allocate, requested_budget

MOVING = ("linear", "cosine", "exponential")


def budget_at(step, *, total_steps, schedule, start=32, end=96, **options):
    settings = ProjectionSettings(budget_start=start, budget_end=end, schedule=schedule)
    return requested_budget(settings, step=step, total_steps=total_steps, **options)


@given(
    schedule=st.sampled_from(MOVING),
    start=st.integers(1, 5000),
    end=st.integers(1, 5000),
    total_steps=st.integers(1, 3000),
)
def test_a_moving_budget_goes_from_its_start_to_its_end_and_never_back(
    schedule, start, end, total_steps
):
    options = {"total_steps": total_steps, "schedule": schedule, "start": start, "end": end}
    stride = max(1, total_steps // 50)
    steps = [*range(0, total_steps, stride), total_steps]
    budgets = [budget_at(step, **options) for step in steps]
    assert (budgets[0], budgets[-1]) == (start, end)
    assert all(type(budget) is int for budget in budgets)
    assert budgets == sorted(budgets, reverse=start > end)


@pytest.mark.parametrize("schedule", MOVING)
@pytest.mark.parametrize("total_steps", [2, 37, 1000, 250_000])
def test_the_budget_moves_over_the_real_number_of_steps(schedule, total_steps):
    options = {"total_steps": total_steps, "schedule": schedule, "end": 10**6}
    assert budget_at(total_steps // 2, **options) < 0.6 * 10**6
    assert budget_at(math.ceil(total_steps * 0.9), **options) > 0.3 * 10**6
    assert budget_at(total_steps, **options) == budget_at(total_steps + 5, **options) == 10**6


@pytest.mark.parametrize("total_steps", [8, 800])
def test_schedules_are_their_formulas(total_steps):
    for eighths in range(9):
        share = eighths / 8
        expected = {
            "linear": 32 + 64 * share,
            "cosine": 32 + 64 * (1 - math.cos(math.pi * share)) / 2,
            "exponential": 32 * 3**share,
            "constant": 32,
        }
        for schedule, value in expected.items():
            step = eighths * total_steps // 8
            found = budget_at(step, total_steps=total_steps, schedule=schedule)
            assert abs(found - value) <= 0.5 + 1e-9, (schedule, eighths)


def test_the_cosine_starts_slowly_and_exceeds_the_straight_line_in_its_second_half():
    """The released code has its sign the other way round: it falls where it should rise."""
    quarters = [budget_at(step, total_steps=4, schedule="cosine") for step in range(5)]
    assert quarters == [32, 41, 64, 87, 96]


def test_a_schedule_that_does_not_exist_names_those_that_do():
    with pytest.raises(ValueError, match="'cubic' is no projection schedule; use linear, cosine"):
        budget_at(0, total_steps=1, schedule="cubic")


energies_of_a_layer = st.lists(
    st.floats(0, 1e6, allow_nan=False, allow_subnormal=False), min_size=1, max_size=6
)


@given(
    energies=st.lists(energies_of_a_layer, min_size=1, max_size=4),
    share=st.floats(0.01, 1.0, exclude_max=True),
)
def test_adaptive_holds_the_asked_energy_with_the_fewest_directions(energies, share):
    tensors = [torch.tensor(layer, dtype=torch.float64) for layer in energies]
    settings = ProjectionSettings(
        budget_start=1, budget_end=10**6, schedule="adaptive", energy=share
    )
    budget = requested_budget(settings, step=3, total_steps=9, energies=tensors)
    ordered = sorted(itertools.chain.from_iterable(energies), reverse=True)
    total = math.fsum(ordered)
    assert math.fsum(ordered[:budget]) >= share * total * (1 - 1e-9)
    assert budget == 1 or math.fsum(ordered[: budget - 1]) < share * total * (1 + 1e-9)


def test_adaptive_stays_within_both_ends_in_whatever_order_they_are():
    flat = [torch.ones(50, dtype=torch.float64)]
    for start, end in ((10, 30), (30, 10)):
        settings = ProjectionSettings(
            budget_start=start, budget_end=end, schedule="adaptive", energy=0.9
        )
        assert requested_budget(settings, step=0, total_steps=9, energies=flat) == 30
        peaked = [torch.tensor([1.0, *[1e-9] * 49])]
        assert requested_budget(settings, step=0, total_steps=9, energies=peaked) == 10


def layers_of(*energies):
    return {str(i): torch.tensor(layer, dtype=torch.float64) for i, layer in enumerate(energies)}


tiny_layers = st.lists(
    st.lists(st.integers(0, 5).map(float), min_size=1, max_size=3), min_size=1, max_size=3
)


@given(energies=tiny_layers, requested=st.integers(0, 12))
def test_an_allocation_holds_the_most_energy_of_all_that_leave_every_layer_one(energies, requested):
    budget, active = allocate(layers_of(*energies), requested)
    num_directions = sum(map(len, energies))
    assert budget.requested == requested
    assert budget.num_directions == num_directions
    assert budget.effective == max(len(energies), min(num_directions, requested))
    assert sum(int(chosen.sum()) for chosen in active.values()) == budget.effective
    assert all(chosen.any() for chosen in active.values())
    places = [(layer, index) for layer, own in enumerate(energies) for index in range(len(own))]
    best = max(
        sum(energies[layer][index] for layer, index in subset)
        for subset in itertools.combinations(places, budget.effective)
        if {layer for layer, _ in subset} == set(range(len(energies)))
    )
    held = sum(
        float((torch.tensor(own, dtype=torch.float64) * active[str(layer)]).sum())
        for layer, own in enumerate(energies)
    )
    assert held == best


@given(energies=tiny_layers, requested=st.integers(0, 12))
def test_a_larger_budget_keeps_all_that_a_smaller_one_had(energies, requested):
    _, fewer = allocate(layers_of(*energies), requested)
    _, more = allocate(layers_of(*energies), requested + 1)
    assert not any((fewer[name] & ~more[name]).any() for name in fewer)


def test_ties_go_to_the_earlier_layer_and_then_to_the_earlier_direction():
    _, active = allocate(layers_of([1.0, 1.0, 1.0], [1.0, 1.0, 1.0]), 4)
    assert active["0"].tolist() == [True, True, True]
    assert active["1"].tolist() == [True, False, False]


def test_a_layer_without_energy_keeps_one_direction_all_the_same():
    _, active = allocate(layers_of([9.0, 8.0, 7.0], [0.0, 0.0, 0.0]), 3)
    assert [int(chosen.sum()) for chosen in active.values()] == [2, 1]
