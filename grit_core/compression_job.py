"""`CompressionJob`: everything one compression of a finished adapter needs, as plain data.

Loads no torch, like `grit_core.training_job`: the service's worker writes it for its child, and
`python -m grit_core compress` builds it from the command line.
"""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from grit_core.config.bounds import Number, check_fields
from grit_core.config.model_configs import ModelGRITConfig, config_from_dict, config_to_dict
from grit_core.config.training import TRAINING_CHECKS
from grit_core.errors import Fault
from grit_core.plan import AdaptationPlan

DEFAULT_MAX_KL: Final = 1e-5
"""Nats for a label token."""

DEFAULT_NUM_ROWS: Final = 256

COMPRESSION_CHECKS: Final = {
    "max_kl": Number(low=0, high=10, above_low=True),
    "num_rows": Number(low=1, high=65_536, integer=True),
    "batch_size": Number(low=1, high=4096, integer=True),
    "max_length": TRAINING_CHECKS["max_length"],
    "seed": TRAINING_CHECKS["seed"],
}
"""The rule of every field that a caller may choose."""


@dataclass(frozen=True, kw_only=True)
class CompressionJob:
    """One compression. With equal values the CPU gives equal bytes."""

    model: str
    """Where the base model lies: a local folder or a hub id."""

    model_name: str | None
    """What the user calls the base model; written into `grit.json`. `None` means `model`."""

    adapter: Path
    """A PEFT folder with a LoRA adapter of that model, in safetensors."""

    dataset: Path
    """Chat rows like those that the adapter was trained on."""

    work_dir: Path
    """Receives `adapter/`."""

    plan: AdaptationPlan | None = None
    """What the adapter was trained by, for its manifest; `None` when nobody knows."""

    config: ModelGRITConfig | None = None
    """The configuration that the plan was made from, likewise."""

    max_kl: float = DEFAULT_MAX_KL
    """Bound on the divergence of the cut adapter from the whole one, in nats for a label token."""

    num_rows: int = DEFAULT_NUM_ROWS
    """Most rows of `dataset` that the divergence is predicted and measured on."""

    eval_dataset: Path | None = None
    """Rows to evaluate on; `None` holds some of `dataset` out, those that training held out when
    the adapter's manifest names this very dataset."""

    batch_size: int = 8
    """Rows in one forward pass of the evaluation."""

    max_length: int = 2048
    """Tokens of one row, image tokens included; longer rows are left out."""

    device: str = "cpu"
    precision: str = "float32"
    """As in `TrainingJob`."""

    seed: int = 0
    """Chooses the rows."""

    num_threads: int | None = None
    """CPU threads of torch. `None` takes torch's default; the number used is recorded."""

    @property
    def base_model_name(self) -> str:
        """The name that `grit.json` records for the base model."""
        return self.model_name or self.model


def validate(job: CompressionJob, *, pointer: str = "") -> list[Fault]:
    """Every fault of the numbers, in field order."""
    return check_fields(job, COMPRESSION_CHECKS, pointer=pointer)


def compression_job_to_json(job: CompressionJob) -> dict[str, Any]:
    """The job as JSON values, such that `compression_job_from_json` gives it back."""
    values = {item.name: getattr(job, item.name) for item in dataclasses.fields(job)}
    values["plan"] = None if job.plan is None else job.plan.to_json()
    values["config"] = None if job.config is None else config_to_dict(job.config)
    for name in ("adapter", "dataset", "work_dir", "eval_dataset"):
        values[name] = None if values[name] is None else str(values[name])
    return values


def compression_job_from_json(data: Mapping[str, Any] | str) -> CompressionJob:
    """Build a job from `compression_job_to_json`'s values, or from their JSON text."""
    values: dict[str, Any] = json.loads(data) if isinstance(data, str) else dict(data)
    plan, config = values["plan"], values["config"]
    values["plan"] = None if plan is None else AdaptationPlan.from_json(plan)
    values["config"] = None if config is None else config_from_dict(config)
    for name in ("adapter", "dataset", "work_dir", "eval_dataset"):
        values[name] = None if values[name] is None else Path(values[name])
    return CompressionJob(**values)
