"""`compress`: cut a finished adapter's weakest directions, as a generator of events."""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from peft import PeftModel

from grit_core import compaction_report
from grit_core.adapter_card import compression_card
from grit_core.adapter_manifest import MANIFEST
from grit_core.artifacts import (
    WEIGHTS,
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
from grit_core.compression_job import CompressionJob, validate
from grit_core.config.model_configs import config_to_dict
from grit_core.data.encoder import ChatEncoder
from grit_core.data.rows import EncodedRows
from grit_core.device_memory import release_unused
from grit_core.errors import Fault, Interrupted, InvalidConfig, InvalidDataset
from grit_core.events import (
    AdapterSaved,
    Compacted,
    TrainingEvent,
    TrainingFinished,
    TrainingStarted,
    TrainingStopped,
)
from grit_core.job_precision import resolve_precision
from grit_core.memory_demand import describe_compaction, explained_as
from grit_core.models.inventory import inventory_of
from grit_core.models.lora_folder import load_lora_folder
from grit_core.models.pretrained import describe_origin, load_base_model, load_processor
from grit_core.models.torch_device import torch_device
from grit_core.random_state import reproducible
from grit_core.row_file import RowFile
from grit_core.sampler import Sampler, split_rows

HELD_OUT_SHARE: Final = 0.1
"""Of the dataset, for the evaluation, where training has held nothing out of it."""

MAX_HELD_OUT_ROWS: Final = 512


def compress(
    job: CompressionJob, *, should_stop: Callable[[], bool] = lambda: False
) -> Iterator[TrainingEvent]:
    """Compress an adapter and yield what happens as it happens.

    Writes `work_dir/adapter/`. The events are `TrainingStarted` (of 0 steps), `Compacted`, perhaps
    `Warned`, `AdapterSaved` and `TrainingFinished`; asked to stop, it ends with `TrainingStopped`
    and leaves nothing.

    Errors: `InvalidConfig` (a number out of bounds), `ModelUnavailable`, `PlanMismatch`,
    `DeviceUnavailable`, `InvalidDataset`, `AdapterInvalid` (not a LoRA adapter of this model, or
    one whose exported form does not give the same logits).

    Args:
        job: What to compress, and how far.
        should_stop: Asked every few rows.
    """
    _refuse_faults(job)
    device = torch_device(job.device)
    precision = resolve_precision(job.precision, model=job.model, device=job.device)
    job = replace(job, precision=precision)
    with reproducible(device, num_threads=job.num_threads) as num_threads:
        try:
            yield from _compress(job, should_stop, num_threads=num_threads)
        except Interrupted as asked:
            yield TrainingStopped(step=0, reason=str(asked))


@dataclass(frozen=True, kw_only=True)
class _Rows:
    """Which rows are for what."""

    calibration: EncodedRows
    calibration_indices: tuple[int, ...]
    evaluation: EncodedRows
    evaluation_indices: tuple[int, ...]

    def of_calibration(self) -> ChosenRows:
        """The rows that the directions are weighed on."""
        return _chosen(self.calibration, self.calibration_indices, size=BATCH_ROWS)

    def of_evaluation(self, *, batch_size: int) -> ChosenRows:
        """The rows that the loss is measured on."""
        return _chosen(self.evaluation, self.evaluation_indices, size=batch_size)


def _compress(
    job: CompressionJob, should_stop: Callable[[], bool], *, num_threads: int
) -> Iterator[TrainingEvent]:
    device = torch_device(job.device)
    base = load_base_model(job.model, device=device, dtype=job.precision)
    inventory = inventory_of(base)
    if job.plan is not None:
        job.plan.check_model(inventory.hash)
    parent = _parent_manifest(job.adapter)
    origin = describe_origin(job.model, base)
    about_base = {
        "source": origin.source,
        "revision": origin.revision,
        "model_type": inventory.model_type,
        "inventory_hash": inventory.hash,
        "auto_class": origin.auto_class,
    }
    model = load_lora_folder(base, job.adapter)
    del base  # or it would outlive the model below
    rows = _open_rows(job, parent)
    yield TrainingStarted(
        total_steps=0,
        start_step=0,
        device=job.device,
        precision=job.precision,
        num_rows=len(rows.calibration_indices),
        num_eval_rows=len(rows.evaluation_indices),
    )
    compaction, compacted = _cut(job, model, rows, should_stop)
    yield compacted
    yield from compaction_report.warnings_of(compaction, compacted)
    final = job.work_dir / "adapter"
    with unfinished_adapter(job.work_dir) as unfinished:
        with explained_as(lambda: "writing the compressed adapter"):
            expected = _probe(model, rows)
            sha256 = write_adapter(
                unfinished,
                model,
                base_model_name=origin.source,
                revision=origin.revision,
                compaction=compaction,
            )
        del model
        release_unused(device)
        with explained_as(lambda: "checking the compressed adapter on a fresh base model"):
            difference = verify_adapter(
                unfinished,
                source=job.model,
                device=device,
                precision=job.precision,
                expected=expected,
            )
        result = compaction_report.result_of(compacted)
        manifest = _manifest(job, parent, rows) | {
            "model": job.base_model_name,
            "base_model": about_base,
            "num_threads": num_threads,
            "adapter_sha256": sha256,
            "max_logit_difference": difference,
            "trainable_parameters": compaction.parameters_after,
            "compaction": result,
        }
        finish_adapter(unfinished, final, manifest=manifest, card=compression_card(manifest))
    yield AdapterSaved(
        folder=str(final),
        sha256=sha256,
        trainable_parameters=compaction.parameters_after,
        max_logit_difference=difference,
    )
    yield TrainingFinished(
        step=0, train_loss=0.0, eval_loss=compacted.eval_loss_after, compaction=result
    )


def _refuse_faults(job: CompressionJob) -> None:
    """Refuse what can be told without the model.

    Raises:
        InvalidConfig: With every fault.
    """
    faults = validate(job)
    if job.adapter.resolve() == (job.work_dir / "adapter").resolve():
        faults.append(
            Fault(
                pointer="/work_dir",
                code="would_overwrite",
                detail=f"The compressed adapter would be written over {job.adapter}, which it is"
                " made from; give another folder.",
            )
        )
    if faults:
        raise InvalidConfig(faults)


def _cut(
    job: CompressionJob, model: PeftModel, rows: _Rows, should_stop: Callable[[], bool]
) -> tuple[Compaction, Compacted]:
    """Cut the adapter, and measure it before and after.

    Raises:
        InvalidDataset: No row can be used.
    """
    calibration = Calibration(
        model, rows.of_calibration(), precision=job.precision, should_stop=should_stop
    )
    if calibration.num_label_tokens == 0:
        raise InvalidDataset(
            f"{job.dataset.name}: all {len(rows.calibration_indices)} chosen rows are longer than"
            f" max_length ({job.max_length} tokens); raise max_length."
        )
    evaluation = Calibration(
        model,
        rows.of_evaluation(batch_size=job.batch_size),
        precision=job.precision,
        should_stop=should_stop,
    )
    measured = evaluation.num_label_tokens > 0
    with explained_as(lambda: f"measuring the loss on {job.batch_size} rows at a time"):
        before = evaluation.loss() if measured else None
    with explained_as(lambda: describe_compaction(BATCH_ROWS)):
        compaction = compact(calibration, max_kl=job.max_kl)
    with explained_as(lambda: f"measuring the loss on {job.batch_size} rows at a time"):
        after = evaluation.loss() if measured else None
    return compaction, compaction_report.compacted(
        compaction, step=0, eval_loss_before=before, eval_loss_after=after
    )


def _open_rows(job: CompressionJob, parent: Mapping[str, Any]) -> _Rows:
    """Choose rows to weigh the directions on, and others to evaluate on."""
    encoder = ChatEncoder(load_processor(job.model))

    def encoded(path: Path) -> EncodedRows:
        return EncodedRows(RowFile(path), encoder, max_length=job.max_length, on_long_rows="skip")

    rows = encoded(job.dataset)
    num_rows = len(rows.file)
    if job.eval_dataset is not None:
        evaluation = encoded(job.eval_dataset)
        free: Sequence[int] = range(num_rows)
        held_out: Sequence[int] = range(len(evaluation.file))
    else:
        evaluation = rows
        fraction, seed = _training_split(parent, sha256=rows.file.sha256)
        free, held_out = split_rows(num_rows, eval_fraction=fraction, seed=seed)
        if not held_out:
            share = min(HELD_OUT_SHARE, MAX_HELD_OUT_ROWS / num_rows)
            free, held_out = split_rows(num_rows, eval_fraction=share, seed=job.seed)
    shuffled = Sampler(rows=free, rows_per_step=len(free), seed=job.seed).rows_of(0)
    return _Rows(
        calibration=rows,
        calibration_indices=tuple(shuffled[: job.num_rows]),
        evaluation=evaluation,
        evaluation_indices=tuple(held_out),
    )


def _training_split(parent: Mapping[str, Any], *, sha256: str) -> tuple[float, int]:
    """Which share training held out of this very dataset, and by which seed; 0 if none is known."""
    dataset, training = parent.get("dataset"), parent.get("training")
    if not isinstance(dataset, dict) or not isinstance(training, dict):
        return 0.0, 0
    if dataset.get("sha256") != sha256:
        return 0.0, 0
    fraction, seed = dataset.get("eval_fraction"), training.get("seed")
    if not isinstance(fraction, float) or not isinstance(seed, int):
        return 0.0, 0
    return (fraction, seed) if 0 < fraction < 1 and seed >= 0 else (0.0, 0)


def _chosen(rows: EncodedRows, indices: tuple[int, ...], *, size: int) -> ChosenRows:
    return ChosenRows(
        indices, lambda chosen: rows.step_rows(chosen, batch_size=len(chosen)), size=size
    )


def _probe(model: PeftModel, rows: _Rows) -> Probe:
    """The cut model's logits on the first calibration row that is not left out."""
    first = next(iter(_chosen(rows.calibration, rows.calibration_indices, size=1)))
    device = next(model.parameters()).device
    return probe(model, {name: tensor.to(device) for name, tensor in first.inputs.items()})


def _parent_manifest(folder: Path) -> dict[str, Any]:
    """The `grit.json` of the adapter; empty when it has none that can be read."""
    try:
        manifest = json.loads((folder / MANIFEST).read_bytes())
    except (OSError, ValueError):
        return {}
    return manifest if isinstance(manifest, dict) else {}


def _manifest(job: CompressionJob, parent: Mapping[str, Any], rows: _Rows) -> dict[str, Any]:
    """How the adapter was trained, as far as that is known, and how it was cut."""
    known = {name: parent[name] for name in ("dataset", "end_of_turn", "metrics") if name in parent}
    plan = parent.get("plan") if job.plan is None else job.plan.to_json()
    config = parent.get("config") if job.config is None else config_to_dict(job.config)
    weights = (job.adapter / WEIGHTS).read_bytes()
    return {
        **known,
        "format": 1,
        "parent_adapter_sha256": hashlib.sha256(weights).hexdigest(),
        "plan": plan,
        "config": config,
        "training": parent.get("training", {}),
        "calibration": {
            "dataset_sha256": rows.calibration.file.sha256,
            "num_rows": len(rows.calibration_indices),
            "eval_dataset_sha256": rows.evaluation.file.sha256,
            "num_eval_rows": len(rows.evaluation_indices),
            "max_length": job.max_length,
            "seed": job.seed,
        },
        "device": job.device,
        "precision": job.precision,
        "versions": versions(),
    }
