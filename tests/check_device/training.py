"""Training on the device: every step rule, resuming, export, half precision, losses of the CPU."""

import dataclasses
import json
import math
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any, Final

import torch
from torch import Tensor

from grit_core.checkpoints import load_checkpoint
from grit_core.config.devices import training_precision
from grit_core.config.model_configs import ModalityConfig, ModelGRITConfig
from grit_core.events import (
    AdapterSaved,
    Reprojected,
    StepCompleted,
    StepSkipped,
    TrainingEvent,
    TrainingFinished,
)
from grit_core.training import _step, train
from grit_core.training_job import TrainingJob
from grit_core.training_run import TrainingRun
from tests.check_device.check import Bench, Figures, check, require
from tests.grit_core.training_jobs import VLM_CONFIG, tiny_job, with_dropout

STEPS: Final = 6
RESUMED_AT: Final = 4

MAX_DRIFT: Final = 0.02
"""Largest difference of a resumed adapter, as a share of what the resumed steps moved.

Kernels of a card may sum in another order each time. With each gradient off by a rounding of its
format the difference is 0.001 at most (bfloat16, AdamW, measured on the CPU); with other dropout or
lost moments it is about 1."""

LOSS_TOLERANCES: Final = {
    "float32": (2e-3, 2e-2),
    "bfloat16": (3e-2, 1e-1),
    "float16": (1e-2, 5e-2),
}
"""Largest relative difference of a loss from the CPU's in float32: at the first step, and later.

The first is rounding (convolutions of CUDA round float32 to 10 bits by default); each step makes it
larger, because Adam's division lifts small gradients to the size of large ones."""

SCALE: Final = 2.0**24
"""A loss scale at which the tiny model's float16 gradients overflow."""


def method_config(**changes: Any) -> ModelGRITConfig:
    """Whole factors and a budget that moves, so that each part of the method has work."""
    settings: dict[str, Any] = {
        "projection_budget_start": 20,
        "projection_budget_end": 12,
        "projection_update_freq": 3,
    }
    modalities = {"vision": _modality(VLM_CONFIG.vision), "text": _modality(VLM_CONFIG.text)}
    return dataclasses.replace(VLM_CONFIG, **(modalities | settings | changes))


def _modality(found: ModalityConfig | None, **changes: Any) -> ModalityConfig | None:
    return found and dataclasses.replace(found, **({"fisher_approximation": "kfac"} | changes))


def plain_config() -> ModelGRITConfig:
    """The text layers have neither a natural gradient nor a projection."""
    plain = {"enable_natural_gradient": False, "enable_projection": False}
    return method_config(text=_modality(VLM_CONFIG.text, **plain))


def job_on(
    bench: Bench, work: str, *, config: ModelGRITConfig, precision: str = "", **training: Any
) -> TrainingJob:
    """Return a job of a few steps on the bench's device, in the precision that is chosen there."""
    job = tiny_job(
        bench.folder,
        config=config,
        work=work,
        **{"max_steps": STEPS, "checkpoint_every_steps": 2, **training},
    )
    chosen = precision or training_precision(bench.device)
    return dataclasses.replace(job, device=bench.device, precision=chosen)


def train_and_resume(bench: Bench, config: ModelGRITConfig, **training: Any) -> Figures:
    """Train, resume from a checkpoint in the middle, and compare both ends.

    A `Fault` says what differs.
    """
    whole = job_on(bench, "whole", config=config, **training)
    events = list(train(whole))
    losses = [event.train_loss for event in events if isinstance(event, StepCompleted)]
    require(all(map(math.isfinite, losses)), f"The losses are not finite: {losses}.")
    require(isinstance(events[-1], TrainingFinished), f"The last event is {events[-1]}.")
    require(any(isinstance(event, AdapterSaved) for event in events), "No adapter was saved.")
    resumed = dataclasses.replace(whole, work_dir=bench.folder / "resumed")
    steps = whole.work_dir / "checkpoints"
    middle = whole.training.max_steps or STEPS
    torch.manual_seed(12345)  # what a new process would not have
    list(train(resumed, resume_from=steps / f"step-{middle - 2}"))
    start, end = (_adapter(whole, step) for step in (middle - 2, middle))
    drift = _distance(_adapter(resumed, middle), end) / _distance(start, end)
    equal = _adapter_bytes(resumed) == _adapter_bytes(whole)
    if bench.kind == "cpu":
        require(equal, "The resumed adapter has other bytes; on the CPU they are equal.")
    require(
        drift <= MAX_DRIFT,
        f"The resumed adapter differs by {drift:.3g} of what its steps moved; at most"
        f" {MAX_DRIFT} is rounding.",
    )
    manifest = json.loads((whole.work_dir / "adapter" / "grit.json").read_text())
    return {
        "precision": whole.precision,
        "last loss": round(losses[-1], 4),
        "same bytes when resumed": "yes" if equal else "no",
        "drift when resumed": f"{drift:.2g}",
        "reprojections": sum(isinstance(event, Reprojected) for event in events),
        "logits of the export off by": f"{manifest['max_logit_difference']:.2g}",
    }


def _adapter(job: TrainingJob, step: int) -> Mapping[str, Tensor]:
    return load_checkpoint(job.work_dir / "checkpoints" / f"step-{step}").tensors["adapter"]


def _adapter_bytes(job: TrainingJob) -> bytes:
    return (job.work_dir / "adapter" / "adapter_model.safetensors").read_bytes()


def _distance(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float:
    squares = [float((one[name].double() - other[name].double()).pow(2).sum()) for name in one]
    return math.sqrt(sum(squares))


@check("trains in the chosen precision, resumes to the same adapter, exports", in_short=True)
def training(bench: Bench) -> Figures:
    return train_and_resume(bench, method_config())


@check("a modality with neither natural gradient nor projection resumes", in_short=True)
def plain_modality(bench: Bench) -> Figures:
    return train_and_resume(bench, plain_config())


_VARIANTS: Final[dict[str, tuple[dict[str, Any], dict[str, Any]]]] = {
    "step rule kfac": ({"step_rule": "kfac"}, {}),
    "step rule gauge": ({"step_rule": "gauge"}, {}),
    "step rule paper": ({"step_rule": "paper"}, {}),
    "adamw": ({}, {"optimizer": "adamw"}),
    "random start": ({"initialization": "kaiming"}, {}),
    "no dropout": ({"global_dropout": 0.0}, {}),
    "checkpointing": ({}, {"gradient_checkpointing": "non_reentrant"}),
    "reentrant checkpointing": ({}, {"gradient_checkpointing": "reentrant"}),
    "compaction": (
        {},
        {"compaction_max_kl": 1e-3, "max_steps": 8, "learning_rate": 2e-2, "eval_fraction": 0.2},
    ),
}
"""Changes of the configuration and of the training settings."""


def train_variant(bench: Bench, name: str) -> Figures:
    """Train one of the variants."""
    config, settings = _VARIANTS[name]
    return train_and_resume(bench, method_config(**config), **settings)


for _name in _VARIANTS:
    check(f"trains, resumes and exports: {_name}", name=_name.replace(" ", "-"))(
        partial(train_variant, name=_name)
    )


@check("losses are the CPU's, within rounding", in_short=True)
def losses(bench: Bench) -> Figures:
    expected = _losses(dataclasses.replace(_exact_job(bench, "host", "float32"), device="cpu"))
    precisions = dict.fromkeys(("float32", training_precision(bench.device)))
    figures: dict[str, str | int | float] = {}
    for precision in precisions:
        found = _losses(_exact_job(bench, precision, precision))
        first, later = LOSS_TOLERANCES[precision]
        differences = [abs(a - b) / b for a, b in zip(found, expected, strict=True)]
        figures[f"{precision}, first step"] = f"{differences[0]:.2g}"
        figures[f"{precision}, later"] = f"{max(differences[1:]):.2g}"
        require(
            differences[0] <= first and max(differences[1:]) <= later,
            f"In {precision} the losses {found} differ from the CPU's {expected} by"
            f" {differences[0]:.2g} at the first step (at most {first:g}) and by"
            f" {max(differences[1:]):.2g} later (at most {later:g}).",
        )
    return figures


def _exact_job(bench: Bench, work: str, precision: str) -> TrainingJob:
    """Without dropout: each device draws its own."""
    config = with_dropout(method_config(), 0.0)
    return job_on(bench, work, config=config, precision=precision)


def _losses(job: TrainingJob) -> list[float]:
    return [event.train_loss for event in train(job) if isinstance(event, StepCompleted)]


@check("float16 from a loss scale of 2**24: overflowing steps are dropped, later ones are finite")
def float16(bench: Bench) -> Figures:
    job = job_on(bench, "half", config=method_config(), precision="float16", max_steps=40)
    run = TrainingRun(job, num_threads=1)
    try:
        run.scaler = torch.amp.GradScaler(run.device.type, init_scale=SCALE)
        run.progress.initialized = True  # a start from the gradient would lower the scale first
        events = [event for _ in range(20) for event in _step_events(run)]
        finite = all(bool(torch.isfinite(p).all()) for p in run.parameters.values())
        scale = run.loss_scale
    finally:
        run.close()
    dropped = [event.step for event in events if isinstance(event, StepSkipped)]
    done = [event for event in events if isinstance(event, StepCompleted)]
    require(bool(dropped), f"No step overflowed at a loss scale of {SCALE:g}.")
    require(bool(done), f"Every step overflowed; the loss scale is {scale:g}.")
    require(finite, "The adapter is not finite.")
    require(
        max(dropped) < min(event.step for event in done) + 3,
        f"Steps {dropped} overflowed, long after the scale had come down.",
    )
    return {"dropped": len(dropped), "applied": len(done), "loss scale at the end": scale}


def _step_events(run: TrainingRun) -> Iterator[TrainingEvent]:
    yield from _step(run, 0.0)
