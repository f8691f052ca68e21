"""Brings to this machine what an attempt needs, so that the training process needs no keys."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import structlog

from grit_core.checkpoint_files import verify
from grit_core.compression_job import CompressionJob, compression_job_to_json
from grit_core.config.model_configs import config_from_dict
from grit_core.config.training import TrainingConfig
from grit_core.errors import CheckpointCorrupt, InvalidDataset
from grit_core.events import Warned
from grit_core.job_spec import AUTO, eval_fraction_of, requested_precision
from grit_core.plan import AdaptationPlan
from grit_core.training_job import TrainingJob, job_to_json
from store import attempts, base_models
from store.database import run_in_transaction, transaction
from store.errors import ObjectCorrupt, ObjectMissing
from store.models import Adapter, Dataset, JobKind

if TYPE_CHECKING:
    from pathlib import Path

    from sqlalchemy.orm import Session

    from store.attempts import Claim
    from store.models import Checkpoint, Job
    from worker.workbench import Workbench

_log = structlog.get_logger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Inputs:
    """What the training process is handed."""

    order: dict[str, Any]
    """Its one line of JSON, as `worker.attempt` reads it."""
    warnings: tuple[Warned, ...] = ()
    """Checkpoints that had to be passed over."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Rows:
    """What the database says about a claimed job."""

    source: str
    dataset: Dataset
    eval_dataset: Dataset | None
    retention_dataset: Dataset | None
    source_prefix: str | None
    """Where the adapter lies that a compression cuts."""
    checkpoints: list[Checkpoint]
    """Those to resume from, the best first."""


def fetch_inputs(bench: Workbench, claim: Claim, *, work_dir: Path) -> Inputs:
    """Download what a claimed job needs into caches and `work_dir`.

    A dataset or adapter that is gone raises `ObjectMissing`, a damaged adapter `ObjectCorrupt`, a
    dataset of other bytes than were validated `InvalidDataset`; a checkpoint that is gone or
    damaged only warns.
    """
    rows = _read_rows(bench, claim)
    if claim.job.kind == JobKind.COMPRESSION:
        job = _compression_job(bench, claim.job, rows, work_dir=work_dir)
        return Inputs(order=_bounded({"compression": compression_job_to_json(job)}, bench))
    resume_from, warnings = _fetch_checkpoint(bench, claim, rows.checkpoints, work_dir / "resume")
    order = {
        "job": job_to_json(_training_job(bench, claim.job, rows, work_dir=work_dir)),
        "resume_from": str(resume_from) if resume_from else None,
    }
    return Inputs(order=_bounded(order, bench), warnings=tuple(warnings))


def _bounded(order: dict[str, Any], bench: Workbench) -> dict[str, Any]:
    """Return an order with the bounds of this worker, of whose settings its process has none."""
    return {**order, "device_memory_share": bench.settings.train_device_memory_share}


def _training_job(bench: Workbench, row: Job, rows: _Rows, *, work_dir: Path) -> TrainingJob:
    training = TrainingConfig(**row.training)
    return TrainingJob(
        model=rows.source,
        model_name=row.model,
        plan=AdaptationPlan.from_json(row.plan),
        config=config_from_dict(row.config),
        training=training,
        dataset=_fetch_dataset(bench, rows.dataset),
        eval_dataset=_fetch_other(bench, rows.eval_dataset),
        eval_fraction=eval_fraction_of(row.request),
        retention_dataset=_fetch_other(bench, rows.retention_dataset),
        dataset_name=_name_of(rows.dataset),
        eval_dataset_name=_name_of(rows.eval_dataset),
        retention_dataset_name=_name_of(rows.retention_dataset),
        device=row.device,
        # What `auto` stands for is the card's: the process that computes on it decides.
        precision=requested_precision(row.request),
        work_dir=work_dir,
        num_threads=bench.settings.training_threads,
    )


def _compression_job(bench: Workbench, row: Job, rows: _Rows, *, work_dir: Path) -> CompressionJob:
    """Return the compression that a row asks for, its adapter fetched.

    Raises:
        ObjectMissing: The adapter is not there any more.
    """
    if rows.source_prefix is None:
        raise ObjectMissing(f"the adapter {row.request['adapter']}")
    adapter = work_dir / "source"
    bench.objects.get_folder(rows.source_prefix, adapter)
    training = TrainingConfig(**row.training)
    return CompressionJob(
        model=rows.source,
        model_name=row.model,
        adapter=adapter,
        dataset=_fetch_dataset(bench, rows.dataset),
        eval_dataset=_fetch_other(bench, rows.eval_dataset),
        work_dir=work_dir,
        # An adapter that was not made here has neither.
        plan=AdaptationPlan.from_json(row.plan) if row.plan else None,
        config=config_from_dict(row.config) if row.config else None,
        max_kl=row.request["max_kl"],
        num_rows=row.request["num_rows"],
        batch_size=int(training.batch_size),
        max_length=training.max_length,
        device=row.device,
        precision=str(training.precision) if row.plan else AUTO,
        seed=training.seed,
        num_threads=bench.settings.training_threads,
    )


def _read_rows(bench: Workbench, claim: Claim) -> _Rows:
    row = claim.job
    with transaction(bench.engine, read_only=True) as session:
        stored = attempts.list_checkpoints(session, row.id)
        last_step = claim.checkpoint.step if claim.checkpoint else 0
        usable = [checkpoint for checkpoint in stored if checkpoint.step <= last_step]
        source = _source_of(session, row)
        return _Rows(
            source=base_models.get(session, row.model).source,
            dataset=session.get_one(Dataset, row.dataset_id),
            eval_dataset=_dataset_of(session, row.eval_dataset_id),
            retention_dataset=_dataset_of(session, row.retention_dataset_id),
            source_prefix=None if source is None else source.prefix,
            checkpoints=sorted(usable, key=lambda checkpoint: checkpoint.step, reverse=True),
        )


def _dataset_of(session: Session, dataset_id: str | None) -> Dataset | None:
    return None if dataset_id is None else session.get_one(Dataset, dataset_id)


def _name_of(dataset: Dataset | None) -> str | None:
    """What the user calls a dataset's file, which is stored under its hash."""
    if dataset is None:
        return None
    return (dataset.details or {}).get("file_name") or dataset.name or dataset.id


def _source_of(session: Session, row: Job) -> Adapter | None:
    return None if row.source_adapter_id is None else session.get(Adapter, row.source_adapter_id)


def _fetch_other(bench: Workbench, dataset: Dataset | None) -> Path | None:
    return None if dataset is None else _fetch_dataset(bench, dataset)


def _fetch_dataset(bench: Workbench, dataset: Dataset) -> Path:
    if dataset.object_key is None or dataset.sha256 is None:
        raise ObjectMissing(f"the rows of dataset {dataset.id}")
    key, sha256 = dataset.object_key, dataset.sha256
    try:
        return bench.datasets.fetch(bench.objects, key=key, sha256=sha256)
    except ObjectCorrupt as error:
        _log.warning("dataset_differs", dataset=dataset.id, error=str(error))
    try:  # once more: the bytes may have been altered on their way, and not where they lie
        return bench.datasets.fetch(bench.objects, key=key, sha256=sha256)
    except ObjectCorrupt as error:
        raise InvalidDataset(
            f"The rows of dataset {dataset.id} are not those that were validated: {error.detail}."
        ) from error


def _fetch_checkpoint(
    bench: Workbench, claim: Claim, checkpoints: list[Checkpoint], folder: Path
) -> tuple[Path | None, list[Warned]]:
    """Fetch the newest checkpoint whose bytes are whole; forget newer ones, and say why."""
    warnings = []
    for checkpoint in checkpoints:
        target = folder / f"from-{checkpoint.step}"
        try:
            _fetch_whole(bench, checkpoint, target)
        except (ObjectCorrupt, ObjectMissing, CheckpointCorrupt) as error:
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


def _fetch_whole(bench: Workbench, checkpoint: Checkpoint, target: Path) -> None:
    """Download a checkpoint and read every byte of it; a damaged one raises.

    Damage on the way is repaired by a second download, and the checkpoint is not forgotten for it.

    Raises:
        ObjectCorrupt: It is not what was stored.
    """
    try:
        manifest = bench.objects.get_folder(checkpoint.prefix, target)
    except ObjectCorrupt as error:
        _log.warning("checkpoint_differs", step=checkpoint.step, error=str(error))
        shutil.rmtree(target, ignore_errors=True)
        manifest = bench.objects.get_folder(checkpoint.prefix, target)
    if checkpoint.manifest_sha256 not in {None, manifest.sha256}:
        raise ObjectCorrupt(checkpoint.prefix, "it is another folder than was stored")
    verify(target / f"step-{checkpoint.step}")


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
