"""Running rank-space factors and what is read off them, batched over layers of equal rank.

Shape suffixes: L layers, R rank. Everything here lies on the CPU, whatever the adapters' device:
factors are small, and decompositions run in float64, which is deterministic there and which MPS
lacks. A step on a device sends its sums in one copy and gets bases back in one.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

MIN_DAMPING: Final = 1e-12
"""Relative; well above float64's rounding of a factor."""


@dataclass
class RunningFactor:
    """An exponential moving average of second-moment matrices, bias-corrected on reading.

    Layers are updated one by one: a layer whose observation is missing or not finite keeps its
    average and its weight.
    """

    sum_LRR: Tensor
    """Weighted sum, in the adapter's type (float32 but in proofs)."""
    weight_L: Tensor
    """Sum of the weights; 0 for a layer that was never observed. float64 on the CPU."""

    @classmethod
    def empty(
        cls,
        num_layers: int,
        rank: int,
        *,
        dtype: torch.dtype = torch.float32,
    ) -> "RunningFactor":
        """A factor that has seen nothing."""
        return cls(
            sum_LRR=torch.zeros(num_layers, rank, rank, dtype=dtype),
            weight_L=torch.zeros(num_layers, dtype=torch.float64),
        )

    def update(self, new_LRR: Tensor, seen_L: Tensor, *, decay: float) -> None:
        """Move the average of the layers that were seen towards their new second moments.

        Args:
            new_LRR: E[z z'] or E[h h'] of this observation.
            seen_L: Booleans; only these layers move.
            decay: Share of the old average that stays.
        """
        seen_L11 = seen_L[:, None, None]
        moved_LRR = self.sum_LRR * decay + new_LRR.to(self.sum_LRR) * (1 - decay)
        self.sum_LRR = torch.where(seen_L11, moved_LRR, self.sum_LRR)
        self.weight_L = torch.where(seen_L, self.weight_L * decay + (1 - decay), self.weight_L)

    def change_coordinates(self, map_LRR: Tensor) -> None:
        """Write the average for vectors M v in place of v: M F M', exactly.

        Args:
            map_LRR: M, float64.
        """
        moved_LRR = map_LRR @ self.sum_LRR.double() @ map_LRR.mT
        self.sum_LRR = moved_LRR.to(self.sum_LRR)

    @property
    def observed_L(self) -> Tensor:
        """Which layers have been observed at least once; booleans."""
        return self.weight_L > 0

    def corrected_LRR(self) -> Tensor:
        """The bias-corrected averages in float64; zero for layers never observed."""
        weight_L11 = self.weight_L.clamp_min(torch.finfo(torch.float64).tiny)[:, None, None]
        return self.sum_LRR.double() / weight_L11


def approximate(factor_LRR: Tensor, block_sizes: Sequence[int]) -> Tensor:
    """Keep the blocks on each factor's diagonal: 1 keeps the diagonal, R keeps everything.

    Args:
        factor_LRR: Symmetric.
        block_sizes: Side of the blocks of each layer; the last block may be smaller.
    """
    index_R = torch.arange(factor_LRR.shape[-1], device=factor_LRR.device)
    size_L1 = torch.tensor(block_sizes, device=factor_LRR.device)[:, None]
    block_LR = index_R // size_L1
    return factor_LRR * (block_LR[:, :, None] == block_LR[:, None, :])


def damped_spectrum(factor_LRR: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """Return U and e of the damped factor U diag(e) U', eigenvalues ascending and above zero.

    damping x trace / R is added to every eigenvalue: relative, so that scale does not matter. An
    eigenvalue below zero is the rounding of a float32 sum and counts as zero; no damping, however
    small, leaves the factor singular.
    """
    e_LR, basis_LRR = torch.linalg.eigh((factor_LRR + factor_LRR.mT) / 2)
    e_LR = e_LR.clamp_min(0)
    ridge_L1 = max(damping, MIN_DAMPING) * e_LR.mean(-1, keepdim=True)
    return basis_LRR, e_LR + ridge_L1


def eigenbases(factor_LRR: Tensor) -> Tensor:
    """Return orthogonal U with factor = U diag(e) U', eigenvalues ascending.

    The columns of U are the vectors. Each factor is scaled to unit trace first, so that
    1e-16-scaled input decomposes like any other.
    """
    trace_L = factor_LRR.diagonal(dim1=-2, dim2=-1).sum(-1).clamp_min(1e-300)
    symmetric_LRR = (factor_LRR + factor_LRR.mT) / (2 * trace_L[:, None, None])
    basis_LRR: Tensor = torch.linalg.eigh(symmetric_LRR).eigenvectors
    return basis_LRR


def fisher_energies(Z_LRR: Tensor, H_LRR: Tensor) -> Tensor:
    """Return the eigenvalues of ZH, descending: S_j^2 of the canonical gauge without damping.

    They need no vectors of H and usually none of Z either, so that they cost a fraction of a gauge.
    Zero for a layer whose factors are zero or not finite.

    Args:
        Z_LRR: E[z z'], symmetric and positive semidefinite up to rounding.
        H_LRR: E[h h'], the same.
    """
    scale_Z_L, scale_H_L = (mean_eigenvalue(factor_LRR) for factor_LRR in (Z_LRR, H_LRR))
    usable_L = (scale_Z_L > 0) & (scale_H_L > 0)
    Z_LRR, H_LRR = normalized(Z_LRR, scale_Z_L, usable_L), normalized(H_LRR, scale_H_L, usable_L)
    # With Z = L L', the eigenvalues of ZH are those of L'HL, which is symmetric.
    root_LRR, info_L = torch.linalg.cholesky_ex(Z_LRR)
    singular_L = info_L != 0
    if singular_L.any():
        e_LR, basis_LRR = torch.linalg.eigh(Z_LRR[singular_L])
        root_LRR[singular_L] = basis_LRR * e_LR.clamp_min(0).sqrt()[:, None, :]
    balanced_LRR = root_LRR.mT @ H_LRR @ root_LRR
    energies_LR = torch.linalg.eigvalsh((balanced_LRR + balanced_LRR.mT) / 2).clamp_min(0).flip(-1)
    true_LR: Tensor = energies_LR * (scale_Z_L * scale_H_L)[:, None]
    return torch.where(usable_L[:, None], true_LR, torch.zeros_like(true_LR))


def mean_eigenvalue(factor_LRR: Tensor) -> Tensor:
    """The mean eigenvalue; zero for a factor that is not finite."""
    mean_L = factor_LRR.diagonal(dim1=-2, dim2=-1).mean(-1)
    finite_L = factor_LRR.isfinite().flatten(1).all(1)
    return torch.where(finite_L, mean_L, torch.zeros_like(mean_L)).clamp_min(0)


def normalized(factor_LRR: Tensor, scale_L: Tensor, usable_L: Tensor) -> Tensor:
    """The factor at mean eigenvalue 1, symmetric as it was; the identity if it is not usable."""
    divisor_L11 = torch.where(usable_L, scale_L, torch.ones_like(scale_L))[:, None, None]
    identity_RR = torch.eye(factor_LRR.shape[-1], dtype=torch.float64)
    return torch.where(usable_L[:, None, None], factor_LRR / divisor_L11, identity_RR)


def effective_rank(energies_LR: Tensor) -> Tensor:
    """Return exp of the entropy of the normalised energies (Roy & Vetterli 2007), shape [L].

    1 when one direction holds all energy, R when all hold the same; 0 for a layer without energy.
    """
    total_L = energies_LR.sum(-1)
    share_LR = energies_LR / total_L.clamp_min(1e-300)[:, None]
    entropy_L = -(share_LR * share_LR.clamp_min(1e-300).log()).sum(-1)
    return torch.where(total_L > 0, entropy_L.exp(), torch.zeros_like(entropy_L))
