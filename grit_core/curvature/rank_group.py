"""Layers of equal rank: their factors and eigenbases, stacked, and what these tell.

All of it lies on the CPU; `grit_core.curvature.side_stack` holds what a step needs on the device.

Shape suffixes: L layers of the group, R rank, I layer inputs, O layer outputs.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from grit_core.curvature.capture import LayerSums
from grit_core.curvature.factors import (
    RunningFactor,
    approximate,
    damped_spectrum,
    effective_rank,
    eigenbases,
    fisher_energies,
)
from grit_core.curvature.gauge import Gauge, canonical_gauge, predicted_kl

ROW_NORM = 3**-0.5
"""Expected length of a row of PEFT's Kaiming-uniform A, whatever its width."""

LEAST_ROW = 1e-4
"""Of a row of A in the canonical gauge against the longest, below which it counts as zero. Rows of
an A of full rank are well above it: S has a floor."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AdaptedLayer:
    """One layer's adapter as the optimizer sees it."""

    name: str
    modality: str
    lora_A: nn.Parameter
    """[R, I]"""
    lora_B: nn.Parameter
    """[O, R]"""
    fisher_approximation: str = "kfac"
    """`diagonal`, `block_diagonal` or `kfac`."""
    fisher_block_size: int = 4
    """Of `block_diagonal`."""
    natural_gradient: bool = True
    projection: bool = False

    @property
    def block_size(self) -> int:
        """Side of the blocks that the approximation keeps of this layer's factors.

        Raises:
            ValueError: For an approximation that does not exist.
        """
        sizes = {
            "diagonal": 1,
            "block_diagonal": self.fisher_block_size,
            "kfac": self.lora_A.shape[0],
        }
        if self.fisher_approximation not in sizes:
            raise ValueError(
                f"{self.fisher_approximation!r} is no approximation; use {', '.join(sizes)}."
            )
        return sizes[self.fisher_approximation]


@dataclass(frozen=True, kw_only=True, slots=True)
class FisherSettings:
    """How curvature is observed and used."""

    damping: float = 1e-4
    ema_decay: float = 0.95
    update_freq: int = 10


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerCurvature:
    """What one layer's factors say, as plain numbers."""

    spectrum: tuple[float, ...]
    """Gauge-invariant Fisher energies S_j^2, descending."""
    effective_rank: float
    fisher_energy: float
    """Sum of the spectrum."""
    active: int
    """Directions that move."""
    predicted_kl: float
    """What dropping the other directions would cost, in nats for a label token."""


class RankGroup:
    """Layers of equal rank: their factors, eigenbases and active directions, stacked."""

    def __init__(self, layers: Sequence[AdaptedLayer]) -> None:
        self.layers = tuple(layers)
        self.rank = layers[0].lora_A.shape[0]
        dtype = layers[0].lora_A.dtype
        self.Z = RunningFactor.empty(len(layers), self.rank, dtype=dtype)
        self.H = RunningFactor.empty(len(layers), self.rank, dtype=dtype)
        self.positions_per_token_L = torch.ones(len(layers), dtype=torch.float64)
        """Counted positions by label tokens, in the last observation."""
        self.active_LR = torch.ones(len(layers), self.rank, dtype=torch.bool)
        """Which directions move; the others are frozen by the projection budget."""
        axes_RR = torch.eye(self.rank, dtype=dtype)
        self.basis_Z_LRR = axes_RR.repeat(len(layers), 1, 1)
        self.basis_H_LRR = self.basis_Z_LRR.clone()
        self._block_sizes = [layer.block_size for layer in layers]

    @property
    def observed_L(self) -> list[bool]:
        """Which layers have been observed at least once; Z and H are always observed together."""
        observed: list[bool] = self.H.observed_L.tolist()
        return observed

    def observe(self, sums: Mapping[str, LayerSums], settings: FisherSettings) -> tuple[int, int]:
        """Fold one observation into the factors; return how many layers were taken and refused.

        A layer whose sums are not finite is refused: one bad batch must not poison the average. A
        layer without any counted position was not observed, which is no fault. The bases are
        computed again when any layer was taken.

        Args:
            sums: By layer name, on the CPU; see `sums_on_host`.
            settings: How much of the old average stays.
        """
        shown = [sums[layer.name] for layer in self.layers]
        zz_LRR = torch.stack([s.zz_RR for s in shown])
        hh_LRR = torch.stack([s.hh_RR for s in shown])
        count_L = torch.stack([s.num_positions for s in shown])
        tokens_L = torch.stack([s.num_label_tokens for s in shown])
        finite_L = (zz_LRR.isfinite() & hh_LRR.isfinite()).flatten(1).all(1)
        taken_L = finite_L & (count_L > 0)
        divisor_L11 = count_L.clamp_min(1)[:, None, None]
        self.Z.update(zz_LRR / divisor_L11, taken_L, decay=settings.ema_decay)
        self.H.update(hh_LRR / divisor_L11, taken_L, decay=settings.ema_decay)
        ratio_L = (count_L / tokens_L.clamp_min(1)).double()
        self.positions_per_token_L = torch.where(taken_L, ratio_L, self.positions_per_token_L)
        taken = int(taken_L.sum())
        if taken:
            self.take_bases()
        return taken, int((~finite_L).sum())

    def take_bases(self) -> None:
        """Compute the eigenbases of the factors as they are now."""
        self.basis_Z_LRR = self._basis(self.Z)
        self.basis_H_LRR = self._basis(self.H)

    def approximated(self, factor: RunningFactor) -> Tensor:
        """What each layer's approximation keeps of a factor; float64.

        Active and frozen directions are kept apart, so that no basis mixes them.
        """
        together_LRR = self.active_LR[:, :, None] == self.active_LR[:, None, :]
        return approximate(factor.corrected_LRR(), self._block_sizes) * together_LRR

    def inverse(self, factor: RunningFactor, members: Sequence[int], *, damping: float) -> Tensor:
        """Return the inverse of a factor, damped relative to its mean eigenvalue, times that mean.

        In the adapters' type; the identity for layers never observed.

        Args:
            factor: Z or H of this group.
            members: The layers to do this for.
            damping: Relative to the mean eigenvalue.
        """
        approximated_LRR = self.approximated(factor)[list(members)]
        mean_L = approximated_LRR.diagonal(dim1=-2, dim2=-1).mean(-1)
        live_L11 = (mean_L > 0)[:, None, None]
        axes_RR = torch.eye(self.rank, dtype=approximated_LRR.dtype)
        normal_LRR = approximated_LRR / mean_L.clamp_min(1e-300)[:, None, None]
        basis_LRR, e_LR = damped_spectrum(torch.where(live_L11, normal_LRR, axes_RR), damping)
        inverse_LRR = basis_LRR / e_LR[:, None, :] @ basis_LRR.mT
        return _stored(inverse_LRR, factor)

    def absolute_inverse(
        self, factor: RunningFactor, members: Sequence[int], *, damping: float
    ) -> Tensor:
        """Return (factor + damping I)^-1, as the code released with the GRIT paper takes it."""
        axes_RR = torch.eye(self.rank, dtype=torch.float64)
        factor_LRR = factor.corrected_LRR()[list(members)]
        inverse_LRR: Tensor = torch.linalg.inv(factor_LRR + damping * axes_RR)
        return _stored(inverse_LRR, factor)

    def gauge(self, adapters: Mapping[int, tuple[Tensor, Tensor]], *, damping: float) -> Gauge:
        """Return the Fisher gauge of the chosen layers and the identity for the others.

        Its directions are the canonical ones; each is scaled so that its row of A has the length
        that Kaiming initialisation gives it. Both factors are diagonal, with Z_jj H_jj = S_j^2. In
        the canonical scale, Z = H, rows of A would shrink with the gradients (a hundredfold at the
        start of training, when B is small), and Adam, whose steps have a fixed size, would tear
        them about. The scale depends on BA alone, so that the gauge still does.

        Args:
            adapters: A and B of the chosen layers on the CPU, by the layer's place in the group.
            damping: Relative to each factor's mean eigenvalue.
        """
        full_LRR = [approximate(f.corrected_LRR(), self._block_sizes) for f in (self.Z, self.H)]
        gauge = canonical_gauge(*full_LRR, damping=damping)
        lengths_LR = torch.ones(len(self.layers), self.rank, dtype=torch.float64)
        for index, (lora_A, _) in adapters.items():
            lengths_LR[index] = (gauge.inverse_LRR[index] @ lora_A.double()).norm(dim=1)
        # A row that has come out as zero, of an A without full rank, cannot be given a length; it
        # takes its neighbours' scale, so that its column of B is left as it is.
        longest_L1 = lengths_LR.amax(-1, keepdim=True)
        lengths_LR = lengths_LR.where(lengths_LR > LEAST_ROW * longest_L1, longest_L1)
        gauge = gauge.scaled(ROW_NORM / lengths_LR)
        axes_RR = torch.eye(self.rank, dtype=torch.float64)
        chosen_L = torch.zeros(len(self.layers), dtype=torch.bool)
        chosen_L[list(adapters)] = True
        chosen_L11 = (chosen_L & gauge.sound_L)[:, None, None]
        return Gauge(
            T_LRR=torch.where(chosen_L11, gauge.T_LRR, axes_RR),
            inverse_LRR=torch.where(chosen_L11, gauge.inverse_LRR, axes_RR),
            singular_LR=gauge.singular_LR,
            sound_L=gauge.sound_L,
        )

    def enter(
        self, gauge: Gauge, adapters: Mapping[int, tuple[Tensor, Tensor]]
    ) -> dict[int, tuple[Tensor, Tensor]]:
        """Write the factors in the gauge's coordinates, and return A and B in them.

        BA is the same product. Its two sides are multiplied in float64: a gauge may be conditioned
        as badly as `MAX_CONDITION`, which would cost float32 products four of their seven digits.

        Args:
            gauge: Of this group.
            adapters: A and B of the chosen layers on the CPU, by the layer's place in the group.
        """
        self.Z.change_coordinates(gauge.inverse_LRR)
        self.H.change_coordinates(gauge.T_LRR.mT)
        return {
            index: (
                (gauge.inverse_LRR[index] @ lora_A.double()).to(lora_A),
                (lora_B.double() @ gauge.T_LRR[index]).to(lora_B),
            )
            for index, (lora_A, lora_B) in adapters.items()
        }

    def energies_LR(self) -> Tensor:
        """Fisher energies Z_jj H_jj of the directions as they lie; S_j^2 right after `enter`."""
        diagonal_Z_LR, diagonal_H_LR = (
            factor.corrected_LRR().diagonal(dim1=-2, dim2=-1) for factor in (self.Z, self.H)
        )
        return diagonal_Z_LR * diagonal_H_LR

    def frozen_kl_L(self) -> Tensor:
        """What dropping every frozen direction would cost, in nats for a label token, by layer."""
        cost_LR = predicted_kl(self.energies_LR().sqrt(), self.positions_per_token_L)
        return cost_LR.where(~self.active_LR, torch.zeros_like(cost_LR)).sum(-1)

    def curvature(self) -> dict[str, LayerCurvature]:
        """Spectrum, effective rank, energy and active directions of every observed layer."""
        observed_L = self.observed_L
        if not any(observed_L):
            return {}
        energies_LR = fisher_energies(self.Z.corrected_LRR(), self.H.corrected_LRR())
        ranks_L = effective_rank(energies_LR)
        cost_L = self.frozen_kl_L()
        return {
            layer.name: LayerCurvature(
                spectrum=tuple(energies_LR[i].tolist()),
                effective_rank=float(ranks_L[i]),
                fisher_energy=float(energies_LR[i].sum()),
                active=int(self.active_LR[i].sum()),
                predicted_kl=float(cost_L[i]),
            )
            for i, layer in enumerate(self.layers)
            if observed_L[i]
        }

    def state(self) -> dict[str, Tensor]:
        """Everything that later steps depend on."""
        return {
            "Z": self.Z.sum_LRR,
            "Z_weight": self.Z.weight_L,
            "H": self.H.sum_LRR,
            "H_weight": self.H.weight_L,
            "positions_per_token": self.positions_per_token_L,
            "active": self.active_LR,
            "basis_Z": self.basis_Z_LRR,
            "basis_H": self.basis_H_LRR,
        }

    def load(self, saved: Mapping[str, Tensor]) -> None:
        """Continue from `state` of a group of the same layers."""
        for factor, name in ((self.Z, "Z"), (self.H, "H")):
            factor.sum_LRR = saved[name].to(factor.sum_LRR).clone()
            factor.weight_L = saved[f"{name}_weight"].to(factor.weight_L).clone()
        self.positions_per_token_L = saved["positions_per_token"].clone()
        self.active_LR = saved["active"].to(self.active_LR).clone()
        self.basis_Z_LRR = saved["basis_Z"].to(self.basis_Z_LRR).clone()
        self.basis_H_LRR = saved["basis_H"].to(self.basis_H_LRR).clone()

    def _basis(self, factor: RunningFactor) -> Tensor:
        factor_LRR = self.approximated(factor)
        # Frozen directions come after all others: where eigenvalues coincide, as those of a
        # singular factor do at zero, a vector could otherwise be half active and half frozen.
        trace_L1 = factor_LRR.diagonal(dim1=-2, dim2=-1).sum(-1, keepdim=True)
        basis_LRR = eigenbases(factor_LRR + torch.diag_embed(~self.active_LR * 2 * trace_L1))
        # A diagonal factor's eigenvectors are the axes; sorted by eigenvalue they only permute.
        diagonal_L = torch.tensor([size == 1 for size in self._block_sizes])
        fixed_L11 = (diagonal_L | ~factor.observed_L)[:, None, None]
        axes_RR = torch.eye(self.rank, dtype=basis_LRR.dtype)
        return _stored(torch.where(fixed_L11, axes_RR, basis_LRR), factor)


def _stored(value_LRR: Tensor, factor: RunningFactor) -> Tensor:
    """A float64 matrix in the type of the adapters."""
    return value_LRR.to(factor.sum_LRR.dtype)


def group_by_rank(layers: Sequence[AdaptedLayer]) -> list[RankGroup]:
    """Group layers by rank, in the order in which the ranks first come up."""
    ranks: dict[tuple[int, torch.dtype], list[AdaptedLayer]] = {}
    for layer in layers:
        ranks.setdefault((layer.lora_A.shape[0], layer.lora_A.dtype), []).append(layer)
    return [RankGroup(members) for members in ranks.values()]


def summarise_by_modality(
    curvature: Mapping[str, LayerCurvature], modality_of: Mapping[str, str]
) -> dict[str, dict[str, float]]:
    """Return per modality the mean effective rank and the summed Fisher energy of its layers."""
    found: dict[str, list[LayerCurvature]] = {}
    for name, layer in curvature.items():
        found.setdefault(modality_of[name], []).append(layer)
    return {
        modality: {
            "effective_rank": math.fsum(s.effective_rank for s in layers) / len(layers),
            "fisher_energy": math.fsum(s.fisher_energy for s in layers),
        }
        for modality, layers in found.items()
    }
