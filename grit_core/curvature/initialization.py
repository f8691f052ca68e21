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
from grit_core.transfer import all_to_device, all_to_host


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
        gradients = _directions([layer.lora_B for layer in self._layers])
        shown = [
            (layer, gradient)
            for layer, gradient in zip(self._layers, gradients, strict=True)
            if gradient is not None
        ]
        self._layers = [layer for layer, _ in shown]
        self._random = [layer.lora_A.detach().clone() for layer in self._layers]
        bases = [torch.linalg.qr(gradient_OR).Q for _, gradient_OR in shown]
        _write([layer.lora_B for layer in self._layers], bases)
        for layer in self._layers:
            layer.lora_A.zero_()

    @torch.no_grad()
    def read_inputs(self) -> tuple[str, ...]:
        """Turn the gradient of A into its rows: A <- V' / sqrt(3), B <- 0.

        Returns:
            The layers that start from their gradient; the others keep their random A.
        """
        gradients = _directions([layer.lora_A for layer in self._layers])
        done: dict[str, tuple[Tensor, Tensor]] = {}
        for layer, random_RI, gradient_RI in zip(
            self._layers, self._random, gradients, strict=True
        ):
            layer.lora_B.zero_()
            if gradient_RI is None:
                layer.lora_A.copy_(random_RI)
                continue
            rows_RI = torch.linalg.svd(gradient_RI, full_matrices=False).Vh
            done[layer.name] = layer.lora_A, rows_RI * ROW_NORM
        _write([lora_A for lora_A, _ in done.values()], [rows_RI for _, rows_RI in done.values()])
        return tuple(done)


def _directions(parameters: Sequence[Tensor]) -> list[Tensor | None]:
    """Return gradients at length 1; none for a parameter whose gradient is zero or not finite.

    They come to the CPU in one copy, in float64: decompositions are deterministic there.
    """
    given = [parameter.grad for parameter in parameters]
    gradients = iter(all_to_host([gradient for gradient in given if gradient is not None]))
    found: list[Tensor | None] = []
    for present in given:
        gradient = None if present is None else next(gradients)
        if gradient is None or not gradient.isfinite().all() or not gradient.any():
            found.append(None)
            continue
        gradient = gradient.double()
        found.append(gradient / gradient.norm())
    return found


def _write(parameters: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    """Write values of the CPU into parameters, in one copy."""
    if not parameters:
        return
    stored = [value.to(p.dtype) for value, p in zip(values, parameters, strict=True)]
    for parameter, value in zip(
        parameters, all_to_device(stored, parameters[0].device), strict=True
    ):
        parameter.copy_(value)
