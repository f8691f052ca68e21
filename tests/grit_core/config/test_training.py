import dataclasses
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grit_core.config.training import (
    TRAINING_CHECKS,
    TrainingConfig,
    steps_per_epoch,
    total_steps,
    training_from_dict,
    validate,
)
from grit_core.errors import InvalidConfig


def test_the_defaults_are_those_of_the_api() -> None:
    assert dataclasses.asdict(TrainingConfig()) == {
        "epochs": 3,
        "max_steps": None,
        "learning_rate": 2e-4,
        "batch_size": "auto",
        "gradient_accumulation_steps": 1,
        "lr_schedule": "cosine",
        "warmup_ratio": 0.03,
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "max_length": 2048,
        "precision": "auto",
        "optimizer": "grit",
        "gradient_checkpointing": "off",
        "compaction_max_kl": None,
        "seed": 0,
        "checkpoint_every_steps": "auto",
        "eval_every_steps": "auto",
        "max_eval_rows": 1000,
        "early_stopping_patience": None,
        "on_long_rows": "reject",
    }
    assert validate(TrainingConfig()) == []


def test_every_field_has_a_rule_and_every_number_an_upper_bound() -> None:
    assert set(TRAINING_CHECKS) == {field.name for field in dataclasses.fields(TrainingConfig)}
    for name in TRAINING_CHECKS:
        too_much = dataclasses.replace(TrainingConfig(), **{name: 10**40})
        assert [fault.pointer for fault in validate(too_much)] == [f"/training/{name}"]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, -1, "fast", None, [], True])
@pytest.mark.parametrize("name", ["learning_rate", "epochs", "batch_size", "seed", "max_grad_norm"])
def test_a_number_that_is_none_is_refused(name: str, value: Any) -> None:
    config = dataclasses.replace(TrainingConfig(), **{name: value})
    (fault,) = validate(config)
    assert fault.pointer == f"/training/{name}"


def test_unknown_fields_are_refused_with_their_neighbour() -> None:
    with pytest.raises(InvalidConfig, match="Did you mean learning_rate"):
        training_from_dict({"learning_rat": 1e-4})
    assert training_from_dict({"epochs": 1}).epochs == 1


@given(
    rows=st.integers(1, 500),
    batch_size=st.integers(1, 40),
    accumulation=st.integers(1, 6),
    epochs=st.integers(1, 9),
)
def test_steps_are_the_groups_that_a_loop_over_the_rows_makes(
    rows: int, batch_size: int, accumulation: int, epochs: int
) -> None:
    training = TrainingConfig(
        epochs=epochs, batch_size=batch_size, gradient_accumulation_steps=accumulation
    )
    groups = len(range(0, rows, batch_size * accumulation))
    assert steps_per_epoch(training, num_rows=rows) == groups
    assert total_steps(training, num_rows=rows) == epochs * groups


@pytest.mark.parametrize(
    ("epochs", "max_steps", "expected"),
    [(0.5, None, 5), (1.1, None, 11), (0.01, None, 1), (3, 7, 7)],
)
def test_part_epochs_round_up_and_max_steps_ends_earlier(
    epochs: float, max_steps: int | None, expected: int
) -> None:
    training = TrainingConfig(epochs=epochs, max_steps=max_steps, batch_size=1)
    assert total_steps(training, num_rows=10) == expected


def test_steps_of_an_unresolved_run_are_a_programming_error() -> None:
    with pytest.raises(ValueError, match="resolve_training"):
        total_steps(TrainingConfig(), num_rows=10)
