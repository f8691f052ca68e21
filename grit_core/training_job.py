"""`TrainingJob`: everything one training run needs, as plain data that fits on one line of JSON.

Loads no torch: the service's worker writes it for its child, `python -m grit_core train` builds it
from the command line, and both hand it to the same `grit_core.training.train`.
"""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grit_core.config.model_configs import ModelGRITConfig, config_from_dict, config_to_dict
from grit_core.config.training import TrainingConfig
from grit_core.plan import AdaptationPlan


@dataclass(frozen=True, kw_only=True)
class TrainingJob:
    """One fine-tuning run. With equal values the CPU gives equal bytes."""

    model: str
    """Where the base model lies: a local folder or a hub id."""

    plan: AdaptationPlan
    """Exactly which layers adapt; the trainer refuses a model whose inventory is another."""

    config: ModelGRITConfig
    """The resolved configuration that the plan was made from."""

    training: TrainingConfig
    """Resolved: no `auto` is left. Its `precision` becomes that of the job where that is `auto`."""

    dataset: Path
    """Chat rows, one JSON object a line, images as data URLs or as paths beside the file."""

    work_dir: Path
    """Receives `checkpoints/step-N/` and `adapter/`."""

    eval_dataset: Path | None = None
    """Rows to evaluate on; when set, `eval_fraction` takes nothing from `dataset`."""

    eval_fraction: float = 0.0
    """Share of `dataset` held out for evaluation, between 0 and 1, chosen by the seed."""

    retention_dataset: Path | None = None
    """Rows of what the base model can do already: their loss is measured before the first step and
    after the last, and never trained on."""

    dataset_name: str | None = None
    """What the user calls the file of `dataset`, for messages; `None` means the file's own name."""

    eval_dataset_name: str | None = None
    retention_dataset_name: str | None = None

    device: str = "cpu"
    """`cpu`, `cuda`, `cuda:1` or `mps`."""

    precision: str = "float32"
    """`float32`, `bfloat16` or `float16`: the type of the frozen weights and of autocast. `auto` is
    decided on the device: see `grit_core.job_precision`."""

    model_name: str | None = None
    """What the user calls the base model; written into `grit.json`. `None` means `model`."""

    num_threads: int | None = None
    """CPU threads of torch. `None` takes torch's default; the number used is recorded."""

    @property
    def base_model_name(self) -> str:
        """The name that `grit.json` records for the base model."""
        return self.model_name or self.model


def job_to_json(job: TrainingJob) -> dict[str, Any]:
    """The job as JSON values, such that `job_from_json` gives it back."""
    return {
        "model": job.model,
        "model_name": job.model_name,
        "plan": job.plan.to_json(),
        "config": config_to_dict(job.config),
        "training": dataclasses.asdict(job.training),
        "dataset": str(job.dataset),
        "eval_dataset": None if job.eval_dataset is None else str(job.eval_dataset),
        "eval_fraction": job.eval_fraction,
        "retention_dataset": None if job.retention_dataset is None else str(job.retention_dataset),
        "dataset_name": job.dataset_name,
        "eval_dataset_name": job.eval_dataset_name,
        "retention_dataset_name": job.retention_dataset_name,
        "device": job.device,
        "precision": job.precision,
        "work_dir": str(job.work_dir),
        "num_threads": job.num_threads,
    }


def job_from_json(data: Mapping[str, Any] | str) -> TrainingJob:
    """Build a job from `job_to_json`'s values, or from their JSON text."""
    values: dict[str, Any] = json.loads(data) if isinstance(data, str) else dict(data)
    eval_dataset, retention = values["eval_dataset"], values["retention_dataset"]
    return TrainingJob(
        model=values["model"],
        model_name=values["model_name"],
        plan=AdaptationPlan.from_json(values["plan"]),
        config=config_from_dict(values["config"]),
        training=TrainingConfig(**values["training"]),
        dataset=Path(values["dataset"]),
        eval_dataset=None if eval_dataset is None else Path(eval_dataset),
        eval_fraction=values["eval_fraction"],
        retention_dataset=None if retention is None else Path(retention),
        # Orders written before there were names have none.
        dataset_name=values.get("dataset_name"),
        eval_dataset_name=values.get("eval_dataset_name"),
        retention_dataset_name=values.get("retention_dataset_name"),
        device=values["device"],
        precision=values["precision"],
        work_dir=Path(values["work_dir"]),
        num_threads=values["num_threads"],
    )
