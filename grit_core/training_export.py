"""The end of a run: write the adapter, prove it with plain PEFT, then give the folder its name."""

from collections.abc import Iterator
from typing import Any

from grit_core.artifacts import (
    Probe,
    finish_adapter,
    model_card,
    probe,
    remove_folder,
    verify_adapter,
    versions,
    write_adapter,
)
from grit_core.config.model_configs import config_to_dict
from grit_core.data import collate
from grit_core.evaluation import retention_after
from grit_core.events import AdapterSaved, TrainingEvent, TrainingFinished
from grit_core.loss import to_device
from grit_core.training_run import TrainingRun


def export(run: TrainingRun) -> Iterator[TrainingEvent]:
    """Write `work_dir/adapter/`; the run's model is released on the way and cannot train on."""
    yield from retention_after(run)
    if not run.processes.leads:
        return
    unfinished = run.job.work_dir / ".adapter.new"
    remove_folder(unfinished)
    trainable_parameters = sum(parameter.numel() for parameter in run.parameters.values())
    expected = _probe(run)
    sha256 = write_adapter(unfinished, run.model, base_model_name=run.job.base_model_name)
    run.release_model()
    difference = verify_adapter(
        unfinished,
        source=run.job.model,
        device=run.device,
        precision=run.job.precision,
        expected=expected,
    )
    manifest = _manifest(run) | {
        "adapter_sha256": sha256,
        "max_logit_difference": difference,
        "trainable_parameters": trainable_parameters,
    }
    final = run.job.work_dir / "adapter"
    finish_adapter(unfinished, final, manifest=manifest, card=model_card(manifest))
    yield AdapterSaved(
        folder=str(final),
        sha256=sha256,
        trainable_parameters=trainable_parameters,
        max_logit_difference=difference,
    )
    progress = run.progress
    yield TrainingFinished(
        step=progress.step,
        train_loss=0.0 if progress.train_loss is None else progress.train_loss,
        eval_loss=progress.eval_loss,
        retention_loss_before=progress.retention_loss_before,
        retention_loss_after=progress.retention_loss_after,
    )


def _probe(run: TrainingRun) -> Probe:
    """The trained model's logits on the first training row that is not left out."""
    rows = (run.train_rows.row(index) for index in run.sampler.rows)
    first = next(row for row in rows if row is not None)
    batch = collate([first], pad_token_id=run.train_rows.encoder.pad_token_id)
    return probe(run.model, to_device(batch, run.device).inputs)


def _manifest(run: TrainingRun) -> dict[str, Any]:
    job, progress = run.job, run.progress
    held_out = None if job.eval_dataset is None else run.eval_rows.file.sha256
    retained = None if run.retention_rows is None else run.retention_rows.file.sha256
    return {
        "format": 1,
        "base_model": {
            "name": job.base_model_name,
            "model_type": job.plan.model_type,
            "inventory_hash": job.plan.inventory_hash,
            "auto_class": run.auto_class,
        },
        "plan": job.plan.to_json(),
        "config": config_to_dict(job.config),
        "training": run.identity()["training"],
        "dataset": {
            "sha256": run.train_rows.file.sha256,
            "num_rows": len(run.sampler.rows),
            "eval_sha256": held_out,
            "retention_sha256": retained,
            "eval_fraction": job.eval_fraction,
            "num_eval_rows": len(run.eval_indices),
        },
        "device": job.device,
        "precision": job.precision,
        "num_threads": run.num_threads,
        "num_processes": run.processes.count,
        "metrics": {
            "steps": progress.step,
            "train_loss": progress.train_loss,
            "eval_loss": progress.eval_loss,
            "best_eval_loss": progress.best_eval_loss,
            "retention_loss_before": progress.retention_loss_before,
            "retention_loss_after": progress.retention_loss_after,
        },
        "versions": versions(),
    }
