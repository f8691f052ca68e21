"""A step on a device waits for it as often as its budget says, however many layers adapt."""

import dataclasses
from pathlib import Path

import pytest
import torch

from grit_core import transfer
from grit_core.evaluation import evaluate
from grit_core.events import Reprojected, StepCompleted
from grit_core.optimizer import GRITOptimizer
from grit_core.training import _step
from grit_core.training_run import TrainingRun
from tests.accelerator import Accelerator
from tests.accelerator.budgets import (
    CHECKPOINT,
    EVALUATION,
    FLOAT16,
    GRADIENT_START,
    OBSERVED_AND_REPROJECTED_STEP,
    OBSERVED_STEP,
    ORDINARY_STEP,
    REPROJECTED_STEP,
    Budget,
)
from tests.grit_core.accelerator.variants import variant_job

BUDGETS = {
    (False, False): ORDINARY_STEP,
    (True, False): OBSERVED_STEP,
    (False, True): REPROJECTED_STEP,
    (True, True): OBSERVED_AND_REPROJECTED_STEP,
}
"""By whether a step is observed, and whether it is reprojected."""

STEPS = (
    OBSERVED_STEP,  # B is zero: no reprojection yet
    OBSERVED_AND_REPROJECTED_STEP,
    ORDINARY_STEP,
    OBSERVED_STEP,
    REPROJECTED_STEP,
    ORDINARY_STEP,
)
"""Observed before the 1st, 2nd and every 3rd step; reprojected after the first with factors and
every 5th."""


@pytest.fixture(scope="module")
def tmp(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("waits")


def open_run(tmp: Path, name: str, *, scale: float = 8.0) -> TrainingRun:
    """A run whose steps are the ones of `STEPS`."""
    job = variant_job(tmp, name, device="sim", max_steps=len(STEPS) + 1, eval_fraction=0.4)
    config = dataclasses.replace(job.config, fisher_update_freq=3, projection_update_freq=5)
    run = TrainingRun(dataclasses.replace(job, config=config), num_threads=1)
    if run.scaler is not None:
        run.scaler = torch.amp.GradScaler("sim", init_scale=scale)
    return run


def count_row_tensors(run: TrainingRun) -> int:
    batches = run.stream.rows_of(run.progress.step).batches
    return sum(len(batch.inputs) + 2 for batch in batches)


@pytest.mark.parametrize(
    ("name", "asynchronous"),
    [
        *((name, True) for name in ("random_start", "kfac", "gauge", "accumulation", "float16")),
        ("random_start", False),
    ],
)
def test_every_kind_of_step_keeps_to_its_budget(
    accelerator: Accelerator,
    tmp: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    asynchronous: bool,
) -> None:
    if not asynchronous:
        monkeypatch.setattr(transfer, "is_asynchronous", lambda _device: False)
    run = open_run(tmp, name)
    run.progress.initialized = True  # the start has a test of its own
    assert isinstance(run.optimizer, GRITOptimizer)
    extra = 0 if run.scaler is None else FLOAT16
    kinds: list[Budget] = []
    try:
        for _ in STEPS:
            observed, num_rows = run.optimizer.observation_due(), count_row_tensors(run)
            with accelerator.waits() as waits:
                events = list(_step(run, 0.0))
            reprojected = any(isinstance(event, Reprojected) for event in events)
            assert isinstance(events[0], StepCompleted)
            budget = BUDGETS[observed, reprojected]
            kinds.append(budget)
            assert waits.count("grit_core") <= budget.waits + extra, (events, waits)
            blocking = waits.count("grit_core", uploads=True)
            most = budget.blocking_uploads if asynchronous else num_rows + budget.mps_uploads
            assert blocking <= most, (events, waits)
    finally:
        run.close()
    assert tuple(kinds) == STEPS


def test_a_start_from_the_gradient_waits_for_all_layers_together(
    accelerator: Accelerator, tmp: Path
) -> None:
    run = open_run(tmp, "ekfac")
    try:
        with accelerator.waits() as waits:
            assert list(run.initialize(run.rows_of(0))) == []
        assert waits.count("grit_core") <= GRADIENT_START, waits
        assert waits.count("grit_core", uploads=True) == 0, waits
    finally:
        run.close()


def test_an_evaluation_waits_once(accelerator: Accelerator, tmp: Path) -> None:
    run = open_run(tmp, "ekfac")
    try:
        assert len(run.eval_indices) > run.batch_size
        with accelerator.waits() as waits:
            assert evaluate(run) > 0
        assert waits.count("grit_core") <= EVALUATION, waits
        assert waits.count("grit_core", uploads=True) == 0, waits
    finally:
        run.close()


def test_a_checkpoint_waits_once_for_each_type(accelerator: Accelerator, tmp: Path) -> None:
    run = open_run(tmp, "plain_vision")
    try:
        list(_step(run, 0.0))
        with accelerator.waits() as waits:
            run.checkpoint()
        assert waits.count("grit_core") <= CHECKPOINT, waits
    finally:
        run.close()
