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
    effective_rank,
    eigenbases,
    fisher_spectrum,
)


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


class RankGroup:
    """Layers of equal rank: their factors and eigenbases, stacked."""

    def __init__(self, layers: Sequence[AdaptedLayer]) -> None:
        self.layers = tuple(layers)
        self.rank = layers[0].lora_A.shape[0]
        device = layers[0].lora_A.device
        self.Z = RunningFactor.empty(len(layers), self.rank, device)
        self.H = RunningFactor.empty(len(layers), self.rank, device)
        self.basis_Z_LRR = torch.eye(self.rank, device=device).repeat(len(layers), 1, 1)
        self.basis_H_LRR = self.basis_Z_LRR.clone()

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
        finite_L = (zz_LRR.isfinite() & hh_LRR.isfinite()).flatten(1).all(1).cpu()
        counted_L = (count_L > 0).cpu()
        taken_L = finite_L & counted_L
        divisor_L11 = count_L.clamp_min(1)[:, None, None]
        self.Z.update(zz_LRR / divisor_L11, taken_L, decay=settings.ema_decay)
        self.H.update(hh_LRR / divisor_L11, taken_L, decay=settings.ema_decay)
        taken = int(taken_L.sum())
        if taken:
            self.basis_Z_LRR = self._basis(self.Z)
            self.basis_H_LRR = self._basis(self.H)
        return taken, int((~finite_L).sum())

    def curvature(self, *, damping: float) -> dict[str, LayerCurvature]:
        """Spectrum, effective rank and energy of every observed layer."""
        observed_L = self.observed_L
        if not any(observed_L):
            return {}
        energies_LR = fisher_spectrum(
            self.Z.corrected_LRR(), self.H.corrected_LRR(), damping=damping
        )
        ranks_L = effective_rank(energies_LR)
        return {
            layer.name: LayerCurvature(
                spectrum=tuple(energies_LR[i].tolist()),
                effective_rank=float(ranks_L[i]),
                fisher_energy=float(energies_LR[i].sum()),
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
            "basis_Z": self.basis_Z_LRR,
            "basis_H": self.basis_H_LRR,
        }

    def load(self, saved: Mapping[str, Tensor]) -> None:
        """Continue from `state` of a group of the same layers."""
        for factor, name in ((self.Z, "Z"), (self.H, "H")):
            factor.sum_LRR = saved[name].to(factor.sum_LRR).clone()
            factor.weight_L = saved[f"{name}_weight"].to(factor.weight_L).clone()
        self.basis_Z_LRR = saved["basis_Z"].to(self.basis_Z_LRR).clone()
        self.basis_H_LRR = saved["basis_H"].to(self.basis_H_LRR).clone()

    def _basis(self, factor: RunningFactor) -> Tensor:
        kinds = [layer.fisher_approximation for layer in self.layers]
        basis_LRR = eigenbases(approximate(factor.corrected_LRR(), kinds))
        # A diagonal factor's eigenvectors are the axes; sorted by eigenvalue they only permute.
        diagonal_L = torch.tensor([kind == "diagonal" for kind in kinds])
        fixed_L11 = (diagonal_L | ~factor.observed_L)[:, None, None]
        axes_RR = torch.eye(self.rank, dtype=basis_LRR.dtype)
        return torch.where(fixed_L11, axes_RR, basis_LRR).float().to(factor.sum_LRR.device)


def group_by_rank(layers: Sequence[AdaptedLayer]) -> list[RankGroup]:
    """Group layers by rank, in the order in which the ranks first come up."""
    ranks: dict[int, list[AdaptedLayer]] = {}
    for layer in layers:
        ranks.setdefault(layer.lora_A.shape[0], []).append(layer)
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
