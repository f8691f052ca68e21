"""One training run put together: model, adapter, optimizer and rows, fresh or from a checkpoint."""

import hashlib
import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor, nn

from grit_core.checkpoints import Checkpoint, flatten_state, join_state
from grit_core.config.training import total_steps
from grit_core.curvature.initialization import GradientInitialization
from grit_core.data.encoder import IGNORED
from grit_core.data.rows import StepRows
from grit_core.data.stream import StepStream
from grit_core.device_memory import release_unused
from grit_core.durable_files import canonical_json
from grit_core.errors import CheckpointCorrupt, InvalidDataset
from grit_core.events import CurvatureObserved, Reprojected, StepSkipped, TrainingEvent, Warned
from grit_core.loss import label_loss_sum
from grit_core.models.gradient_checkpointing import enable_gradient_checkpointing
from grit_core.models.pretrained import (
    DTYPES,
    describe_origin,
    known_warnings_ignored,
    load_base_model,
)
from grit_core.models.torch_device import torch_device
from grit_core.models.vlm_adapter import build_capture, build_optimizer, inject_lora
from grit_core.optimizer import GRITOptimizer, budgets_by_modality, summarise_by_modality
from grit_core.processes import Processes
from grit_core.random_state import (
    random_tensors_of,
    random_tensors_of_all,
    random_values,
    restore_random,
    seed_everything,
)
from grit_core.sampler import Sampler
from grit_core.training_job import TrainingJob
from grit_core.training_rows import TrainingRows, open_rows
from grit_core.transfer import all_to_host

if TYPE_CHECKING:
    from grit_core.curvature.capture import LayerSums


MAX_NAMED_LINES: Final = 64
"""Rows of a step that an error names by their lines."""


@dataclass(kw_only=True)
class Progress:
    """Where a run stands; saved with every checkpoint."""

    initialized: bool = False
    """Whether the adapter has its start."""
    step: int = 0
    """Optimizer steps done, skipped ones included."""
    overflowed_steps: int = 0
    """Of these, how many were dropped because a float16 gradient overflowed."""
    train_loss: float | None = None
    eval_loss: float | None = None
    evaluated_at_step: int | None = None
    best_eval_loss: float | None = None
    evaluations_without_gain: int = 0
    retention_loss_before: float | None = None
    """Of the base model; measured by the first attempt alone."""
    retention_loss_after: float | None = None


class TrainingRun:
    """Everything that the training loop works on."""

    def __init__(
        self,
        job: TrainingJob,
        *,
        num_threads: int,
        rows: TrainingRows | None = None,
        checked: str | None = None,
    ) -> None:
        """Load the base model and inject the plan's adapter.

        A model whose layers are not those of the plan is refused with `PlanMismatch`.

        Args:
            job: What to train.
            num_threads: Recorded with every checkpoint.
            rows: Those of the job; opened here when they are not given.
            checked: The digest of the rows, if all of them were checked.
        """
        self.job = job
        self.num_threads = num_threads
        self.processes = Processes.current()
        self.device = torch_device(job.device)
        self.progress = Progress()
        self.saved_at_step: int | None = None
        self.checked = checked
        base = load_base_model(job.model, device=self.device, dtype=job.precision)
        self.origin = describe_origin(job.model, base)
        seed_everything(job.training.seed, rank=self.processes.rank)
        with known_warnings_ignored():
            self.model = inject_lora(base, job.plan, seed=job.training.seed)
        if job.training.gradient_checkpointing != "off":
            enable_gradient_checkpointing(
                self.model.get_base_model(), kind=job.training.gradient_checkpointing
            )
        self.parameters = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        self._take_rows(rows or open_rows(job))
        self.optimizer = self._build_optimizer()
        self._capture = build_capture(self.model, job.plan)
        self._sums: dict[str, LayerSums] | None = None
        """What the present step's observation has seen, until the optimizer takes it in."""
        self._refused = 0
        """Layers whose observation of the present step was not finite."""
        scaling = job.precision == "float16"
        self.scaler = torch.amp.GradScaler(self.device.type) if scaling else None
        self.model.train()

    def _take_rows(self, rows: TrainingRows) -> None:
        training = self.job.training
        self.train_rows, self.eval_rows = rows.train, rows.evaluation
        self.eval_indices = rows.eval_indices
        self.retention_rows, self.retention_indices = rows.retention, rows.retention_indices
        self.batch_size = int(training.batch_size)
        self.sampler = Sampler(
            rows=rows.train_indices,
            rows_per_step=self.batch_size * training.gradient_accumulation_steps,
            seed=training.seed,
            rank=self.processes.rank,
            num_processes=self.processes.count,
        )
        self.total_steps = total_steps(training, num_rows=len(rows.train_indices))
        self.stream = StepStream(
            self.train_rows, self.sampler, batch_size=self.batch_size, device=self.device
        )

    def rows_of(self, step: int) -> StepRows:
        """This process's rows of a step (from 0), with the counts of all processes."""
        rows = self.stream.rows_of(step, last=step + 1 == self.total_steps)
        if self.processes.count == 1:
            return rows
        counts = torch.tensor([rows.num_label_tokens, rows.num_tokens])
        found = torch.stack(self.processes.gather(counts))
        return replace(
            rows, num_label_tokens=int(found[:, 0].sum()), num_tokens=int(found[:, 1].sum())
        )

    def initialize(self, rows: StepRows) -> Iterator[TrainingEvent]:
        """Start the adapter from the gradient of a step's rows, once, where the config asks for it.

        Two backward passes; the model computes the base model's function before and after.
        """
        if self.progress.initialized:
            return
        self.progress.initialized = True
        if self.job.config.initialization != "gradient" or not isinstance(
            self.optimizer, GRITOptimizer
        ):
            return
        start = GradientInitialization(self.optimizer.layers)
        self._leave_gradients(rows)
        start.sketch_outputs()
        self.optimizer.zero_grad(set_to_none=True)
        self._leave_gradients(rows)
        done = start.read_inputs()
        self.optimizer.zero_grad(set_to_none=True)
        left = [
            layer.name
            for layer in self.optimizer.layers
            if layer.natural_gradient and layer.name not in done
        ]
        if left:
            yield Warned(
                code="random_start",
                message=f"{len(left)} layers start from a random A: the first step shows no finite"
                f" gradient of theirs or their rank is above their width: {', '.join(left[:5])}.",
            )

    def _leave_gradients(self, rows: StepRows) -> None:
        """Leave a step's gradients; in float16 the loss scale falls until they are finite."""
        self.forward_backward(rows, observe=False)
        if self.scaler is None:
            return
        while self.overflowed(float(self.unscaled_grad_norm())):
            self.forward_backward(rows, observe=False)
        self.scaler.update()

    def forward_backward(self, rows: StepRows, *, observe: bool = True) -> Tensor:
        """Leave the gradient of the step's mean loss over all its label tokens.

        Loss and gradient are those of all processes. With a gradient scaler the gradients are
        scaled until `unscaled_grad_norm`.

        Returns:
            The loss summed over the label tokens, on the device: the host need not wait for it yet.
        """
        total = torch.zeros((), device=self.device)
        own = sum(int((batch.labels[:, 1:] != IGNORED).sum()) for batch in rows.batches)
        with self._observing(rows, num_label_tokens=own, wanted=observe):
            for batch in rows.batches:
                with self.autocast(), self._lines_named():
                    loss = label_loss_sum(self.model, batch, device=self.device)
                # One division for the whole step, so that micro-batches of unequal length add up.
                mean = loss / rows.num_label_tokens
                torch.autograd.backward(mean if self.scaler is None else self.scaler.scale(mean))
                total += loss.detach()
        return self.processes.add_up_gradients(list(self.parameters.values()), total)

    @contextmanager
    def _lines_named(self) -> Iterator[None]:
        """Name the lines of this process's step where the model refuses its rows.

        Raises:
            InvalidDataset: It does.
        """
        try:
            yield
        except InvalidDataset as error:
            step, file = self.progress.step, self.train_rows.file  # the step counts from 1 here
            lines = sorted(file.record(index).line for index in self.sampler.rows_of(step - 1))
            shown = ", ".join(str(line) for line in lines[:MAX_NAMED_LINES])
            more = (
                f" and {len(lines) - MAX_NAMED_LINES} more" if len(lines) > MAX_NAMED_LINES else ""
            )
            raise InvalidDataset(
                f"{file.path.name}, step {step}, among lines {shown}{more}: {error}"
            ) from error

    @property
    def loss_scale(self) -> float:
        """What the loss is multiplied by before it goes backward; 1 but in float16."""
        return 1.0 if self.scaler is None else self.scaler.get_scale()

    def unscaled_grad_norm(self) -> Tensor:
        """Unscale and clip the gradients; return their norm before clipping, on the device."""
        if self.scaler is not None:
            self.scaler.unscale_(self.optimizer)
        limit = self.job.training.max_grad_norm or math.inf
        return nn.utils.clip_grad_norm_(self.parameters.values(), limit)

    def overflowed(self, grad_norm: float) -> bool:
        """With float16, drop a step whose gradient overflowed and lower the loss scale.

        Its observation is dropped with it. Below a scale of 1 it is no overflow but divergence.
        """
        if self.scaler is None or math.isfinite(grad_norm) or self.scaler.get_scale() < 1:
            return False
        self.scaler.update()  # `unscale_` has told it
        self.optimizer.zero_grad(set_to_none=True)
        self._sums = None
        return True

    def optimizer_step(self, learning_rate: float) -> None:
        """Apply the gradients and clear them; an observation of theirs is taken in first."""
        if self._sums is not None and isinstance(self.optimizer, GRITOptimizer):
            self._refused = self.optimizer.observe(self._sums)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        if self.scaler is None:
            self.optimizer.step()
        else:
            self.scaler.step(self.optimizer)
            self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)

    def skip_step(self) -> Iterator[TrainingEvent]:
        """Count a step without an update: the projection budget keeps to the steps of the job."""
        if isinstance(self.optimizer, GRITOptimizer):
            self.optimizer.skip_step()
        yield from self.curvature_events()

    def curvature_events(self) -> Iterator[TrainingEvent]:
        """Tell what the last step's observation has shown, if it was observed."""
        sums, self._sums = self._sums, None
        refused, self._refused = self._refused, 0
        if refused:
            yield StepSkipped(
                step=self.progress.step,
                reason=f"The curvature of {refused} layers was not finite and was not taken in; the"
                " step itself was applied.",
            )
        if not isinstance(self.optimizer, GRITOptimizer):
            return
        reprojection = self.optimizer.reprojection
        if reprojection is not None:
            yield Reprojected(
                step=self.progress.step,
                modalities=budgets_by_modality(self.optimizer),
                refused=list(reprojection.refused),
            )
        if sums is None and reprojection is None:
            return
        curvature = self.optimizer.curvature()
        if not curvature:
            return
        names = {name: self.optimizer.modality_of(name) for name in curvature}
        budgets = budgets_by_modality(self.optimizer)
        yield CurvatureObserved(
            step=self.progress.step,
            layers={
                name: asdict(layer) | {"spectrum": list(layer.spectrum)}
                for name, layer in curvature.items()
            },
            modalities={
                modality: measures | budgets.get(modality, {})
                for modality, measures in summarise_by_modality(curvature, names).items()
            },
        )

    @contextmanager
    def _observing(
        self, rows: StepRows, *, num_label_tokens: float, wanted: bool
    ) -> Iterator[None]:
        """Let the optimizer see z and h of this step, when one is due and wanted."""
        optimizer = self.optimizer
        if not (wanted and isinstance(optimizer, GRITOptimizer) and optimizer.observation_due()):
            yield
            return
        with self._capture.observing(
            gradient_scale=rows.num_label_tokens / self.loss_scale,
            num_label_tokens=num_label_tokens,
        ) as sums:
            yield
        self._sums = sums

    def _build_optimizer(self) -> torch.optim.Optimizer:
        training = self.job.training
        options: dict[str, Any] = {
            "lr": training.learning_rate,
            "weight_decay": training.weight_decay,
        }
        if training.optimizer == "adamw":
            return torch.optim.AdamW(self.parameters.values(), **options)
        return build_optimizer(
            self.model, self.job.plan, self.job.config, total_steps=self.total_steps, **options
        )

    def close(self) -> None:
        """End the thread that reads rows."""
        self.stream.close()

    def release_model(self) -> None:
        """Let go of model and optimizer, so that another copy finds room."""
        del self.model, self.optimizer, self.parameters, self._capture
        release_unused(self.device)

    def autocast(self) -> AbstractContextManager[Any]:
        """Compute in the job's precision."""
        if self.job.precision == "float32":
            return nullcontext()
        return torch.autocast(self.device.type, dtype=DTYPES[self.job.precision])

    def checkpoint(self) -> Checkpoint:
        """The whole state of the run, as a value; every process has to ask for it."""
        optimizer_tensors, optimizer_values = flatten_state(self.optimizer.state_dict())
        scaler = None if self.scaler is None else self.scaler.state_dict()
        return Checkpoint(
            step=self.progress.step,
            tensors={
                "adapter": dict(
                    zip(
                        self.parameters,
                        (
                            tensor.detach().clone()
                            for tensor in all_to_host(list(self.parameters.values()))
                        ),
                        strict=True,
                    )
                ),
                "optimizer": optimizer_tensors,
                "random": random_tensors_of_all(self.device, self.processes),
            },
            values={
                "identity": self.identity(),
                "rows_checked": self.checked,
                "num_threads": self.num_threads,
                "num_processes": self.processes.count,
                "progress": asdict(self.progress),
                "optimizer": optimizer_values,
                "scaler": scaler,
                "random": random_values(),
            },
        )

    def restore(self, checkpoint: Checkpoint) -> None:
        """Continue from a checkpoint of the same job.

        Raises:
            CheckpointCorrupt: It belongs to another job.
        """
        saved, own = checkpoint.values["identity"], self.identity()
        differing = sorted(key for key in own if saved.get(key) != own[key])
        if differing:
            raise CheckpointCorrupt(
                f"The checkpoint of step {checkpoint.step} belongs to another job: its"
                f" {', '.join(differing)} differ."
            )
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(checkpoint.tensors["adapter"][name])
        values = checkpoint.values
        self.optimizer.load_state_dict(
            join_state(checkpoint.tensors["optimizer"], values["optimizer"])
        )
        if self.scaler is not None:
            self.scaler.load_state_dict(values["scaler"])
        self.progress = Progress(**values["progress"])
        random = random_tensors_of(self.processes.rank, checkpoint.tensors["random"])
        if random:
            restore_random(random, values["random"], device=self.device)
        else:  # a process that the checkpoint knows nothing of
            seed_everything(self.job.training.seed + checkpoint.step, rank=self.processes.rank)

    def identity(self) -> dict[str, Any]:
        """What must be equal for a checkpoint to be continued exactly."""
        return {
            "plan_hash": self.job.plan.plan_hash,
            "training": asdict(self.job.training),
            "dataset_sha256": self.train_rows.file.sha256,
            "retention_sha256": self.retention_rows and self.retention_rows.file.sha256,
            "precision": self.job.precision,
            "total_steps": self.total_steps,
        }

    def fingerprint(self) -> bytes:
        """A digest of what all processes must have in common: job, step and adapter."""
        common = self.identity() | {"step": self.progress.step}
        digest = hashlib.sha256(canonical_json(common))
        for parameter in self.parameters.values():
            digest.update(parameter.detach().cpu().contiguous().numpy().tobytes())
        return digest.digest()
