"""Layers of equal rank: their factors and eigenbases, stacked, and what these tell.

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
        device, dtype = layers[0].lora_A.device, layers[0].lora_A.dtype
        self.Z = RunningFactor.empty(len(layers), self.rank, device, dtype=dtype)
        self.H = RunningFactor.empty(len(layers), self.rank, device, dtype=dtype)
        self.positions_per_token_L = torch.ones(len(layers), dtype=torch.float64)
        """Counted positions by label tokens, in the last observation."""
        self.active_LR = torch.ones(len(layers), self.rank, dtype=torch.bool, device=device)
        """Which directions move; the others are frozen by the projection budget."""
        axes_RR = torch.eye(self.rank, device=device, dtype=dtype)
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
        computed anew when any layer was taken.
        """
        shown = [sums[layer.name] for layer in self.layers]
        zz_LRR = torch.stack([s.zz_RR for s in shown])
        hh_LRR = torch.stack([s.hh_RR for s in shown])
        count_L = torch.stack([s.num_positions for s in shown])
        tokens_L = torch.stack([s.num_label_tokens for s in shown])
        finite_L = (zz_LRR.isfinite() & hh_LRR.isfinite()).flatten(1).all(1).cpu()
        taken_L = finite_L & (count_L > 0).cpu()
        divisor_L11 = count_L.clamp_min(1)[:, None, None]
        self.Z.update(zz_LRR / divisor_L11, taken_L, decay=settings.ema_decay)
        self.H.update(hh_LRR / divisor_L11, taken_L, decay=settings.ema_decay)
        ratio_L = (count_L / tokens_L.clamp_min(1)).cpu().double()
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
        """What each layer's approximation keeps of a factor; float64 on the CPU.

        Active and frozen directions are kept apart, so that no basis mixes them.
        """
        active_LR = self.active_LR.cpu()
        together_LRR = active_LR[:, :, None] == active_LR[:, None, :]
        return approximate(factor.corrected_LRR(), self._block_sizes) * together_LRR

    def inverse(self, factor: RunningFactor, *, damping: float) -> Tensor:
        """Return the inverse of a factor, damped relative to its mean eigenvalue, times that mean.

        In float32 on the factor's device; the identity for layers never observed.
        """
        approximated_LRR = self.approximated(factor)
        mean_L = approximated_LRR.diagonal(dim1=-2, dim2=-1).mean(-1)
        live_L11 = (mean_L > 0)[:, None, None]
        axes_RR = torch.eye(self.rank, dtype=approximated_LRR.dtype)
        normal_LRR = approximated_LRR / mean_L.clamp_min(1e-300)[:, None, None]
        basis_LRR, e_LR = damped_spectrum(torch.where(live_L11, normal_LRR, axes_RR), damping)
        inverse_LRR = basis_LRR / e_LR[:, None, :] @ basis_LRR.mT
        return _stored(inverse_LRR, factor)

    def absolute_inverse(self, factor: RunningFactor, *, damping: float) -> Tensor:
        """Return (factor + damping I)^-1, as the code released with the GRIT paper takes it."""
        axes_RR = torch.eye(self.rank, dtype=torch.float64)
        inverse_LRR: Tensor = torch.linalg.inv(factor.corrected_LRR() + damping * axes_RR)
        return _stored(inverse_LRR, factor)

    def gauge(self, chosen_L: Tensor, *, damping: float) -> Gauge:
        """Return the Fisher gauge of the chosen layers and the identity for the others.

        Its directions are the canonical ones; each is scaled so that its row of A has the length
        that Kaiming initialisation gives it. Both factors are diagonal, with Z_jj H_jj = S_j^2. In
        the canonical scale, Z = H, rows of A would shrink with the gradients (a hundredfold at the
        start of training, when B is small), and Adam, whose steps have a fixed size, would tear
        them about. The scale depends on BA alone, so that the gauge still does.
        """
        full_LRR = [approximate(f.corrected_LRR(), self._block_sizes) for f in (self.Z, self.H)]
        gauge = canonical_gauge(*full_LRR, damping=damping)
        lengths_LR = torch.stack([
            (inverse_RR @ layer.lora_A.detach().cpu().double()).norm(dim=1)
            for layer, inverse_RR in zip(self.layers, gauge.inverse_LRR, strict=True)
        ])
        # A row that has come out as zero, of an A without full rank, cannot be given a length; it
        # takes its neighbours' scale, so that its column of B is left as it is.
        longest_L1 = lengths_LR.amax(-1, keepdim=True)
        lengths_LR = lengths_LR.where(lengths_LR > LEAST_ROW * longest_L1, longest_L1)
        gauge = gauge.scaled(ROW_NORM / lengths_LR)
        axes_RR = torch.eye(self.rank, dtype=torch.float64)
        chosen_L11 = (chosen_L & gauge.sound_L)[:, None, None]
        return Gauge(
            T_LRR=torch.where(chosen_L11, gauge.T_LRR, axes_RR),
            inverse_LRR=torch.where(chosen_L11, gauge.inverse_LRR, axes_RR),
            singular_LR=gauge.singular_LR,
            sound_L=gauge.sound_L,
        )

    def enter(self, gauge: Gauge) -> None:
        """Write adapters and factors in the gauge's coordinates; BA is the same product."""
        for layer, T_RR, inverse_RR in zip(
            self.layers, gauge.T_LRR, gauge.inverse_LRR, strict=True
        ):
            lora_A, lora_B = layer.lora_A, layer.lora_B
            lora_A.copy_((inverse_RR @ lora_A.cpu().double()).to(lora_A))
            lora_B.copy_((lora_B.cpu().double() @ T_RR).to(lora_B))
        self.Z.change_coordinates(gauge.inverse_LRR)
        self.H.change_coordinates(gauge.T_LRR.mT)

    def energies_LR(self) -> Tensor:
        """Fisher energies Z_jj H_jj of the directions as they lie; S_j^2 right after `enter`."""
        diagonal_Z_LR, diagonal_H_LR = (
            factor.corrected_LRR().diagonal(dim1=-2, dim2=-1) for factor in (self.Z, self.H)
        )
        return diagonal_Z_LR * diagonal_H_LR

    def frozen_kl_L(self) -> Tensor:
        """What dropping every frozen direction would cost, in nats for a label token, by layer."""
        cost_LR = predicted_kl(self.energies_LR().sqrt(), self.positions_per_token_L)
        return cost_LR.where(~self.active_LR.cpu(), torch.zeros_like(cost_LR)).sum(-1)

    def curvature(self, *, damping: float) -> dict[str, LayerCurvature]:
        """Spectrum, effective rank, energy and active directions of every observed layer."""
        observed_L = self.observed_L
        if not any(observed_L):
            return {}
        factors = (self.Z.corrected_LRR(), self.H.corrected_LRR())
        energies_LR = canonical_gauge(*factors, damping=damping).singular_LR.square()
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
        frozen_LR = ~self.active_LR.cpu()
        basis_LRR = eigenbases(factor_LRR + torch.diag_embed(frozen_LR * 2 * trace_L1))
        # A diagonal factor's eigenvectors are the axes; sorted by eigenvalue they only permute.
        diagonal_L = torch.tensor([size == 1 for size in self._block_sizes])
        fixed_L11 = (diagonal_L | ~factor.observed_L)[:, None, None]
        axes_RR = torch.eye(self.rank, dtype=basis_LRR.dtype)
        return _stored(torch.where(fixed_L11, axes_RR, basis_LRR), factor)


def _stored(value_LRR: Tensor, factor: RunningFactor) -> Tensor:
    """A float64 matrix in the type and on the device of the adapters."""
    # First the type, then the device: MPS has no float64.
    return value_LRR.to(factor.sum_LRR.dtype).to(factor.sum_LRR.device)


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
