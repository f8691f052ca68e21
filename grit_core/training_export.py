"""The end of a run: write the adapter, prove it with plain PEFT, then give the folder its name."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import islice
from typing import Any, Final

import torch

from grit_core import compaction_report
from grit_core.adapter_card import training_card
from grit_core.artifacts import (
    Probe,
    finish_adapter,
    probe,
    unfinished_adapter,
    verify_adapter,
    versions,
    write_adapter,
)
from grit_core.calibration import BATCH_ROWS, Calibration, ChosenRows
from grit_core.compaction import Compaction, compact
from grit_core.config.model_configs import config_to_dict
from grit_core.data.collate import collate
from grit_core.errors import Interrupted
from grit_core.evaluation import evaluate, retention_after
from grit_core.events import (
    AdapterSaved,
    Compacted,
    TrainingEvent,
    TrainingFinished,
    TrainingStopped,
)
from grit_core.loss import to_device
from grit_core.memory_demand import describe_compaction, explained_as
from grit_core.training_run import TrainingRun

CALIBRATION_ROWS: Final = 128
"""Training rows that the adapter's directions are weighed on."""


def export(
    run: TrainingRun, should_stop: Callable[[], bool] = lambda: False
) -> Iterator[TrainingEvent]:
    """Write `work_dir/adapter/`; the run's model is released on the way and cannot train on.

    Args:
        run: At its end, its checkpoint saved; every process has to call this.
        should_stop: Asked while the adapter is compacted, which can take as long as some dozens of
            steps.
    """
    compaction, compacted = None, None
    if run.job.training.compaction_max_kl is not None:
        try:
            compaction = _compact(run, should_stop, max_kl=run.job.training.compaction_max_kl)
        except Interrupted as asked:
            yield TrainingStopped(step=run.progress.step, reason=str(asked))
            return
        compacted = _evaluated(run, compaction)
        yield compacted
        yield from compaction_report.warnings_of(compaction, compacted)
    yield from retention_after(run)
    if not run.processes.leads:
        return
    result = None if compacted is None else compaction_report.result_of(compacted)
    yield _write(run, compaction, result)
    progress = run.progress
    yield TrainingFinished(
        step=progress.step,
        train_loss=0.0 if progress.train_loss is None else progress.train_loss,
        eval_loss=progress.eval_loss,
        retention_loss_before=progress.retention_loss_before,
        retention_loss_after=progress.retention_loss_after,
        compaction=result,
    )


def _write(
    run: TrainingRun, compaction: Compaction | None, result: dict[str, Any] | None
) -> AdapterSaved:
    """Write, verify and finish the adapter; the run's model is released on the way."""
    trainable_parameters = (
        sum(parameter.numel() for parameter in run.parameters.values())
        if compaction is None
        else compaction.parameters_after
    )
    final = run.job.work_dir / "adapter"
    with unfinished_adapter(run.job.work_dir) as unfinished:
        with explained_as(lambda: "writing the trained adapter"):
            expected = _probe(run)
            sha256 = write_adapter(
                unfinished,
                run.model,
                base_model_name=run.origin.source,
                revision=run.origin.revision,
                compaction=compaction,
            )
        run.release_model()
        with explained_as(lambda: "checking the saved adapter on a fresh base model"):
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
        if result is not None:
            manifest["compaction"] = result
        finish_adapter(unfinished, final, manifest=manifest, card=training_card(manifest))
    return AdapterSaved(
        folder=str(final),
        sha256=sha256,
        trainable_parameters=trainable_parameters,
        max_logit_difference=difference,
    )


def _compact(run: TrainingRun, should_stop: Callable[[], bool], *, max_kl: float) -> Compaction:
    """Cut the run's adapter, weighed on the first rows that training saw.

    All processes do the same on the same rows, and none asks the others whether to stop: what
    they measure may differ in the last bit, and with it the number of their passes. Then all of
    them take the adapter of the first.
    """
    # The rows of all processes, and the same in each.
    sampler = replace(run.sampler, rank=0, num_processes=1)
    epoch = (row for step in range(sampler.steps_per_epoch) for row in sampler.rows_of(step))
    # What training could not hold without checkpointing, evaluation mode cannot either.
    memory_is_short = run.job.training.gradient_checkpointing != "off"
    size = 1 if memory_is_short else min(BATCH_ROWS, run.batch_size)
    rows = ChosenRows(
        list(islice(epoch, CALIBRATION_ROWS)),
        lambda indices: run.stream.on_the_same_thread(indices, rows=run.train_rows),
        size=size,
    )
    alone = run.processes.count == 1
    options: dict[str, Any] = {"should_stop": should_stop} if alone else {}
    calibration = Calibration(run.model, rows, precision=run.job.precision, **options)
    with explained_as(lambda: describe_compaction(size)):
        compaction = compact(calibration, max_kl=max_kl)
    with torch.no_grad():
        for parameter in run.parameters.values() if not alone else ():
            if not run.processes.leads:
                parameter.zero_()
            run.processes.add_up(parameter)
    return compaction


def _evaluated(run: TrainingRun, compaction: Compaction) -> Compacted:
    """Measure the cut adapter on the evaluation rows; its loss becomes the run's."""
    before = run.progress.eval_loss
    if run.eval_indices:
        run.progress.eval_loss = evaluate(run)
    return compaction_report.compacted(
        compaction,
        step=run.progress.step,
        eval_loss_before=before,
        eval_loss_after=run.progress.eval_loss,
    )


def _probe(run: TrainingRun) -> Probe:
    """The trained model's logits on the first training row that is not left out."""
    rows = (run.train_rows.row(index) for index in run.sampler.rows)
    first = next(sequences[0] for sequences in rows if sequences)
    batch = collate([first], pad_token_id=run.train_rows.encoder.pad_token_id)
    return probe(run.model, to_device(batch, run.device).inputs)


def _manifest(run: TrainingRun) -> dict[str, Any]:
    job, progress = run.job, run.progress
    held_out = None if job.eval_dataset is None else run.eval_rows.file.sha256
    retained = None if run.retention_rows is None else run.retention_rows.file.sha256
    return {
        "format": 1,
        "model": job.base_model_name,
        "base_model": {
            "source": run.origin.source,
            "revision": run.origin.revision,
            "model_type": job.plan.model_type,
            "inventory_hash": job.plan.inventory_hash,
            "auto_class": run.origin.auto_class,
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
        "end_of_turn": run.train_rows.encoder.end_of_turn.to_json(),
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
