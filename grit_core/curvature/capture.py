"""Hooks that observe z and h of every adapted layer during chosen steps.

Which positions count: those with a gradient. Padding gets none, and neither does a position that
no label depends on; both are recognised by h being zero, which needs no mask in any layer's own
coordinates (text tokens, image patches). Zero means below float32's resolution of the call's
largest h: the query of a row's first token has no gradient, and kernels leave 1e-9 of one there.
While B is still zero, as right after initialisation, h is zero everywhere and there is nothing to
observe.

Scale: the trainer's loss is a mean over N label tokens, perhaps multiplied by a loss scale S. h
is multiplied by N / S, which makes it the gradient of the summed token losses of its own row (rows
do not see each other), and the sums run over all micro-batches of the step. So neither batch split
nor accumulation nor loss scale changes a factor. Both factors are means over the counted positions
of the layer, which are not the N label tokens: text before the answer and image patches count too.

Gradient checkpointing: the re-entrant kind runs its first forward without grad, where nothing is
hooked; the other kind recomputes a z that no gradient reaches. Either way each position is
counted once.

Shape suffixes: T token positions, R rank.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from grit_core.errors import GritError
from grit_core.processes import Processes
from grit_core.transfer import all_to_host

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle


ROUNDING = torch.finfo(torch.float32).eps
"""Relative to the largest gradient of a call, what is no gradient but rounding."""


class CurvatureBypassed(GritError):
    """A layer trained without calling its `lora_A` module, so that its curvature cannot be seen."""


@dataclass
class LayerSums:
    """What one layer has shown during one step."""

    zz_RR: Tensor
    """Sum of z z' over the counted positions, float32."""
    hh_RR: Tensor
    """Sum of h h' over the same positions, float32, per-token scale."""
    num_positions: Tensor
    """How many positions were counted; a float32 scalar, so that it can be reduced with the sums.
    """
    num_label_tokens: Tensor
    """Label tokens of the step's loss; a float32 scalar, reduced with the sums."""
    num_calls: int = 0
    """Forward passes that were hooked."""

    @classmethod
    def empty(
        cls, rank: int, device: torch.device, *, num_label_tokens: float = 1.0
    ) -> "LayerSums":
        """Nothing seen yet."""
        return cls(
            zz_RR=torch.zeros(rank, rank, device=device),
            hh_RR=torch.zeros(rank, rank, device=device),
            num_positions=torch.zeros((), device=device),
            # Filled on the device: `torch.tensor` would copy one number for each layer.
            num_label_tokens=torch.full((), float(num_label_tokens), device=device),
        )

    def add(self, z_TR: Tensor, h_TR: Tensor) -> None:
        """Count the positions that have a gradient."""
        if h_TR.numel() == 0:
            return
        z_TR, h_TR = z_TR.float(), h_TR.float()
        size_T1 = h_TR.abs().amax(-1, keepdim=True)
        counts_T1 = (size_T1 > size_T1.amax() * ROUNDING).to(z_TR.dtype)
        z_TR, h_TR = z_TR * counts_T1, h_TR * counts_T1
        # A caller's autocast around backward would round these products to half precision.
        with torch.autocast(z_TR.device.type, enabled=False):
            self.zz_RR += z_TR.mT @ z_TR
            self.hh_RR += h_TR.mT @ h_TR
        self.num_positions += counts_T1.sum()


class CurvatureCapture:
    """Observes adapted layers of one model; while not observing a call costs an early return."""

    def __init__(self, lora_A: Mapping[str, nn.Module], lora_B: Mapping[str, nn.Module]) -> None:
        """Hook the layers.

        Args:
            lora_A: By layer name, PEFT's `lora_A` module, whose output is z of shape [..., R].
            lora_B: By layer name, PEFT's `lora_B` module; its gradient betrays a bypassed `lora_A`.
        """
        self._lora_A = dict(lora_A)
        self._lora_B = dict(lora_B)
        self._sums: dict[str, LayerSums] | None = None
        self._scale = 1.0
        self._handles: list[RemovableHandle] = [
            module.register_forward_hook(self._hook_of(name))
            for name, module in self._lora_A.items()
        ]

    @contextmanager
    def observing(
        self, *, gradient_scale: float, num_label_tokens: float
    ) -> Iterator[dict[str, LayerSums]]:
        """Observe the forward and backward passes of one optimizer step, all micro-batches of it.

        Args:
            gradient_scale: N / S: label tokens that the loss was averaged over, by the loss scale.
            num_label_tokens: Those that this process contributes to N.

        Yields:
            The sums by layer name; complete once the block ends (reduced over processes).

        A layer that got a gradient although its `lora_A` module was never called raises
        `CurvatureBypassed` when the block ends.
        """
        self._scale = gradient_scale
        self._sums = {
            name: LayerSums.empty(*_rank_and_device(module), num_label_tokens=num_label_tokens)
            for name, module in self._lora_A.items()
        }
        sums = self._sums
        try:
            yield sums
        finally:
            self._sums = None
        self._refuse_bypass(sums)
        _all_reduce(sums)

    def close(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _hook_of(self, name: str) -> Callable[[nn.Module, object, Tensor], None]:
        def on_forward(_module: nn.Module, _inputs: object, z: Tensor) -> None:
            if self._sums is None or not z.requires_grad:
                return
            layer = self._sums[name]
            layer.num_calls += 1
            scale = self._scale
            seen_z = z.detach()

            def on_gradient(h: Tensor) -> None:
                rank = h.shape[-1]
                layer.add(seen_z.reshape(-1, rank), h.detach().float().reshape(-1, rank) * scale)

            z.register_hook(on_gradient)  # type: ignore[no-untyped-call]  # torch leaves it untyped

        return on_forward

    def _refuse_bypass(self, sums: Mapping[str, LayerSums]) -> None:
        gradients: dict[str, Tensor] = {}
        for name, layer in sums.items():
            gradient = self._lora_B[name].weight.grad
            if layer.num_calls == 0 and isinstance(gradient, Tensor):
                gradients[name] = gradient
        moved = all_to_host([gradient.any() for gradient in gradients.values()])
        for name, has_moved in zip(gradients, moved, strict=True):
            if has_moved:
                raise CurvatureBypassed(
                    f"{name} got a gradient without a call of its lora_A module: a fused kernel "
                    "stands in for PEFT's forward. Turn that kernel off, or set "
                    "enable_natural_gradient to false for this modality."
                )


def sums_on_host(sums: Mapping[str, LayerSums]) -> dict[str, LayerSums]:
    """Copy the sums of all layers to the host, with one wait."""
    tensors = iter(all_to_host([tensor for layer in sums.values() for tensor in _tensors(layer)]))
    return {
        name: LayerSums(
            zz_RR=next(tensors),
            hh_RR=next(tensors),
            num_positions=next(tensors),
            num_label_tokens=next(tensors),
            num_calls=layer.num_calls,
        )
        for name, layer in sums.items()
    }


def _rank_and_device(module: nn.Module) -> tuple[int, torch.device]:
    weight = module.weight
    if not isinstance(weight, Tensor):
        raise TypeError(f"lora_A is a {type(module).__name__}; a linear module is needed.")
    return weight.shape[0], weight.device


def _all_reduce(sums: Mapping[str, LayerSums]) -> None:
    """Add the sums of all processes, in one message."""
    processes = Processes.current()
    if processes.count == 1:
        return
    parts = [t for s in sums.values() for t in _tensors(s)]
    flat = torch.cat([part.reshape(-1) for part in parts])
    processes.add_up(flat)
    totals = torch.split(flat, [part.numel() for part in parts])
    for part, total in zip(parts, totals, strict=True):
        part.copy_(total.view_as(part))


def _tensors(sums: LayerSums) -> tuple[Tensor, ...]:
    return sums.zz_RR, sums.hh_RR, sums.num_positions, sums.num_label_tokens
