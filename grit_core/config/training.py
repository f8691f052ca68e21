"""`TrainingConfig`: how a training run goes, apart from which layers adapt."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

from grit_core.config.bounds import Check, Choice, Number, check_fields, unknown_fields
from grit_core.errors import Fault, InvalidConfig

Auto = Literal["auto"]


@dataclass
class TrainingConfig:
    """A training run. `"auto"` is replaced by `grit_core.plan.resolve_training`."""

    epochs: float = 3
    """Passes over the training rows; a fraction ends within a pass."""
    max_steps: int | None = None
    """Ends after so many optimizer steps, whatever `epochs` says."""
    learning_rate: float = 2e-4
    """Learning rate at the end of the warm-up, in which it is highest."""
    batch_size: int | Auto = "auto"
    """Rows in one forward pass."""
    gradient_accumulation_steps: int = 1
    """Forward passes for one optimizer step."""
    lr_schedule: str = "cosine"
    """`constant`, `linear` or `cosine`, after the warm-up."""
    warmup_ratio: float = 0.03
    """Share of the steps over which the learning rate rises from 0."""
    weight_decay: float = 0.0
    """Decoupled weight decay of the adapter's matrices."""
    max_grad_norm: float = 1.0
    """The gradient is scaled down to this length when it is longer."""
    max_length: int = 2048
    """Tokens of one row, image tokens included."""
    precision: str = "auto"
    """`float32`, `bfloat16`, `float16` or `auto`."""
    optimizer: str = "grit"
    """`grit` or `adamw`."""
    gradient_checkpointing: str = "off"
    """`off`, `non_reentrant` or `reentrant`: activations are computed again in the backward pass,
    for less memory and about a third more time."""
    compaction_max_kl: float | None = None
    """Ends the job by cutting the adapter's weakest directions, as long as the predicted divergence
    (nats for a label token) stays below this; null cuts nothing."""
    seed: int = 0
    """Decides the order of rows, the held-out rows, dropout and the start."""
    checkpoint_every_steps: int | Auto = "auto"
    """Optimizer steps between two checkpoints; `auto` spaces them over the job's steps."""
    eval_every_steps: int | Auto = "auto"
    """Optimizer steps between two evaluations; `auto` spaces them over the job's steps."""
    max_eval_rows: int | None = 1000
    """Most rows of an evaluation, and most retention rows; chosen by the seed when there are more.
    null takes all."""
    early_stopping_patience: int | None = None
    """Ends after so many evaluations without a new best; null never does."""
    on_long_rows: str = "reject"
    """What becomes of a row longer than `max_length`: `reject` refuses the dataset, `skip` leaves
    the row out, `truncate` cuts it; what was left out or cut is counted and reported."""


TRAINING_CHECKS: dict[str, Check] = {
    "epochs": Number(low=0, high=10_000, above_low=True),
    "max_steps": Number(low=1, high=10_000_000, integer=True, optional=True),
    "learning_rate": Number(low=0, high=10, above_low=True),
    "batch_size": Number(low=1, high=4096, integer=True, auto=True),
    "gradient_accumulation_steps": Number(low=1, high=4096, integer=True),
    "lr_schedule": Choice(values=("constant", "linear", "cosine")),
    "warmup_ratio": Number(low=0, high=1, below_high=True),
    "weight_decay": Number(low=0, high=10),
    "max_grad_norm": Number(low=0, high=1e9, above_low=True),
    "max_length": Number(low=8, high=1_048_576, integer=True),
    "precision": Choice(values=("auto", "float32", "bfloat16", "float16")),
    "optimizer": Choice(values=("grit", "adamw")),
    "gradient_checkpointing": Choice(values=("off", "non_reentrant", "reentrant")),
    "compaction_max_kl": Number(low=0, high=10, above_low=True, optional=True),
    "seed": Number(low=0, high=2**32 - 1, integer=True),
    "checkpoint_every_steps": Number(low=1, high=10_000_000, integer=True, auto=True),
    "eval_every_steps": Number(low=1, high=10_000_000, integer=True, auto=True),
    "max_eval_rows": Number(low=1, high=10_000_000, integer=True, optional=True),
    "early_stopping_patience": Number(low=1, high=100_000, integer=True, optional=True),
    "on_long_rows": Choice(values=("reject", "skip", "truncate")),
}
"""The rule of every field."""


def validate(training: TrainingConfig, *, pointer: str = "/training") -> list[Fault]:
    """Every fault, in field order."""
    return check_fields(training, TRAINING_CHECKS, pointer=pointer)


def training_from_dict(data: Mapping[str, Any], *, pointer: str = "/training") -> TrainingConfig:
    """Build a training configuration from JSON values. Values are not checked, names are.

    Raises:
        InvalidConfig: Fields that do not exist.
    """
    faults = unknown_fields(data, [item.name for item in fields(TrainingConfig)], pointer=pointer)
    if faults:
        raise InvalidConfig(faults)
    return TrainingConfig(**data)


def steps_per_epoch(training: TrainingConfig, *, num_rows: int) -> int:
    """Optimizer steps in which every training row is seen once; the last may hold fewer rows.

    Args:
        training: Resolved, so that `batch_size` is a number.
        num_rows: Rows to train on, the evaluation split taken out.

    Raises:
        ValueError: `batch_size` is still `auto`.
    """
    if training.batch_size == "auto":
        raise ValueError("batch_size is still auto; call resolve_training first.")
    rows_per_step = training.batch_size * training.gradient_accumulation_steps
    return math.ceil(num_rows / rows_per_step)


def total_steps(training: TrainingConfig, *, num_rows: int) -> int:
    """Optimizer steps of the whole run: ceil(epochs x steps per epoch), at most `max_steps`.

    Args:
        training: Resolved, so that `batch_size` is a number.
        num_rows: Rows to train on, the evaluation split taken out.
    """
    exact = training.epochs * steps_per_epoch(training, num_rows=num_rows)
    steps = math.ceil(round(exact, 9))  # 1.1 x 10 is 11 steps, not the 12 of 11.000000000000002
    return steps if training.max_steps is None else min(steps, training.max_steps)
