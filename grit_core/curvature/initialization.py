"""Where an adapter starts: rows of A that see what the loss wants of the layer.

A random A reads random directions of the layer's input, of which the first gradient of W has little
(R of I directions). With B = 0 any A computes the same function, so A is free to be chosen: its
rows become the leading right singular vectors of the layer's first gradient dW, as in LoRA-GA (Wang
et al. 2024). dW is never formed. It is sketched through the adapter, in rank space, by a
randomised range finder (Halko, Martinsson and Tropp 2011, algorithm 5.1) whose two products are two
backward passes:

    1. B = 0, A random:   dB = s dW A'      Q = an orthonormal basis of its columns
    2. B = Q, A = 0:      dA = s Q' dW      its right singular vectors V' become A

BA is zero in both, so that the model computes the base model's function throughout. A keeps the
length that Kaiming initialisation gives its rows, 1 / sqrt(3), and B goes back to zero.

Shape suffixes: R rank, I layer inputs, O layer outputs.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from grit_core.curvature.rank_group import ROW_NORM, AdaptedLayer


class GradientInitialization:
    """The two halves of a sketch; a backward pass of the caller's goes before each."""

    def __init__(self, layers: Sequence[AdaptedLayer]) -> None:
        """Choose the layers that have room for R orthonormal rows and columns.

        Args:
            layers: With B = 0, as freshly initialised.
        """
        self._layers = [
            layer
            for layer in layers
            if layer.natural_gradient
            and layer.lora_A.shape[0] <= min(layer.lora_A.shape[1], layer.lora_B.shape[0])
        ]
        self._random: list[Tensor] = []

    @torch.no_grad()
    def sketch_outputs(self) -> None:
        """Turn the gradient of B into a basis Q of the layer's outputs: B <- Q, A <- 0."""
        self._layers = [layer for layer in self._layers if _has_gradient(layer.lora_B)]
        self._random = [layer.lora_A.detach().clone() for layer in self._layers]
        for layer in self._layers:
            Q_OR = torch.linalg.qr(_gradient(layer.lora_B)).Q
            layer.lora_B.copy_(Q_OR)
            layer.lora_A.zero_()

    @torch.no_grad()
    def read_inputs(self) -> tuple[str, ...]:
        """Turn the gradient of A into its rows: A <- V' / sqrt(3), B <- 0.

        Returns:
            The layers that start from their gradient; the others keep their random A.
        """
        done = []
        for layer, random_RI in zip(self._layers, self._random, strict=True):
            layer.lora_B.zero_()
            if not _has_gradient(layer.lora_A):
                layer.lora_A.copy_(random_RI)
                continue
            rows_RI = torch.linalg.svd(_gradient(layer.lora_A), full_matrices=False).Vh
            layer.lora_A.copy_(rows_RI * ROW_NORM)
            done.append(layer.name)
        return tuple(done)


def _has_gradient(parameter: Tensor) -> bool:
    gradient = parameter.grad
    return gradient is not None and bool(gradient.isfinite().all()) and bool(gradient.any())


def _gradient(parameter: Tensor) -> Tensor:
    """The gradient at length 1, in float64 on the CPU, where decompositions are deterministic."""
    gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    gradient = gradient.cpu().double()
    length: Tensor = gradient.norm()
    return gradient / length
