"""A softmax regression through one adapter, with its factors written out: for exact proofs."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from grit_core.curvature.capture import LayerSums
from grit_core.optimizer import (
    AdaptedLayer,
    FisherSettings,
    GRITOptimizer,
    ProjectionSettings,
)

NUM_ROWS, INPUTS, OUTPUTS, RANK = 400, 20, 15, 6

EVERYTHING = ProjectionSettings(schedule="constant", budget_start=10**6, update_freq=20)
"""A budget that freezes nothing."""


def normal(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def conditioned(condition: float, *, seed: int = 20, rank: int = RANK) -> Tensor:
    """A random square matrix whose singular values go from 1 to 1 / condition."""
    left, right = (torch.linalg.qr(normal(rank, rank, seed=seed + i))[0] for i in (0, 1))
    return left * torch.logspace(0, -math.log10(condition), rank, dtype=torch.float64) @ right


def sums_of(z_TR: Tensor, h_TR: Tensor) -> LayerSums:
    """What the hooks would have summed, in the type of z and h; one position a label token."""
    count, tokens = (torch.tensor(float(len(z_TR))) for _ in range(2))
    return LayerSums(z_TR.mT @ z_TR, h_TR.mT @ h_TR, count, tokens, 1)


class Regression:
    """Logits W x + B A x, labels of another matrix, inputs of unequal scale.

    Args:
        split: R: the same start is written as (R A, B R^-1).
        dtype: Of adapter and data.
    """

    def __init__(
        self,
        *,
        split: Tensor | None = None,
        dtype: torch.dtype = torch.float64,
        B_scale: float = 0.1,
    ) -> None:
        scales = torch.logspace(0, -1, INPUTS, dtype=torch.float64)
        x, W = normal(NUM_ROWS, INPUTS, seed=0) * scales, normal(OUTPUTS, INPUTS, seed=1) * 0.3
        W_true = W + normal(OUTPUTS, 3, seed=2) @ normal(3, INPUTS, seed=3) * 0.4
        self.labels = (x @ W_true.mT + normal(NUM_ROWS, OUTPUTS, seed=4) * 0.3).argmax(-1)
        self.x, self.frozen_logits = x.to(dtype), (x @ W.mT).to(dtype)
        R = torch.eye(RANK, dtype=torch.float64) if split is None else split
        A, B = normal(RANK, INPUTS, seed=5) * 0.3, normal(OUTPUTS, RANK, seed=6) * B_scale
        self.A = nn.Parameter((R @ A).to(dtype))
        self.B = nn.Parameter((B @ torch.linalg.inv(R)).to(dtype))

    def layer(self, **options: Any) -> AdaptedLayer:
        return AdaptedLayer(name="l", modality="text", lora_A=self.A, lora_B=self.B, **options)

    def logits(self, rows: Tensor | slice = slice(None)) -> Tensor:
        return self.frozen_logits[rows] + self.x[rows] @ self.A.mT @ self.B.mT

    def loss(self, rows: Tensor | slice = slice(None)) -> Tensor:
        return nn.functional.cross_entropy(self.logits(rows), self.labels[rows])

    @torch.no_grad()
    def sums(self, rows: Tensor | slice = slice(None)) -> Mapping[str, LayerSums]:
        """z = A x and h = B' (p - y) of the rows."""
        g = self.logits(rows).softmax(-1)
        g -= nn.functional.one_hot(self.labels[rows], OUTPUTS)
        return {"l": sums_of(self.x[rows] @ self.A.mT, g @ self.B)}

    def product(self) -> Tensor:
        return (self.B @ self.A).detach().double()


def optimizer_of(problem: Regression, *, damping: float = 1e-4, **options: Any) -> GRITOptimizer:
    """Over a problem's adapter; layer settings and optimizer settings alike."""
    of_layer = {
        name: options.pop(name)
        for name in ("fisher_approximation", "fisher_block_size", "natural_gradient", "projection")
        if name in options
    }
    settings: dict[str, Any] = {"lr": 1e-2, "projection": EVERYTHING, "total_steps": 100}
    if "budget" in options:
        settings["projection"] = options.pop("budget")
    return GRITOptimizer(
        [problem.layer(**of_layer)],
        fisher=FisherSettings(damping=damping, update_freq=10),
        **{**settings, **options},
    )


def train(
    problem: Regression, optimizer: torch.optim.Optimizer, steps: Sequence[int], *, rows: int = 64
) -> list[Tensor]:
    """Train on the same batches whatever the optimizer; return BA after every step."""
    products = []
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        batch = torch.randint(0, NUM_ROWS, (rows,), generator=generator)
        if isinstance(optimizer, GRITOptimizer) and optimizer.observation_due():
            optimizer.observe(problem.sums(batch))
        torch.autograd.backward(problem.loss(batch))
        optimizer.step()
        optimizer.zero_grad()
        products.append(problem.product())
    return products
