"""Brings to this machine what an attempt needs, so that the training process needs no keys."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from typing import TYPE_CHECKING

from grit_core.config.model_configs import config_from_dict
from grit_core.config.training import TrainingConfig
from grit_core.events import Warned
from grit_core.job_spec import eval_fraction_of
from grit_core.plan import AdaptationPlan
from grit_core.training_job import TrainingJob
from store import attempts, base_models
from store.database import run_in_transaction, transaction
from store.errors import ObjectCorrupt, ObjectMissing
from store.models import Dataset

if TYPE_CHECKING:
    from pathlib import Path

    from store.attempts import Claim
    from store.models import Checkpoint
    from worker.workbench import Workbench


@dataclass(frozen=True, kw_only=True, slots=True)
class Inputs:
    """What the training process is handed."""

    job: TrainingJob
    resume_from: Path | None
    warnings: tuple[Warned, ...]
    """Checkpoints that had to be passed over."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Rows:
    """What the database says about a claimed job."""

    source: str
    dataset: Dataset
    eval_dataset: Dataset | None
    checkpoints: list[Checkpoint]
    """Those to resume from, the best first."""


def fetch_inputs(bench: Workbench, claim: Claim, *, work_dir: Path) -> Inputs:
    """Download the datasets and the checkpoint of a claimed job into caches and `work_dir`.

    A dataset that is gone or damaged raises `ObjectMissing` or `ObjectCorrupt`; a checkpoint that
    is, only warns.
    """
    rows = _read_rows(bench, claim)
    resume_from, warnings = _fetch_checkpoint(bench, claim, rows.checkpoints, work_dir / "resume")
    row = claim.job
    training = TrainingConfig(**row.training)
    job = TrainingJob(
        model=rows.source,
        model_name=row.model,
        plan=AdaptationPlan.from_json(row.plan),
        config=config_from_dict(row.config),
        training=training,
        dataset=_fetch_dataset(bench, rows.dataset),
        eval_dataset=_fetch_dataset(bench, rows.eval_dataset) if rows.eval_dataset else None,
        eval_fraction=eval_fraction_of(row.request),
        device=row.device,
        precision=str(training.precision),
        work_dir=work_dir,
        num_threads=bench.settings.training_threads,
    )
    return Inputs(job=job, resume_from=resume_from, warnings=tuple(warnings))


def _read_rows(bench: Workbench, claim: Claim) -> _Rows:
    row = claim.job
    with transaction(bench.engine, read_only=True) as session:
        stored = attempts.list_checkpoints(session, row.id)
        last_step = claim.checkpoint.step if claim.checkpoint else 0
        usable = [checkpoint for checkpoint in stored if checkpoint.step <= last_step]
        return _Rows(
            source=base_models.get(session, row.model).source,
            dataset=session.get_one(Dataset, row.dataset_id),
            eval_dataset=(
                session.get_one(Dataset, row.eval_dataset_id) if row.eval_dataset_id else None
            ),
            checkpoints=sorted(usable, key=lambda checkpoint: checkpoint.step, reverse=True),
        )


def _fetch_dataset(bench: Workbench, dataset: Dataset) -> Path:
    if dataset.object_key is None or dataset.sha256 is None:
        raise ObjectMissing(f"the rows of dataset {dataset.id}")
    return bench.datasets.fetch(bench.objects, key=dataset.object_key, sha256=dataset.sha256)


def _fetch_checkpoint(
    bench: Workbench, claim: Claim, checkpoints: list[Checkpoint], folder: Path
) -> tuple[Path | None, list[Warned]]:
    """Fetch the newest checkpoint whose bytes are whole; forget newer ones, and say why."""
    warnings = []
    for checkpoint in checkpoints:
        target = folder / f"from-{checkpoint.step}"
        try:
            bench.objects.get_folder(checkpoint.prefix, target)
        except (ObjectCorrupt, ObjectMissing) as error:
            shutil.rmtree(target, ignore_errors=True)
            _forget(bench, claim, step=checkpoint.step)
            warnings.append(
                Warned(
                    code="checkpoint_unusable",
                    message=f"The checkpoint of step {checkpoint.step} is passed over: {error}",
                )
            )
        else:
            return target / f"step-{checkpoint.step}", warnings
    return None, warnings


def _forget(bench: Workbench, claim: Claim, *, step: int) -> None:
    """Remove a damaged checkpoint, so that no later attempt starts from it."""
    prefix = run_in_transaction(
        bench.engine,
        lambda session: attempts.forget_checkpoint(
            session, job_id=claim.job.id, attempt=claim.attempt, step=step
        ),
    )
    if prefix is not None:
        bench.objects.delete_prefix(f"{prefix}/")
