"""Passes over calibration rows that weigh the directions of an adapter, whatever trained it.

What a change of the weights does to the model's answers is, to second order, half the Fisher form
of the change: KL(whole || cut) = 1/2 d' F d with F = E[J'(diag p - p p')J], J the derivative of the
logits and p the model's own softmax. The labels have no part in it: the "empirical" Fisher, made
of label gradients, is another matrix, several times too small near the end of training (Kunstner
et al. 2019). Sampling labels from p would give F; signs give it with far less noise:

    u = sqrt(p) e - p (sqrt(p)' e)      e: random signs, one for each token of the vocabulary
    E[u u'] = diag p - p p'

so that a backward pass of u, at all label tokens of all rows at once, is one unbiased draw: the
signs of different tokens are independent, and their cross terms vanish in the mean.

A gate is a factor m = 1 between `lora_A` and `lora_B`: m_j = 0 takes direction j out. Its gradient
is the sum of h_j z_j over all positions, so gate gradients hold the Fisher form of every cut, with
all that positions, directions and layers have to do with each other; a sum of independent layers'
energies leaves that out. On the digits model the form agrees with the measured divergence to 20 %
from 1e-6 to 1e-3 nats, where the sum of energies is a third or less of it.

Shape suffixes: N label tokens, V vocabulary, R rank, L layers, P draws, B batches, D directions of
all layers, in the order of `layers`.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Final

import torch
from peft import PeftModel
from torch import Tensor, nn

from grit_core import transfer
from grit_core.curvature.capture import CurvatureCapture, LayerSums
from grit_core.data.collate import Batch
from grit_core.data.encoder import IGNORED
from grit_core.data.rows import StepRows
from grit_core.errors import Interrupted
from grit_core.loss import label_loss_sum, predictions, to_device
from grit_core.models.pretrained import DTYPES
from grit_core.models.vlm_adapter import ADAPTER, lora_layers
from grit_core.softmax_divergence import divergence_sum
from grit_core.softmax_fisher import RandomSigns, SoftmaxFisher

BATCH_ROWS: Final = 4
"""Most rows of a pass. A constant, so that what is cut does not change with a job's batch size."""

SEED: Final = 0
"""Of the signs, which no generator of torch draws: no draw of the caller's is touched."""

HALF_SCALE: Final = 256.0
"""Gradients are this much larger in float16, so that the small ones are not lost."""

MAX_SUMS: Final = 256
"""Gradients of the gates that are kept of each draw; those of more batches are added up."""


class ChosenRows:
    """Rows of a dataset in fixed batches, encoded anew for every pass: images may be large."""

    def __init__(
        self, indices: Sequence[int], rows_of: Callable[[Sequence[int]], StepRows], *, size: int
    ) -> None:
        """Read `indices` by `rows_of`, `size` rows at a time."""
        self._indices, self._rows_of, self._size = indices, rows_of, size

    def __iter__(self) -> Iterator[Batch]:
        """Yield the batches; rows that are too long are left out, where that is allowed."""
        for start in range(0, len(self._indices), self._size):
            yield from self._rows_of(self._indices[start : start + self._size]).batches


@dataclass(frozen=True, slots=True)
class _Rows:
    """A batch of a pass."""

    batch: Batch
    """On the device."""
    labelled: Tensor
    """Which columns of the logits predict a label; booleans on the CPU."""


class Calibration:
    """An adapted model and the rows that weigh its directions. Leaves the weights as they are."""

    def __init__(
        self,
        model: PeftModel,
        batches: Iterable[Batch],
        *,
        precision: str = "float32",
        should_stop: Callable[[], bool] = lambda: False,
    ) -> None:
        """Hold the rows.

        Args:
            model: Its `default` adapter is weighed, in evaluation mode.
            batches: Read anew for every pass; all label tokens count alike. The fewer rows a batch
                has, the more draws there are of the gates' gradients.
            precision: Of the computation, as in training.
            should_stop: Asked before every batch; `Interrupted` is raised when it says so.
        """
        self.model = model
        self.layers = lora_layers(model)
        self.device = next(model.parameters()).device
        counts = [int((batch.labels[:, 1:] != IGNORED).sum()) for batch in batches]
        self.num_batches, self.num_label_tokens = len(counts), sum(counts)
        self._batches = batches
        self._precision = precision
        self._should_stop = should_stop
        self._scale = HALF_SCALE if precision == "float16" else 1.0

    def observe_factors(self) -> dict[str, LayerSums]:
        """Observe Z and H of every adapted layer, at the weights as they are.

        One draw of the true Fisher. The signs are drawn token by token, so that the factors do not
        depend on how the rows are divided into batches.
        """
        capture = CurvatureCapture(
            {name: layer.lora_A[ADAPTER] for name, layer in self.layers.items()},
            {name: layer.lora_B[ADAPTER] for name, layer in self.layers.items()},
        )
        weights = [layer.lora_A[ADAPTER].weight for layer in self.layers.values()]
        signs = RandomSigns(SEED)
        try:
            with capture.observing(
                gradient_scale=1 / self._scale, num_label_tokens=self.num_label_tokens
            ) as sums:
                for rows in self._read():
                    logits_NV = self._label_logits(rows)
                    drawn_NV = SoftmaxFisher(logits_NV).draw(signs) * self._scale
                    # Asking for gradients of A runs the hooks and leaves nothing in `.grad`.
                    torch.autograd.grad(logits_NV, weights, drawn_NV, allow_unused=True)
        finally:
            capture.close()
        return sums

    def gate_gradients(self, *, num_draws: int) -> Tensor:
        """Return draws of all gates' gradients, float64 on the CPU, [P, B, D].

        For a cut c (0 or 1 for each direction), 1/2 sum_b (g_pb . c)^2 / `num_label_tokens` is an
        unbiased estimate of its divergence, whatever the batches. That of a sum of batches is as
        well, so that of many batches no more than `MAX_SUMS` sums are kept.
        """
        signs = RandomSigns(SEED)
        sums_BPD: list[Tensor] = []
        with self._gated() as (_, gates):
            for gate in gates.values():
                gate.requires_grad_()
            for position, rows in enumerate(self._read()):
                logits_NV = self._label_logits(rows)
                fisher = SoftmaxFisher(logits_NV)
                draws_PD = torch.stack([
                    self._gradient(logits_NV, fisher.draw(signs), list(gates.values()))
                    for _ in range(num_draws)
                ])
                # The only wait of a batch. First the device, then the type: MPS has no float64.
                draws_PD = draws_PD.cpu().double() / self._scale
                if position < MAX_SUMS:
                    sums_BPD.append(draws_PD)
                else:
                    sums_BPD[position % MAX_SUMS] += draws_PD
        return torch.stack(sums_BPD, dim=1)

    @torch.no_grad()
    def divergence(self, dropped: Mapping[str, Tensor]) -> float:
        """Return KL(whole || cut), mean over the label tokens, by exact softmax.

        Args:
            dropped: Booleans [R] by layer: the directions taken out.
        """
        sums = [torch.zeros((), device=self.device)]
        with self._gated() as (gates_D, gates):
            whole = {name: torch.ones(len(gate)) for name, gate in gates.items()}
            cut = whole | {name: (~dropped_R).float() for name, dropped_R in dropped.items()}
            cut_D = transfer.to_device(torch.cat(list(cut.values())), self.device)
            for rows in self._read():
                whole_NV = self._label_logits(rows)
                gates_D.copy_(cut_D)
                sums.append(divergence_sum(whole_NV, self._label_logits(rows)))
                gates_D.fill_(1.0)
        return _total(sums) / max(1, self.num_label_tokens)

    @torch.no_grad()
    def loss(self) -> float:
        """Return the mean cross entropy over the rows' label tokens; 0 when there are none."""
        sums = [torch.zeros((), device=self.device)]
        for rows in self._read():
            with self._autocast():
                sums.append(label_loss_sum(self.model, rows.batch))
        return _total(sums) / max(1, self.num_label_tokens)

    def _gradient(self, logits_NV: Tensor, drawn_NV: Tensor, gates: list[Tensor]) -> Tensor:
        """One draw of the gates' gradients, [D], on the device and on the scale of `precision`."""
        found = torch.autograd.grad(
            logits_NV, gates, drawn_NV * self._scale, retain_graph=True, allow_unused=True
        )
        return torch.cat([
            torch.zeros_like(gate) if gradient is None else gradient
            for gate, gradient in zip(gates, found, strict=True)
        ])

    def _read(self) -> Iterator[_Rows]:
        """Yield the batches on the device, the model being in evaluation mode meanwhile.

        Raises:
            Interrupted: The caller wants to stop.
        """
        training = self.model.training
        self.model.eval()
        try:
            for batch in self._batches:
                if self._should_stop():
                    raise Interrupted("Stopped as asked.")
                labelled = batch.labels[:, 1:] != IGNORED  # where the batch is, so without a wait
                yield _Rows(to_device(batch, self.device), labelled)
        finally:
            self.model.train(training)

    def _label_logits(self, rows: _Rows) -> Tensor:
        """Float32 logits at the label tokens, row by row."""
        with self._autocast():
            logits, _ = predictions(self.model, rows.batch)
        labelled = rows.labelled
        if logits.shape[1] < labelled.shape[1]:  # columns without a label have no logits
            labelled = labelled[:, labelled.any(0)]
        places_N = labelled.flatten().nonzero().squeeze(1)
        logits_NV: Tensor = logits.flatten(0, 1)[transfer.to_device(places_N, self.device)].float()
        return logits_NV

    def _autocast(self) -> AbstractContextManager[object]:
        if self._precision == "float32":
            return nullcontext()
        return torch.autocast(self.device.type, dtype=DTYPES[self._precision])

    @contextmanager
    def _gated(self) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
        """Multiply every layer's z by a gate.

        Yields:
            All gates as one tensor of ones, [D], and those of each layer, which share its memory.
        """
        ranks = [layer.lora_A[ADAPTER].weight.shape[0] for layer in self.layers.values()]
        gates_D = torch.ones(sum(ranks), device=self.device)
        gates = dict(zip(self.layers, torch.split(gates_D, ranks), strict=True))
        handles = [
            layer.lora_A[ADAPTER].register_forward_hook(_gate_hook(gates[name]))
            for name, layer in self.layers.items()
        ]
        try:
            yield gates_D, gates
        finally:
            for handle in handles:
                handle.remove()


def _gate_hook(gate: Tensor) -> Callable[[nn.Module, object, Tensor], Tensor]:
    def on_forward(_module: nn.Module, _inputs: object, z: Tensor) -> Tensor:
        return z * gate.to(z.dtype)

    return on_forward


def _total(sums: list[Tensor]) -> float:
    """Add up numbers of the device in float64, in one wait for it."""
    return float(torch.stack(sums).cpu().double().sum())
