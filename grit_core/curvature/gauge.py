"""The canonical Fisher gauge: coordinates of rank space in which both factors are one diagonal.

BA = (B T)(T^-1 A) for every invertible T, so that an adapter may be written in any coordinates of
its rank space. In the canonical ones, with Z = L_Z L_Z' and H = L_H L_H' (damped),

    U S V' = svd(L_H' L_Z)      T = L_H^-T U S^1/2      T^-1 = S^-1/2 U' L_H'

with any roots L, both factors become diag(S): Z* = T^-1 Z T^-T = diag(S) = T' H T = H*. The S_j^2
are the eigenvalues of ZH, the same for every split of BA, and keeping the first k directions is the
best cut to rank k in the Fisher norm: it loses sqrt(sum_{j>k} S_j^2), as Eckart and Young say of
L_H' L_Z.

Gradients are covectors: with A* = T^-1 A and B* = B T the gradients are T' dA and dB T^-T, and so
are their first moments, exactly. Second moments move by the squared entries, which is exact for
entries that are uncorrelated.

Shape suffixes: L layers, R rank. Everything is float64 on the CPU.
"""

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from grit_core.curvature.factors import damped_spectrum, mean_eigenvalue, normalized

PASSES: Final = 3
"""Damping is relative to a factor's mean eigenvalue, which says little in coordinates where the
factor is badly conditioned. Each pass damps in the coordinates that the one before it has found, so
that T and S are those of the product BA and not of the split that came in."""

MAX_CONDITION: Final = 1e4
"""Of T; a gauge that is worse would cost the float32 adapter its digits and is refused."""

RELATIVE_FLOOR: Final = 1e-3
"""Of S against its largest, inside T alone: directions without energy keep a finite scale. Below
the floor Z* and H* are diagonal still, and not equal."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Gauge:
    """A change of coordinates of rank space, for L layers of equal rank."""

    T_LRR: Tensor
    """B <- B T."""
    inverse_LRR: Tensor
    """A <- T^-1 A."""
    singular_LR: Tensor
    """S, descending; zero for a layer whose factors are zero or not finite."""
    sound_L: Tensor
    """Booleans; where false, T is the identity."""

    def scaled(self, scale_LR: Tensor) -> "Gauge":
        """Return the gauge with direction j's row of A times `scale` and column of B by it."""
        return Gauge(
            T_LRR=self.T_LRR / scale_LR[:, None, :],
            inverse_LRR=self.inverse_LRR * scale_LR[:, :, None],
            singular_LR=self.singular_LR,
            sound_L=self.sound_L,
        )


def canonical_gauge(Z_LRR: Tensor, H_LRR: Tensor, *, damping: float) -> Gauge:
    """Return the gauge in which both factors are diag(S).

    A layer is refused, with the identity for T, when a factor is not finite or zero, or when T is
    conditioned worse than `MAX_CONDITION`.

    Args:
        Z_LRR: E[z z'], symmetric and positive semidefinite.
        H_LRR: E[h h'], the same.
        damping: Relative to each factor's mean eigenvalue; at least `MIN_DAMPING` is
            used.
    """
    scale_Z_L, scale_H_L = (mean_eigenvalue(factor_LRR) for factor_LRR in (Z_LRR, H_LRR))
    usable_L = (scale_Z_L > 0) & (scale_H_L > 0)
    # The traces are taken out, so that 1e-16-scaled factors decompose like any other; the balance
    # between Z and H comes back as one factor of T.
    Z_LRR, H_LRR = normalized(Z_LRR, scale_Z_L, usable_L), normalized(H_LRR, scale_H_L, usable_L)
    balance_L11 = (scale_Z_L / scale_H_L).where(usable_L, torch.ones_like(scale_Z_L)) ** 0.25
    balance_L11 = balance_L11[:, None, None]
    identity_RR = torch.eye(Z_LRR.shape[-1], dtype=torch.float64)
    T_LRR, inverse_LRR = identity_RR * balance_L11, identity_RR / balance_L11
    for _ in range(PASSES):
        step_LRR, back_LRR, S_LR = _balanced(Z_LRR, H_LRR, damping)
        T_LRR, inverse_LRR = T_LRR @ step_LRR, back_LRR @ inverse_LRR
        Z_LRR, H_LRR = back_LRR @ Z_LRR @ back_LRR.mT, step_LRR.mT @ H_LRR @ step_LRR
    sound_L = usable_L & _well_conditioned(T_LRR)
    sound_L11 = sound_L[:, None, None]
    true_S_LR = S_LR * (scale_Z_L * scale_H_L).sqrt()[:, None]
    return Gauge(
        T_LRR=torch.where(sound_L11, T_LRR, identity_RR),
        inverse_LRR=torch.where(sound_L11, inverse_LRR, identity_RR),
        singular_LR=torch.where(usable_L[:, None], true_S_LR, torch.zeros_like(S_LR)),
        sound_L=sound_L,
    )


def predicted_kl(singular_LR: Tensor, positions_per_token_L: Tensor) -> Tensor:
    """Return what dropping each direction costs, in nats for a label token, shape [L, R].

    KL is half the Fisher form of the change; in K-FAC's approximation direction j of a layer
    contributes S_j^2 at each counted position (Kunstner et al. 2019 on the Fisher form; the sum
    over positions is K-FAC-expand, Eschenhagen et al. 2023).

    Args:
        singular_LR: S of the canonical gauge.
        positions_per_token_L: Counted positions of the layer by label tokens of the loss.
    """
    return 0.5 * positions_per_token_L[:, None] * singular_LR.square()


def transport_squares(v_LRX: Tensor, map_LRR: Tensor) -> Tensor:
    """Carry second moments along a linear map of gradients, g* = M g, of uncorrelated entries.

    Args:
        v_LRX: Non-negative, the rank axis second.
        map_LRR: M.
    """
    moved_LRX: Tensor = map_LRR.square().to(v_LRX) @ v_LRX
    return moved_LRX


def _balanced(Z_LRR: Tensor, H_LRR: Tensor, damping: float) -> tuple[Tensor, Tensor, Tensor]:
    """T, T^-1 and S of two factors, damped in the coordinates in which they are given."""
    basis_Z_LRR, e_Z_LR = damped_spectrum(Z_LRR, damping)
    basis_H_LRR, e_H_LR = damped_spectrum(H_LRR, damping)
    root_Z_LR, root_H_LR = e_Z_LR.sqrt(), e_H_LR.sqrt()
    overlap_LRR = basis_H_LRR.mT @ basis_Z_LRR
    U_LRR, S_LR, _ = torch.linalg.svd(
        root_H_LR[:, :, None] * overlap_LRR * root_Z_LR[:, None, :], full_matrices=False
    )
    scale_L1R = torch.maximum(S_LR, RELATIVE_FLOOR * S_LR[:, :1]).sqrt()[:, None, :]
    T_LRR = basis_H_LRR @ (U_LRR / root_H_LR[:, :, None]) * scale_L1R
    inverse_LRR = (basis_H_LRR @ (U_LRR * root_H_LR[:, :, None]) / scale_L1R).mT
    return T_LRR, inverse_LRR, S_LR


def _well_conditioned(T_LRR: Tensor) -> Tensor:
    singular_LR: Tensor = torch.linalg.svdvals(T_LRR)
    sound_L: Tensor = singular_LR[:, 0] <= MAX_CONDITION * singular_LR[:, -1]
    return sound_L
