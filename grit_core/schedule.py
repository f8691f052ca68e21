"""The learning rate of each optimizer step: a function of the step, so there is nothing to save."""

import math

from grit_core.config.training import TrainingConfig


def learning_rate(training: TrainingConfig, step: int, *, total_steps: int) -> float:
    """Return the learning rate of one optimizer step.

    The rate rises linearly over the first `warmup_ratio` of the steps and reaches its peak at the
    last of them. From there `linear` and `cosine` fall towards zero, which they would reach one
    step after the last, so that no step is wasted on a rate of zero.

    Args:
        training: Peak, warm-up and schedule.
        step: From 0.
        total_steps: Optimizer steps of the whole job.
    """
    warmup_steps = math.ceil(training.warmup_ratio * total_steps)
    if step < warmup_steps:
        return training.learning_rate * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return training.learning_rate * _share_of_peak(training.lr_schedule, progress)


def _share_of_peak(schedule: str, progress: float) -> float:
    """Share of the peak after `progress` (0 to 1) of the steps that follow the warm-up."""
    if schedule == "linear":
        return 1 - progress
    if schedule == "cosine":
        return (1 + math.cos(math.pi * progress)) / 2
    return 1.0
