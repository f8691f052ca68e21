"""A short, seeded part of `make chaos`, and the control that shows it can see what it looks for."""

from pathlib import Path

import pytest

from tests.chaos.faults import (
    FAULTS,
    empty_broker,
    kill_api,
    kill_worker,
    restart_database,
    ring_too_often,
)
from tests.chaos.submissions import run_submissions
from tests.chaos.training_kills import run_training_kills

pytestmark = [pytest.mark.e2e, pytest.mark.slow]


def test_submissions_under_kills_of_everything_are_neither_lost_nor_doubled(tmp_path: Path) -> None:
    faults = {kill_api: 4, kill_worker: 4, restart_database: 2, empty_broker: 1, ring_too_often: 1}
    assert faults.keys() <= FAULTS.keys()
    outcome = run_submissions(
        tmp_path, count=200, seed=11, trained_share=0, pause_seconds=0.3, faults=faults
    )

    assert outcome.violations == []
    assert (outcome.lost, outcome.doubled) == (0, 0)
    assert sum(outcome.injected.values()) >= 5
    assert outcome.jobs == {"succeeded": 200}


def test_without_the_fence_the_same_examination_finds_zombies(tmp_path: Path) -> None:
    def finds_zombies(seed: int) -> bool:
        outcome = run_submissions(
            tmp_path / str(seed),
            count=20,
            seed=seed,
            trained_share=0,
            sleepy=0.6,
            lease_seconds=1.0,
            faults={ring_too_often: 1},
            unfenced=True,
        )
        return any(each.startswith("I5 zombie") for each in outcome.violations)

    # A sleeper becomes one only where another worker takes its job before it wakes: on a machine
    # that is busy with other work no one may come in time.
    assert any(finds_zombies(seed) for seed in (12, 14, 15, 16))


def test_a_job_killed_again_and_again_ends_with_the_same_bytes_and_metrics(tmp_path: Path) -> None:
    outcome = run_training_kills(tmp_path, kills=3, seed=13)

    assert sum(outcome.kills.values()) >= 3
    assert outcome.differing == []
    assert outcome.violations == []
