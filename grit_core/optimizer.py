"""`GRITOptimizer`: AdamW for LoRA adapters in the eigenbasis of their rank-space factors.

The `ekfac` rule, after EKFAC (George et al. 2018) and SOAP (Vyas et al. 2024), in rank space. For a
layer with factors Z = U_Z diag(.) U_Z' and H = U_H diag(.) U_H' (see `grit_core.curvature`):

    A [R, I]:  m = b1 m + (1-b1) dA       v = b2 v + (1-b2) (U_H' dA)^2     rows turn with H
               A <- A - lr U_H [ (U_H' m^) / (sqrt(v^ + d mean v^) + eps) ]
    B [O, R]:  m = b1 m + (1-b1) dB       v = b2 v + (1-b2) (dB U_Z)^2      columns turn with Z
               B <- B - lr [ (m^ U_Z) / (sqrt(v^ + d mean v^) + eps) ] U_Z'

^ is Adam's bias correction, d is `fisher_damping`, relative to the side's mean second moment. The
first moment lives in the original coordinates and needs no transport; the second is carried to a
new basis by `transport_second_moment`. Until a layer has been observed its bases are the identity
and d is 0: the step is AdamW's. Layers without natural gradient are stepped by torch's own AdamW,
bit for bit.

Layers whose matrices have equal shapes are stacked, so that a step is a dozen operations a shape
and not a dozen a parameter.

Shape suffixes: L layers of equal shape, R rank, X the other side (inputs of A, outputs of B).
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from grit_core.curvature.capture import LayerSums
from grit_core.curvature.factors import (
    RunningFactor,
    approximate,
    effective_rank,
    eigenbases,
    fisher_spectrum,
    transport_second_moment,
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
        identity_LRR = torch.eye(self.rank, device=device).repeat(len(layers), 1, 1)
        self.basis_Z_LRR = identity_LRR
        self.basis_H_LRR = identity_LRR.clone()

    def observe(self, sums: Mapping[str, LayerSums], settings: FisherSettings) -> tuple[int, int]:
        """Fold one observation into the factors; return how many layers were taken and refused.

        A layer whose sums are not finite is refused: one bad batch must not poison the average. A
        layer without any counted position was not observed, which is no fault.
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
        return int(taken_L.sum()), int((counted_L & ~finite_L).sum())

    def refresh_bases(self) -> tuple[Tensor, Tensor]:
        """Recompute both eigenbases; return the old ones, in the order Z, H."""
        old = self.basis_Z_LRR, self.basis_H_LRR
        kinds = [layer.fisher_approximation for layer in self.layers]
        self.basis_Z_LRR = self._basis(self.Z, kinds).to(old[0])
        self.basis_H_LRR = self._basis(self.H, kinds).to(old[1])
        return old

    def curvature(self, *, damping: float) -> dict[str, LayerCurvature]:
        """Spectrum, effective rank and energy of every observed layer."""
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
            if bool(self.H.observed_L[i])
        }

    def _basis(self, factor: RunningFactor, kinds: Sequence[str]) -> Tensor:
        basis_LRR = eigenbases(approximate(factor.corrected_LRR(), kinds))
        # A diagonal factor's eigenvectors are the axes; sorted by eigenvalue they only permute.
        diagonal_L = torch.tensor([kind == "diagonal" for kind in kinds])
        fixed_L11 = (diagonal_L | ~factor.observed_L)[:, None, None]
        return torch.where(fixed_L11, torch.eye(self.rank, dtype=basis_LRR.dtype), basis_LRR)


class SideStack:
    """One side (A or B) of layers of equal shape: Adam's moments, the rank axis second."""

    def __init__(self, group: RankGroup, members: Sequence[int], side: str) -> None:
        self.group, self.members, self.side = group, tuple(members), side
        layers = [group.layers[index] for index in members]
        self.names = tuple(layer.name for layer in layers)
        self.parameters = [getattr(layer, side) for layer in layers]
        shape = self._rank_first(self.parameters[0]).shape
        device = self.parameters[0].device
        self.m_LRX = torch.zeros(len(layers), *shape, device=device)
        self.v_LRX = torch.zeros(len(layers), *shape, device=device)
        self.steps = [0] * len(layers)

    def basis_LRR(self) -> Tensor:
        """The basis that turns the rank axis: H's for A, Z's for B."""
        basis = self.group.basis_H_LRR if self.side == "lora_A" else self.group.basis_Z_LRR
        return basis[list(self.members)]

    def carry(self, old_Z_LRR: Tensor, old_H_LRR: Tensor) -> None:
        """Carry the second moments from the old basis to the present one."""
        old_LRR = (old_H_LRR if self.side == "lora_A" else old_Z_LRR)[list(self.members)]
        self.v_LRX = transport_second_moment(self.v_LRX, old_LRR, self.basis_LRR())

    def step(self, options: Mapping[str, Any], *, damping: float) -> None:
        """Step the layers that have a gradient."""
        active = [i for i, p in enumerate(self.parameters) if p.grad is not None]
        if not active:
            return
        everything = len(active) == len(self.parameters)
        pick = slice(None) if everything else torch.tensor(active, device=self.m_LRX.device)
        for index in active:
            self.steps[index] += 1
        parameters = [self.parameters[i] for i in active]
        gradient_LRX = torch.stack([self._rank_first(p.grad).float() for p in parameters])
        m_LRX, v_LRX = self.m_LRX[pick], self.v_LRX[pick]
        update_LRX = self._adam(
            gradient_LRX, m_LRX, v_LRX, [self.steps[i] for i in active], pick, options, damping
        )
        if not everything:
            self.m_LRX[pick], self.v_LRX[pick] = m_LRX, v_LRX
        if options["weight_decay"]:
            torch._foreach_mul_(parameters, 1 - options["lr"] * options["weight_decay"])
        updates = [
            self._rank_first(u).to(p.dtype) for u, p in zip(update_LRX, parameters, strict=True)
        ]
        torch._foreach_sub_(parameters, updates)

    def _adam(
        self,
        gradient_LRX: Tensor,
        m_LRX: Tensor,
        v_LRX: Tensor,
        steps: list[int],
        pick: slice | Tensor,
        options: Mapping[str, Any],
        damping: float,
    ) -> Tensor:
        beta1, beta2 = options["betas"]
        factor = self.group.H if self.side == "lora_A" else self.group.Z
        observed = factor.observed_L[list(self.members)][
            pick if isinstance(pick, slice) else pick.cpu()
        ]
        turned = bool(observed.any())
        basis_LRR = self.basis_LRR()[pick] if turned else None
        m_LRX.lerp_(gradient_LRX, 1 - beta1)
        if basis_LRR is not None:
            gradient_LRX = basis_LRR.mT @ gradient_LRX
        v_LRX.mul_(beta2).addcmul_(gradient_LRX, gradient_LRX, value=1 - beta2)
        first = basis_LRR.mT @ m_LRX if basis_LRR is not None else m_LRX
        device = m_LRX.device
        correction2 = torch.tensor([1 - beta2**n for n in steps], device=device)[:, None, None]
        step_size = torch.tensor([options["lr"] / (1 - beta1**n) for n in steps], device=device)
        second_LRX = v_LRX / correction2
        if turned and damping:
            ridge_L11 = damping * second_LRX.mean((1, 2), keepdim=True)
            second_LRX = second_LRX + ridge_L11 * observed.to(second_LRX)[:, None, None]
        update_LRX = first / (second_LRX.sqrt_() + options["eps"]) * step_size[:, None, None]
        return update_LRX if basis_LRR is None else torch.matmul(basis_LRR, update_LRX)

    def _rank_first(self, matrix: Tensor) -> Tensor:
        """View [R, I] as it is and [O, R] transposed; its own inverse."""
        return matrix if self.side == "lora_A" else matrix.mT


class GRITOptimizer(torch.optim.Optimizer):
    """AdamW on LoRA adapters, in the eigenbasis of their rank-space factors once observed."""

    def __init__(
        self,
        layers: Iterable[AdaptedLayer],
        *,
        plain: Iterable[nn.Parameter] = (),
        fisher: FisherSettings | None = None,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        """Collect the parameters.

        Args:
            layers: Adapters stepped with the natural gradient.
            plain: Parameters stepped by torch's AdamW.
            fisher: Damping, decay and frequency of the factors.
            lr: Learning rate.
            betas: Decay of the first and second moment.
            eps: Added to the root of the second moment.
            weight_decay: Decoupled, as in AdamW.
        """
        chosen, self._plain = list(layers), list(plain)
        parameters = [p for layer in chosen for p in (layer.lora_A, layer.lora_B)] + self._plain
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(parameters, defaults)
        self.fisher = fisher or FisherSettings()
        self.skipped_observations = 0
        self.rank_groups = _by_rank(chosen)
        self.stacks = [stack for group in self.rank_groups for stack in _stacks_of(group)]
        self._modality = {layer.name: layer.modality for layer in chosen}
        self._num_steps = 0

    @property
    def layers(self) -> tuple[AdaptedLayer, ...]:
        """The layers stepped with the natural gradient."""
        return tuple(layer for group in self.rank_groups for layer in group.layers)

    def observation_due(self) -> bool:
        """Tell whether the coming step should be observed.

        Every `update_freq`-th step, and each step until a first observation has succeeded: while
        B is zero there is no gradient in rank space to observe.
        """
        if not self.rank_groups:
            return False
        unseen = not any(bool(g.H.observed_L.any()) for g in self.rank_groups)
        return unseen or self._num_steps % self.fisher.update_freq == 0

    def observe(self, sums: Mapping[str, LayerSums]) -> int:
        """Fold one observation into the factors and turn the second moments to the new bases.

        Returns:
            How many layers were refused because their sums are not finite.
        """
        refused = 0
        for group in self.rank_groups:
            taken, bad = group.observe(sums, self.fisher)
            refused += bad
            if taken:
                old_Z_LRR, old_H_LRR = group.refresh_bases()
                for stack in self.stacks:
                    if stack.group is group:
                        stack.carry(old_Z_LRR, old_H_LRR)
        self.skipped_observations += refused
        return refused

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # closures are not used
        """Step every parameter that has a gradient.

        Raises:
            ValueError: A closure was given; second moments need the gradients that are there.
        """
        if closure is not None:
            raise ValueError("GRITOptimizer takes no closure; call backward before step.")
        options = self.param_groups[0]
        for stack in self.stacks:
            stack.step(options, damping=self.fisher.damping)
        self._step_plain(options)
        self._num_steps += 1

    def curvature(self) -> dict[str, LayerCurvature]:
        """What the factors say of each observed layer."""
        found: dict[str, LayerCurvature] = {}
        for group in self.rank_groups:
            found |= group.curvature(damping=self.fisher.damping)
        return found

    def modality_of(self, layer: str) -> str:
        """The modality of a layer stepped with the natural gradient."""
        return self._modality[layer]

    def state_dict(self) -> dict[str, Any]:
        """Everything that later steps depend on: tensors and plain numbers alone."""
        options = self.param_groups[0]
        return {
            "options": {key: value for key, value in options.items() if key != "params"},
            "num_steps": self._num_steps,
            "skipped_observations": self.skipped_observations,
            "groups": [_group_state(group) for group in self.rank_groups],
            "stacks": [
                {"m": stack.m_LRX, "v": stack.v_LRX, "steps": list(stack.steps)}
                for stack in self.stacks
            ],
            "plain": [dict(self.state[p]) for p in self._plain],
        }

    @torch.no_grad()
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue from `state_dict` of an optimizer over the same layers.

        Raises:
            ValueError: It belongs to other layers.
        """
        if len(state_dict["stacks"]) != len(self.stacks) or len(state_dict["plain"]) != len(
            self._plain
        ):
            raise ValueError("This optimizer state belongs to other layers.")
        options = dict(state_dict["options"])
        options["betas"] = tuple(options["betas"])
        self.param_groups[0].update(options)
        self._num_steps = int(state_dict["num_steps"])
        self.skipped_observations = int(state_dict["skipped_observations"])
        for group, saved in zip(self.rank_groups, state_dict["groups"], strict=True):
            _load_group_state(group, saved)
        for stack, saved in zip(self.stacks, state_dict["stacks"], strict=True):
            if saved["m"].shape != stack.m_LRX.shape:
                raise ValueError("This optimizer state belongs to layers of another shape.")
            stack.m_LRX = saved["m"].to(stack.m_LRX).clone()
            stack.v_LRX = saved["v"].to(stack.v_LRX).clone()
            stack.steps = [int(number) for number in saved["steps"]]
        for parameter, saved in zip(self._plain, state_dict["plain"], strict=True):
            self.state[parameter] = {key: value.clone() for key, value in saved.items()}

    def _step_plain(self, options: Mapping[str, Any]) -> None:
        """Step the parameters without natural gradient exactly as `torch.optim.AdamW` does."""
        active: list[Tensor] = [p for p in self._plain if p.grad is not None]
        if not active:
            return
        for parameter in active:
            state = self.state[parameter]
            if not state:
                state["step"] = torch.zeros((), dtype=torch.float32)
                state["exp_avg"] = torch.zeros_like(parameter)
                state["exp_avg_sq"] = torch.zeros_like(parameter)
        beta1, beta2 = options["betas"]
        adamw(
            active,
            [p.grad for p in active if p.grad is not None],
            [self.state[p]["exp_avg"] for p in active],
            [self.state[p]["exp_avg_sq"] for p in active],
            [],
            [self.state[p]["step"] for p in active],
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=options["lr"],
            weight_decay=options["weight_decay"],
            eps=options["eps"],
            maximize=False,
        )


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


def _by_rank(layers: Sequence[AdaptedLayer]) -> list[RankGroup]:
    ranks: dict[int, list[AdaptedLayer]] = {}
    for layer in layers:
        ranks.setdefault(layer.lora_A.shape[0], []).append(layer)
    return [RankGroup(members) for members in ranks.values()]


def _stacks_of(group: RankGroup) -> list[SideStack]:
    shapes: dict[tuple[str, torch.Size], list[int]] = {}
    for index, layer in enumerate(group.layers):
        shapes.setdefault(("lora_A", layer.lora_A.shape), []).append(index)
        shapes.setdefault(("lora_B", layer.lora_B.shape), []).append(index)
    return [SideStack(group, members, side) for (side, _), members in shapes.items()]


def _group_state(group: RankGroup) -> dict[str, Tensor]:
    return {
        "Z": group.Z.sum_LRR,
        "Z_weight": group.Z.weight_L,
        "H": group.H.sum_LRR,
        "H_weight": group.H.weight_L,
        "basis_Z": group.basis_Z_LRR,
        "basis_H": group.basis_H_LRR,
    }


def _load_group_state(group: RankGroup, saved: Mapping[str, Tensor]) -> None:
    for factor, name in ((group.Z, "Z"), (group.H, "H")):
        if saved[name].shape != factor.sum_LRR.shape:
            raise ValueError("This optimizer state belongs to layers of another rank.")
        factor.sum_LRR = saved[name].to(factor.sum_LRR).clone()
        factor.weight_L = saved[f"{name}_weight"].to(factor.weight_L).clone()
    group.basis_Z_LRR = saved["basis_Z"].to(group.basis_Z_LRR).clone()
    group.basis_H_LRR = saved["basis_H"].to(group.basis_H_LRR).clone()
