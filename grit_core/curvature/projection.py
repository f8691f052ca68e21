"""The projection budget: how many rank-space directions of a modality may move, and which.

k(t) directions over all layers of a modality, from `budget_start` at the first step to `budget_end`
at the last. Every layer keeps one; the others go to the largest Fisher energies. Taking the largest
is exactly optimal: what is left out is a sum of separate terms.

Inactive directions are frozen, not destroyed: the model computes with them and may get them back.

Shape suffixes: R rank of one layer.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class ProjectionSettings:
    """When rank space is reprojected and how many directions stay active."""

    budget_start: int = 32
    budget_end: int = 96
    schedule: str = "linear"
    """`linear`, `cosine`, `exponential`, `constant` or `adaptive`."""
    energy: float = 0.99
    """For `adaptive`: the share of the modality's Fisher energy that stays active."""
    update_freq: int = 50
    """Optimizer steps between two reprojections."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Budget:
    """A modality's budget at one step."""

    requested: int
    """What the schedule asks for."""
    effective: int
    """What the layers can take: at least one each, at most every direction."""
    num_directions: int
    """All directions of the modality."""


def requested_budget(
    settings: ProjectionSettings,
    *,
    step: int,
    total_steps: int,
    energies: Sequence[Tensor] = (),
) -> int:
    """Return how many directions the schedule asks for at a step.

    Args:
        settings: Ends and schedule; the start may lie above the end.
        step: Steps done, from 0; at 0 the budget is the start, at `total_steps` the end.
        total_steps: Of the whole job.
        energies: Of each layer, shape [R]; only `adaptive` reads them.

    Raises:
        ValueError: For a schedule that does not exist.
    """
    start, end = settings.budget_start, settings.budget_end
    share = min(1.0, max(0.0, step / max(1, total_steps)))
    if settings.schedule == "constant":
        return start
    if settings.schedule == "linear":
        return _rounded(start + (end - start) * share)
    if settings.schedule == "cosine":
        return _rounded(start + (end - start) * (1 - math.cos(math.pi * share)) / 2)
    if settings.schedule == "exponential":
        return _rounded(start * (end / start) ** share)
    if settings.schedule == "adaptive":
        low, high = sorted((start, end))
        return min(high, max(low, _holding(energies, settings.energy)))
    raise ValueError(
        f"{settings.schedule!r} is no projection schedule; use linear, cosine, exponential,"
        " constant or adaptive."
    )


def allocate(energies: Mapping[str, Tensor], requested: int) -> tuple[Budget, dict[str, Tensor]]:
    """Give a modality's budget to its layers' strongest directions.

    Args:
        energies: Fisher energies of every layer's directions, shape [R] each, in any order. Equal
            energies go to the earlier layer, then to the earlier direction.
        requested: Directions over all layers.

    Returns:
        The budget, and for every layer which directions are active, booleans of shape [R].
    """
    num_directions = sum(energy_R.numel() for energy_R in energies.values())
    effective = min(num_directions, max(requested, len(energies)))
    active = {
        name: torch.zeros(energy_R.numel(), dtype=torch.bool) for name, energy_R in energies.items()
    }
    for name, energy_R in energies.items():
        active[name][int(energy_R.argmax())] = True
    left = sorted(
        (-energy, place, index, name)
        for place, (name, energy_R) in enumerate(energies.items())
        for index, energy in enumerate(energy_R.tolist())
        if not active[name][index]
    )
    for _, _, index, name in left[: effective - len(energies)]:
        active[name][index] = True
    return Budget(requested=requested, effective=effective, num_directions=num_directions), active


def _rounded(value: float) -> int:
    """Half goes up, unlike Python's rounding to even, so that a rising budget rises evenly."""
    return math.floor(value + 0.5)


def _holding(energies: Sequence[Tensor], share: float) -> int:
    """The fewest directions that hold a share of all energy."""
    if not energies:
        return 0
    sorted_K = torch.cat([energy_R.double() for energy_R in energies]).sort(descending=True).values
    held_K = sorted_K.cumsum(0)
    return int((held_K < share * held_K[-1] * (1 - 1e-12)).sum()) + 1
