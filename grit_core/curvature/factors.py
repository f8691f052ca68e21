"""Running rank-space factors and what is read off them, batched over layers of equal rank.

Shape suffixes: L layers, R rank. All results are float32 on the factors' device; decompositions
run in float64 on the CPU, where they are deterministic and exist for every device (R is small).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class RunningFactor:
    """An exponential moving average of second-moment matrices, bias-corrected on reading.

    Layers are updated one by one: a layer whose observation is missing or not finite keeps its
    average and its weight.
    """

    sum_LRR: Tensor
    """Weighted sum, float32."""
    weight_L: Tensor
    """Sum of the weights; 0 for a layer that was never observed. float64 on the CPU."""

    @classmethod
    def empty(cls, num_layers: int, rank: int, device: torch.device) -> "RunningFactor":
        """A factor that has seen nothing."""
        return cls(
            sum_LRR=torch.zeros(num_layers, rank, rank, device=device),
            weight_L=torch.zeros(num_layers, dtype=torch.float64),
        )

    def update(self, new_LRR: Tensor, seen_L: Tensor, *, decay: float) -> None:
        """Move the average of the layers that were seen towards their new second moments.

        Args:
            new_LRR: E[z z'] or E[h h'] of this observation.
            seen_L: Booleans on the CPU; only these layers move.
            decay: Share of the old average that stays.
        """
        seen_L11 = seen_L.to(self.sum_LRR.device)[:, None, None]
        moved_LRR = self.sum_LRR * decay + new_LRR * (1 - decay)
        self.sum_LRR = torch.where(seen_L11, moved_LRR, self.sum_LRR)
        self.weight_L = torch.where(seen_L, self.weight_L * decay + (1 - decay), self.weight_L)

    @property
    def observed_L(self) -> Tensor:
        """Which layers have been observed at least once; booleans on the CPU."""
        return self.weight_L > 0

    def corrected_LRR(self) -> Tensor:
        """The bias-corrected averages in float64 on the CPU; zero for layers never observed."""
        weight_L11 = self.weight_L.clamp_min(torch.finfo(torch.float64).tiny)[:, None, None]
        # First the device, then the type: MPS has no float64.
        return self.sum_LRR.cpu().double() / weight_L11


def approximate(factor_LRR: Tensor, approximations: Sequence[str]) -> Tensor:
    """Keep of each factor what its layer's `fisher_approximation` keeps.

    Raises:
        ValueError: For an approximation that does not exist.
    """
    rank = factor_LRR.shape[-1]
    index_R = torch.arange(rank)
    masks = {
        "kfac": torch.ones(rank, rank, dtype=torch.bool),
        "block_diagonal": (index_R[:, None] // BLOCK_SIZE) == (index_R[None, :] // BLOCK_SIZE),
        "diagonal": torch.eye(rank, dtype=torch.bool),
    }
    unknown = set(approximations) - masks.keys()
    if unknown:
        raise ValueError(f"{sorted(unknown)} are no approximations; use {', '.join(masks)}.")
    mask_LRR = torch.stack([masks[name] for name in approximations]).to(factor_LRR.device)
    return torch.where(mask_LRR, factor_LRR, torch.zeros((), dtype=factor_LRR.dtype))


def damped(factor_LRR: Tensor, damping: float) -> Tensor:
    """Add damping x trace / R to the diagonal: relative, so that scale does not matter."""
    rank = factor_LRR.shape[-1]
    mean_L = factor_LRR.diagonal(dim1=-2, dim2=-1).mean(-1)
    # A factor that is exactly zero would stay singular; any positive floor makes it regular.
    ridge_L = (damping * mean_L).clamp_min(torch.finfo(factor_LRR.dtype).tiny * rank)
    return factor_LRR + ridge_L[:, None, None] * torch.eye(rank, dtype=factor_LRR.dtype)


def eigenbases(factor_LRR: Tensor) -> Tensor:
    """Return orthogonal U with factor = U diag(e) U', eigenvalues ascending.

    The columns of U are the vectors. Each factor is scaled to unit trace first, so that
    1e-16-scaled input decomposes like any other.
    """
    trace_L = factor_LRR.diagonal(dim1=-2, dim2=-1).sum(-1).clamp_min(1e-300)
    symmetric_LRR = (factor_LRR + factor_LRR.mT) / (2 * trace_L[:, None, None])
    basis_LRR: Tensor = torch.linalg.eigh(symmetric_LRR).eigenvectors
    return basis_LRR


def fisher_spectrum(Z_LRR: Tensor, H_LRR: Tensor, *, damping: float) -> Tensor:
    """Return the gauge-invariant Fisher energies S_j^2 of each layer, descending, shape [L, R].

    S are the singular values of L_H' L_Z with Z = L_Z L_Z' and H = L_H L_H' (damped): the same for
    every split of BA into B and A, and the diagonal both factors share in the canonical gauge.
    """
    roots = []
    for factor_LRR in (Z_LRR, H_LRR):
        trace_L = factor_LRR.diagonal(dim1=-2, dim2=-1).sum(-1)
        scale_L = torch.where(trace_L > 0, trace_L, torch.ones_like(trace_L))
        normal_LRR = factor_LRR / scale_L[:, None, None]
        root_LRR = torch.linalg.cholesky(damped(normal_LRR, max(damping, 1e-12)))
        roots.append(
            root_LRR * torch.where(trace_L > 0, trace_L, 0 * trace_L).sqrt()[:, None, None]
        )
    root_Z_LRR, root_H_LRR = roots
    singular_LR: Tensor = torch.linalg.svdvals(root_H_LRR.mT @ root_Z_LRR)
    return singular_LR.square()


def effective_rank(energies_LR: Tensor) -> Tensor:
    """Return exp of the entropy of the normalised energies (Roy & Vetterli 2007), shape [L].

    1 when one direction holds all energy, R when all hold the same; 0 for a layer without energy.
    """
    total_L = energies_LR.sum(-1)
    share_LR = energies_LR / total_L.clamp_min(1e-300)[:, None]
    entropy_L = -(share_LR * share_LR.clamp_min(1e-300).log()).sum(-1)
    return torch.where(total_L > 0, entropy_L.exp(), torch.zeros_like(entropy_L))


def transport_second_moment(v_LRX: Tensor, old_LRR: Tensor, new_LRR: Tensor) -> Tensor:
    """Carry second moments from one orthonormal basis of the rank axis to another.

    With overlap O = U_new' U_old the moment of a new coordinate is sum_j O_ij^2 v_j when the old
    coordinates are uncorrelated, which is what their being eigenvectors says. The sum over the
    rank axis is kept, and equal bases change nothing.

    Args:
        v_LRX: Non-negative, the rank axis second.
        old_LRR: Columns are the basis the moments are in.
        new_LRR: Columns are the basis they go to.
    """
    overlap_LRR = (new_LRR.mT @ old_LRR).square()
    return overlap_LRR @ v_LRX
