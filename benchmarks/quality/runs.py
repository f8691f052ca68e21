"""One run: a method on a subject with a learning rate and a seed, as a JSON record."""

import math
import statistics
import tempfile
import time
from typing import Any

import torch
from torch import nn
from torch.utils.data import SequentialSampler
from transformers import Trainer, TrainerCallback, TrainingArguments

from benchmarks.quality.methods import METHODS, WARMUP, Arm
from benchmarks.quality.subject import Subject, num_label_tokens
from grit_core.config.training import TrainingConfig
from grit_core.data.collate import Batch
from grit_core.loss import label_loss_sum
from grit_core.optimizer import GRITOptimizer
from grit_core.schedule import learning_rate

MAX_GRAD_NORM = 1.0


class Curve:
    """What is measured while a method trains."""

    def __init__(self, subject: Subject, *, final: bool) -> None:
        """Measure on the report rows and on what may be forgotten, or for the sweep at the end.

        Args:
            subject: Whose rows.
            final: Whether this run is published or chooses a learning rate.
        """
        self.subject, self.final = subject, final
        self.points: list[dict[str, float]] = []

    def due(self, step: int) -> bool:
        """Tell whether to measure after a step."""
        last = step == self.subject.num_steps
        return last or (self.final and step % self.subject.eval_every == 0)

    def measure(self, model: nn.Module, step: int) -> None:
        """Add a point."""
        subject = self.subject
        rows = subject.report_rows if self.final else subject.selection_rows
        point = {"step": float(step), "loss": subject.loss(model, rows)}
        if self.final:
            point["retention"] = subject.loss(model, subject.retention_rows)
        self.points.append(point)


def run(
    subject: Subject, method_name: str, *, rate: float, seed: int, final: bool
) -> dict[str, Any]:
    """Train once; a run that diverges is a record too."""
    method = METHODS[method_name]
    torch.manual_seed(seed)
    arm = method.build(subject, rate, seed)
    curve = Curve(subject, final=final)
    if final:
        curve.measure(arm.model, 0)
    began = time.perf_counter()
    try:
        seconds, failure = (
            _trainer(arm, curve, rate, seed) if method.trainer else _loop(arm, curve, rate, seed)
        )
    except torch.linalg.LinAlgError as error:  # a decomposition of what has diverged
        seconds, failure = [], f"LinAlgError: {error}"
    last = curve.points[-1]["loss"] if curve.points else math.nan
    if failure is None and not math.isfinite(last):
        failure = f"the evaluation loss is {last} at the end"
    return {
        "subject": subject.name,
        "method": method_name,
        "rate": rate,
        "seed": seed,
        "final": final,
        "extra_passes": method.extra_passes,
        "failure": failure,
        "points": curve.points,
        "loss": math.inf if failure else last,
        "step_seconds": statistics.median(seconds) if seconds else None,
        "seconds": time.perf_counter() - began,
        "parameters": sum(p.numel() for p in arm.parameters),
        "skipped_observations": getattr(arm.optimizer, "skipped_observations", 0),
        "layers": _layers(arm) if final else None,
    }


def _loop(arm: Arm, curve: Curve, rate: float, seed: int) -> tuple[list[float], str | None]:
    """Our loop, which is everyone's but the Trainer's; clip, schedule and order are the same."""
    subject = curve.subject
    training = TrainingConfig(learning_rate=rate, warmup_ratio=WARMUP)
    base_rates = [group["lr"] / rate for group in arm.optimizer.param_groups]
    arm.model.train()
    seconds: list[float] = []
    for step, rows in enumerate(subject.order(seed)):
        batch = subject.batch([subject.train_rows[index] for index in rows])
        now = learning_rate(training, step, total_steps=subject.num_steps)
        for group, share in zip(arm.optimizer.param_groups, base_rates, strict=True):
            group["lr"] = now * share
        began = time.perf_counter()
        if step == 0 and arm.start is not None:
            _start(arm, batch)
        loss = take_step(arm, batch, step)
        seconds.append(time.perf_counter() - began)
        if not math.isfinite(loss):
            return seconds, f"the loss is {loss} at step {step + 1}"
        if curve.due(step + 1):
            curve.measure(arm.model, step + 1)
    return seconds, None


def _start(arm: Arm, batch: Batch) -> None:
    assert arm.start is not None
    for part in (arm.start.sketch_outputs, arm.start.read_inputs):
        (label_loss_sum(arm.model, batch) / num_label_tokens(batch)).backward()
        part()
        arm.optimizer.zero_grad(set_to_none=True)


def take_step(arm: Arm, batch: Batch, step: int) -> float:
    """Train on one batch; a loss that is not finite is returned and changes nothing."""
    num_tokens = num_label_tokens(batch)
    with arm.observing(num_tokens) as sums:
        loss = label_loss_sum(arm.model, batch) / num_tokens
        if not math.isfinite(float(loss.detach())):
            return float(loss.detach())
        whole = loss if arm.penalty is None else loss + arm.penalty()
        whole.backward()
    nn.utils.clip_grad_norm_(arm.parameters, MAX_GRAD_NORM)
    if sums is not None and isinstance(arm.optimizer, GRITOptimizer):
        arm.optimizer.observe(sums)
    arm.optimizer.step()
    if arm.after_step is not None:
        arm.after_step(step)
    arm.optimizer.zero_grad(set_to_none=True)
    return float(loss.detach())


def _trainer(arm: Arm, curve: Curve, rate: float, seed: int) -> tuple[list[float], str | None]:
    """The same training by transformers' Trainer."""
    subject = curve.subject
    order = [index for rows in subject.order(seed) for index in rows]
    clock = _Clock(arm, curve)
    with tempfile.TemporaryDirectory() as folder:
        options = TrainingArguments(
            output_dir=folder,
            max_steps=subject.num_steps,
            per_device_train_batch_size=subject.batch_size,
            learning_rate=rate,
            warmup_steps=math.ceil(WARMUP * subject.num_steps),
            optim="adamw_torch",
            weight_decay=0.0,
            max_grad_norm=MAX_GRAD_NORM,
            lr_scheduler_type="cosine",
            save_strategy="no",
            logging_strategy="no",
            report_to=[],
            use_cpu=True,
            remove_unused_columns=False,
            disable_tqdm=True,
            seed=seed,
        )
        trainer = _OrderedTrainer(
            model=arm.model,
            args=options,
            train_dataset=[subject.train_rows[index] for index in order],  # type: ignore[arg-type]  # any sequence serves
            data_collator=lambda rows: _arguments(subject.batch(rows)),
            callbacks=[clock],
        )
        trainer.train()
    return clock.seconds, None


class _OrderedTrainer(Trainer):
    """Takes the rows as they come."""

    def _get_train_sampler(self, train_dataset: Any = None) -> SequentialSampler:
        return SequentialSampler(train_dataset if train_dataset is not None else self.train_dataset)


class _Clock(TrainerCallback):
    """Times the Trainer's steps and measures between them."""

    def __init__(self, arm: Arm, curve: Curve) -> None:
        self.arm, self.curve = arm, curve
        self.seconds: list[float] = []
        self._began = 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Start the clock."""
        self._began = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Stop it, and measure when due."""
        self.seconds.append(time.perf_counter() - self._began)
        if self.curve.due(state.global_step):
            self.curve.measure(self.arm.model, state.global_step)


def _arguments(batch: Batch) -> dict[str, Any]:
    return {**batch.inputs, "labels": batch.labels}


def _layers(arm: Arm) -> dict[str, Any] | None:
    """What the factors say of every layer at the end."""
    if not isinstance(arm.optimizer, GRITOptimizer):
        return None
    return {
        name: {
            "effective_rank": layer.effective_rank,
            "fisher_energy": layer.fisher_energy,
            "active": layer.active,
            "spectrum": [float(f"{energy:.4g}") for energy in layer.spectrum],
            "modality": arm.optimizer.modality_of(name),
        }
        for name, layer in arm.optimizer.curvature().items()
    }
