"""Cut an adapter's weakest directions, over all its layers at once, as far as a limit allows.

Every layer is written in the canonical Fisher gauge of factors that are observed at the final
weights, so that whatever trained the adapter does not matter, and a direction is a row of A with
its column of B. Each direction has a cost, what it alone would add to the divergence, and the
cheapest go first. How many go is bounded twice: by the predicted divergence of the whole cut (see
`grit_core.calibration`) and by the measured one. Costs and prediction come from separate draws:
directions that were chosen for being small in some draws look smaller in them than they are.

Layers from which nothing is cut keep their matrices bit for bit. The scale alpha / r is folded
into B everywhere, so that it is 1 in the compacted adapter, whatever the ranks.

Shape suffixes: R rank, I layer inputs, O layer outputs, L layers of equal rank, P draws, B batches,
D directions of all layers, K the cuts from smallest to largest.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor

from grit_core import transfer
from grit_core.calibration import Calibration
from grit_core.curvature.capture import LayerSums
from grit_core.curvature.gauge import canonical_gauge
from grit_core.errors import AdapterInvalid
from grit_core.models.vlm_adapter import ADAPTER

DAMPING: Final = 1e-4
"""Of the factors in the gauge, relative to their mean eigenvalue; it moves the function nowhere."""

NUM_DRAWS: Final = 256
"""Draws of the gates' gradients over all batches: half for the costs, half for the prediction."""

MAX_DRAWS_PER_BATCH: Final = 32
"""More draws of the same few rows would say no more of other rows."""

CAUTION: Final = 0.9
"""Where a cut measures above the limit, the next is aimed at this share of it."""

RESOLUTION: Final = 0.02
"""Share of all directions down to which the largest cut within the limit is looked for."""


@dataclass(frozen=True, kw_only=True)
class Compaction:
    """What was cut, and what it costs."""

    kept: Mapping[str, tuple[int, ...]]
    """By layer: the directions that stay, as positions in the layer's matrices."""

    parameters_before: int
    parameters_after: int
    predicted_kl: float
    measured_kl: float
    max_kl: float
    refused: tuple[str, ...]
    """Layers kept whole because their factors give no sound gauge."""
    moved: bool
    """False for an adapter that changes nothing, all of whose layers are zero."""

    @property
    def ranks(self) -> dict[str, int]:
        """What is left of each layer."""
        return {name: len(kept) for name, kept in self.kept.items()}


def compact(calibration: Calibration, *, max_kl: float) -> Compaction:
    """Cut directions of a model's adapter in place; what is cut is zero in the live model.

    Draws no random number of the caller's and depends on the weights and the rows alone. At least
    one direction is left, because PEFT loads no adapter without any.

    Args:
        calibration: The model and its rows.
        max_kl: Limit of the divergence of the cut adapter from the whole one on these rows, in nats
            for a label token; neither the prediction nor the measurement is above it.

    Raises:
        AdapterInvalid: The model has no LoRA layer.
        ValueError: `max_kl` is not above 0.
    """
    if not max_kl > 0:
        raise ValueError(f"max_kl is {max_kl}; give a number above 0, such as 1e-3.")
    layers = calibration.layers
    if not layers:
        raise AdapterInvalid("The model has no LoRA layer, so there is nothing to compact.")
    _fold_scale(layers)
    whole = {name: _weights(layer) for name, layer in layers.items()}
    moved_L = torch.stack([A_RI.any() & B_OR.any() for A_RI, B_OR in whole.values()]).tolist()
    idle = {name for name, moved in zip(whole, moved_L, strict=True) if not moved}
    sound = enter_gauge(layers, calibration.observe_factors())
    costs_D, changes_PBD = _weigh(calibration)
    directions = [(name, j) for name, layer in layers.items() for j in range(_rank(layer))]
    for position, (name, _) in enumerate(directions):
        if name in idle:
            costs_D[position] = -1.0  # the zero function costs nothing and goes first
        elif name not in sound:
            costs_D[position] = torch.inf
    order = droppable(costs_D)
    predicted_K = predicted_divergences(
        changes_PBD[..., order], num_label_tokens=calibration.num_label_tokens
    )
    num_idle = min(len(order), sum(name in idle for name, _ in directions))
    num_cut, measured = _largest_cut(
        calibration, [directions[i] for i in order], predicted_K, max_kl=max_kl, at_least=num_idle
    )
    dropped = {directions[i] for i in order[:num_cut]}
    kept = {
        name: tuple(j for j in range(_rank(layer)) if (name, j) not in dropped)
        for name, layer in layers.items()
    }
    _cut(layers, kept, whole)
    sizes = {name: A_RI.shape[1] + B_OR.shape[0] for name, (A_RI, B_OR) in whole.items()}
    return Compaction(
        kept=kept,
        parameters_before=sum(_rank(layer) * sizes[name] for name, layer in layers.items()),
        parameters_after=sum(len(kept[name]) * sizes[name] for name in layers),
        predicted_kl=float(predicted_K[num_cut]),
        measured_kl=measured,
        max_kl=max_kl,
        refused=tuple(name for name in layers if name not in sound | idle),
        moved=len(idle) < len(layers),
    )


@torch.no_grad()
def enter_gauge(layers: Mapping[str, LoraLayer], factors: Mapping[str, LayerSums]) -> set[str]:
    """Write layers in their canonical gauge, in place; the function of each stays what it is.

    Returns:
        The layers whose factors gave a sound gauge; the others are as before.
    """
    ranks: dict[int, list[str]] = {}
    for name, layer in layers.items():
        ranks.setdefault(_rank(layer), []).append(name)
    sound: dict[str, tuple[Tensor, Tensor]] = {}
    for names in ranks.values():
        Z_LRR, H_LRR = _means([factors[name] for name in names])
        gauge = canonical_gauge(Z_LRR, H_LRR, damping=DAMPING)
        weights = [weight for name in names for weight in _weights(layers[name])]
        hosted = [weight.double() for weight in transfer.all_to_host(weights)]
        sound |= {
            name: (gauge.inverse_LRR[i] @ hosted[2 * i], hosted[2 * i + 1] @ gauge.T_LRR[i])
            for i, name in enumerate(names)
            if bool(gauge.sound_L[i])
        }
    _set_weights(layers, sound)
    return set(sound)


def droppable(costs_D: Tensor) -> list[int]:
    """Return the directions that may go, the cheapest first; equal costs keep their order.

    A cost that is not finite keeps its direction, and so does being the last one of all.
    """
    order: list[int] = costs_D.argsort(stable=True).tolist()
    finite = [position for position in order if bool(costs_D[position].isfinite())]
    return finite[: len(order) - 1]


def predicted_divergences(changes_PBD: Tensor, *, num_label_tokens: int) -> Tensor:
    """Return the predicted divergence of dropping the first 0, 1, 2, ... directions, float64 [K].

    Half the Fisher form of all of them together; smaller than that of fewer where some cancel.

    Args:
        changes_PBD: Gradients of the directions' gates, in the order in which they go.
        num_label_tokens: Of all batches.
    """
    sums_PBK = torch.nn.functional.pad(changes_PBD.cumsum(-1), (1, 0))
    predicted_K: Tensor = sums_PBK.square().sum(1).mean(0) / (2 * max(1, num_label_tokens))
    return predicted_K


def _weigh(calibration: Calibration) -> tuple[Tensor, Tensor]:
    """Each direction's own cost [D], and the draws that are left for the prediction [P, B, D]."""
    num_draws = math.ceil(NUM_DRAWS / max(1, calibration.num_batches) / 2) * 2
    gradients_PBD = calibration.gate_gradients(num_draws=min(num_draws, MAX_DRAWS_PER_BATCH))
    first_PBD, second_PBD = gradients_PBD.chunk(2)
    num_label_tokens = max(1, calibration.num_label_tokens)
    costs_D = first_PBD.square().sum(1).mean(0) / (2 * num_label_tokens)
    return costs_D, second_PBD


def _largest_cut(
    calibration: Calibration,
    order: list[tuple[str, int]],
    predicted_K: Tensor,
    *,
    max_kl: float,
    at_least: int,
) -> tuple[int, float]:
    """Find how many directions may go, and measure what that costs.

    The prediction bounds the first try. Where that measures above the limit, the next is aimed
    lower by as much, and the rest is bisected.
    """
    # No cut above the limit is stepped over to reach a larger one whose directions cancel.
    predicted_K = predicted_K.cummax(0).values
    low, low_kl, high = at_least, 0.0, len(order) + 1
    num_cut = max(at_least, int((predicted_K <= max_kl).sum()) - 1)
    while low < num_cut < high:
        measured = calibration.divergence(_masks(calibration.layers, order[:num_cut]))
        if measured <= max_kl:
            low, low_kl = num_cut, measured
            if high > len(order):
                break
            num_cut = (low + high) // 2
        else:
            high = num_cut
            aim = float(predicted_K[high]) * CAUTION * max_kl / measured
            aimed = int((predicted_K <= aim).sum()) - 1
            num_cut = aimed if low < aimed < high else (low + high) // 2
        if high - low <= len(order) * RESOLUTION:
            break
    return low, low_kl


def _masks(layers: Mapping[str, LoraLayer], dropped: list[tuple[str, int]]) -> dict[str, Tensor]:
    masks = {name: torch.zeros(_rank(layer), dtype=torch.bool) for name, layer in layers.items()}
    for name, j in dropped:
        masks[name][j] = True
    return masks


@torch.no_grad()
def _cut(
    layers: Mapping[str, LoraLayer],
    kept: Mapping[str, tuple[int, ...]],
    whole: Mapping[str, tuple[Tensor, Tensor]],
) -> None:
    """Zero what goes, and give layers that stay whole the matrices that they had."""
    uncut = {name for name, layer in layers.items() if len(kept[name]) == _rank(layer)}
    _set_weights(layers, {name: whole[name] for name in uncut})
    masks = _masks(
        layers, [(n, j) for n in layers for j in range(_rank(layers[n])) if j not in kept[n]]
    )
    gone = transfer.all_to_device(
        list(masks.values()), next(iter(layers.values())).lora_A[ADAPTER].weight.device
    )
    for (name, layer), gone_R in zip(layers.items(), gone, strict=True):
        if name not in uncut:
            layer.lora_A[ADAPTER].weight.masked_fill_(gone_R[:, None], 0.0)
            layer.lora_B[ADAPTER].weight.masked_fill_(gone_R, 0.0)


@torch.no_grad()
def _fold_scale(layers: Mapping[str, LoraLayer]) -> None:
    scaled = [layer for layer in layers.values() if layer.scaling[ADAPTER] != 1]
    parameters = [layer.lora_B[ADAPTER].weight for layer in scaled]
    hosted = transfer.all_to_host(parameters)
    values = [
        B_OR.double() * layer.scaling[ADAPTER] for layer, B_OR in zip(scaled, hosted, strict=True)
    ]
    _copy_all(parameters, values)
    for layer in scaled:
        layer.scaling[ADAPTER] = 1.0


def _weights(layer: LoraLayer) -> tuple[Tensor, Tensor]:
    """Copies of A [R, I] and B [O, R]."""
    A_RI, B_OR = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight
    return A_RI.detach().clone(), B_OR.detach().clone()


def _set_weights(
    layers: Mapping[str, LoraLayer], weights: Mapping[str, tuple[Tensor, Tensor]]
) -> None:
    """Write A and B of the layers that are named."""
    parameters = [
        part[ADAPTER].weight
        for name in weights
        for part in (layers[name].lora_A, layers[name].lora_B)
    ]
    _copy_all(parameters, [value for pair in weights.values() for value in pair])


def _copy_all(parameters: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    """Copy values of any type and place to parameters; to a device in one copy."""
    # The type changes before the copy: MPS has no float64.
    pairs = zip(parameters, values, strict=True)
    cast = [value.to(parameter.dtype) for parameter, value in pairs]
    if cast:
        cast = transfer.all_to_device(cast, parameters[0].device)
    for parameter, value in zip(parameters, cast, strict=True):
        parameter.copy_(value)


def _rank(layer: LoraLayer) -> int:
    rank: int = layer.lora_A[ADAPTER].weight.shape[0]
    return rank


def _means(seen: Sequence[LayerSums]) -> tuple[Tensor, Tensor]:
    """E[z z'] and E[h h'] over the counted positions, [L, R, R], float64 on the CPU.

    Zero where none was counted.
    """
    parts = [part for sums in seen for part in (sums.num_positions, sums.zz_RR, sums.hh_RR)]
    hosted = [part.double() for part in transfer.all_to_host(parts)]
    count_L11 = torch.stack(hosted[::3]).clamp_min(1)[:, None, None]
    return torch.stack(hosted[1::3]) / count_L11, torch.stack(hosted[2::3]) / count_L11
