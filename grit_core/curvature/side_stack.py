"""One side (A or B) of layers of equal shape, and the rules that step it.

Every rule is Adam on something: on gradients preconditioned by a factor, in a factor's eigenbasis,
or in coordinates that were chosen before. With G = dA [R, I] or dB [O, R], U the eigenbasis of the
side's own factor (H for A, Z for B) and ^ Adam's bias correction:

    ekfac   G in the basis U          Adam's second moment there, damped; first moment outside
    kfac    G times the factor's inverse, grafted to the length of G, then Adam
    paper   G times the other side's inverse, then Adam: the code released with arXiv 2601.00231
    adam    G; what the gauge rule does between its changes of coordinates

Shape suffixes: L layers of equal shape, R rank, M and N rows and columns of one side: [R, I] for A,
[O, R] for B.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from grit_core.curvature.gauge import Gauge, transport_squares
from grit_core.curvature.rank_group import RankGroup
from grit_core.transfer import all_to_device, to_device

PAPER_DAMPING: Final = 1e-2
"""Absolute; where the released code's own adaptation of its damping ends up in practice."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Shaping:
    """What a group says of a stack's layers, as a step needs it."""

    basis_LRR: Tensor | None = None
    """Of the `ekfac` rule."""
    inverse_LRR: Tensor | None = None
    """Of the `kfac` and `paper` rules."""
    active_LR: Tensor | None = None
    """Which directions move, in the original coordinates; none where all do."""
    active_turned_LR: Tensor | None = None
    """The same in the coordinates of the second moments."""

    def tensors(self) -> list[Tensor]:
        """Those that are there, in the order of the fields."""
        fields = (self.basis_LRR, self.inverse_LRR, self.active_LR, self.active_turned_LR)
        return [tensor for tensor in fields if tensor is not None]

    def filled(self, tensors: Iterator[Tensor]) -> "Shaping":
        """The same with other tensors in place of those that are there."""
        return Shaping(
            basis_LRR=None if self.basis_LRR is None else next(tensors),
            inverse_LRR=None if self.inverse_LRR is None else next(tensors),
            active_LR=None if self.active_LR is None else next(tensors),
            active_turned_LR=None if self.active_turned_LR is None else next(tensors),
        )


class SideStack:
    """Adam's moments of one side of layers of equal shape, and what preconditions them."""

    def __init__(
        self, group: RankGroup, members: Sequence[int], side: str, *, rule: str, damping: float
    ) -> None:
        self.group, self.members, self.side = group, tuple(members), side
        self.rule, self.damping = rule, damping
        layers = [group.layers[index] for index in members]
        self.parameters: list[nn.Parameter] = [getattr(layer, side) for layer in layers]
        first = self.parameters[0]
        self.m_LMN = torch.zeros(len(layers), *first.shape, dtype=first.dtype, device=first.device)
        """First moments, in the original coordinates."""
        self.v_LMN = torch.zeros_like(self.m_LMN)
        """Second moments, in the coordinates of the basis where the rule has one."""
        self.steps = [0] * len(layers)
        self.shaping = Shaping()
        """On the parameters' device."""
        self._basis_LRR: Tensor | None = None
        """The basis on the CPU."""
        self._frozen_L = [False] * len(layers)
        """Which layers have directions that do not move."""
        self._picked: tuple[tuple[int, ...], Tensor] = (), torch.empty(0)
        """The last part of the layers that was stepped, and its places on the device."""

    def moved(self, gauge: Gauge, m_LMN: Tensor) -> tuple[Tensor, Tensor]:
        """Return the first moments in the gauge's coordinates, and the map of the second ones.

        The group has entered the gauge already and has taken its bases.

        Args:
            gauge: Of the whole group.
            m_LMN: The first moments on the CPU.
        """
        picked = list(self.members)
        T_LRR, inverse_LRR = gauge.T_LRR[picked], gauge.inverse_LRR[picked]
        # How gradients of this side map, written for the rank axis in front.
        covector_LRR = T_LRR.mT if self.side == "lora_A" else inverse_LRR
        # Gradients times an inverse factor are vectors again, and move like the parameters do.
        vector_LRR = inverse_LRR if self.side == "lora_A" else T_LRR.mT
        map_LRR = vector_LRR if self.rule == "kfac" else covector_LRR
        m_LRX = self._rank_first(m_LMN)
        moved_LRX = (map_LRR @ m_LRX.double()).to(m_LRX)
        new_LRR = self._group_basis()
        if self._basis_LRR is not None and new_LRR is not None:
            map_LRR = new_LRR.mT.double() @ map_LRR @ self._basis_LRR.double()
        return self._rank_first(moved_LRX).contiguous(), map_LRR.to(m_LMN.dtype)

    def enter(self, m_LMN: Tensor, map_LRR: Tensor) -> None:
        """Take what `moved` has returned, on the device; `shape` comes next."""
        self.m_LMN.copy_(m_LMN)  # which may be part of a larger buffer
        self._transport_second(map_LRR)

    def step(self, options: Mapping[str, Any]) -> None:
        """Step the layers that have a gradient."""
        present = [i for i, p in enumerate(self.parameters) if p.grad is not None]
        observed_L = self.group.observed_L
        shaped = [i for i in present if observed_L[self.members[i]]]
        straight = [i for i in present if not observed_L[self.members[i]]]
        if straight:
            self._step_straight(straight, options)
        if shaped:
            self._step_shaped(shaped, options)

    def state(self) -> dict[str, Any]:
        """Everything that later steps depend on; bases and inverses are the group's."""
        return {"m": self.m_LMN, "v": self.v_LMN, "steps": list(self.steps)}

    def load(self, saved: Mapping[str, Any]) -> None:
        """Continue from `state` of a stack of the same layers, the group being loaded already."""
        self.m_LMN = saved["m"].to(self.m_LMN).clone()
        self.v_LMN = saved["v"].to(self.v_LMN).clone()
        self.steps = [int(number) for number in saved["steps"]]

    def read_group(self) -> Shaping:
        """Return what the rule needs of the group as it is now, on the CPU.

        The rank axis of A turns with H, that of B with Z.
        """
        group, of_A = self.group, self.side == "lora_A"
        inverse_LRR = None
        if self.rule == "kfac":
            own = group.H if of_A else group.Z
            inverse_LRR = group.inverse(own, self.members, damping=self.damping)
        elif self.rule == "paper":
            other = group.Z if of_A else group.H
            inverse_LRR = group.absolute_inverse(other, self.members, damping=PAPER_DAMPING)
        basis_LRR = self._group_basis()
        active_LR = group.active_LR[list(self.members)]
        self._basis_LRR = basis_LRR
        self._frozen_L = (~active_LR).any(-1).tolist()
        if not any(self._frozen_L):
            return Shaping(basis_LRR=basis_LRR, inverse_LRR=inverse_LRR)
        turned_LR = active_LR
        if basis_LRR is not None:
            # No basis mixes active and frozen directions, so that each vector is one or the other.
            share_LR = basis_LRR.square().mT @ active_LR.to(basis_LRR)[:, :, None]
            turned_LR = share_LR.squeeze(-1) > 0.5
        return Shaping(
            basis_LRR=basis_LRR,
            inverse_LRR=inverse_LRR,
            active_LR=active_LR,
            active_turned_LR=turned_LR,
        )

    def shape(self, shaping: Shaping, *, transports: bool) -> None:
        """Use what `read_group` has returned, on the device.

        Args:
            shaping: On the parameters' device.
            transports: Whether the second moments move from the old basis to the new one.
        """
        old_LRR, self.shaping = self.shaping.basis_LRR, shaping
        if transports and old_LRR is not None and shaping.basis_LRR is not None:
            self._transport_second(shaping.basis_LRR.mT @ old_LRR)

    def _group_basis(self) -> Tensor | None:
        if self.rule != "ekfac":
            return None
        of_A = self.side == "lora_A"
        basis_LRR = self.group.basis_H_LRR if of_A else self.group.basis_Z_LRR
        return basis_LRR[list(self.members)]

    def _step_straight(self, chosen: Sequence[int], options: Mapping[str, Any]) -> None:
        """Step layers that no observation has reached, as AdamW does."""
        steps = [torch.tensor(float(self.steps[i])) for i in chosen]
        step_adamw(
            [self.parameters[i] for i in chosen],
            [self.m_LMN[i] for i in chosen],
            [self.v_LMN[i] for i in chosen],
            steps,
            options,
        )
        for i in chosen:
            self.steps[i] += 1

    def _step_shaped(self, chosen: Sequence[int], options: Mapping[str, Any]) -> None:
        """Step observed layers by the rule."""
        beta1, beta2 = options["betas"]
        for i in chosen:
            self.steps[i] += 1
        parameters: list[Tensor] = [self.parameters[i] for i in chosen]
        # A slice is a view, so that the moments below change in place.
        whole = len(chosen) == len(self.parameters)
        pick = slice(None) if whole else self._places(chosen)
        m_LMN, v_LMN = self.m_LMN[pick], self.v_LMN[pick]
        frozen = self._frozen(chosen, pick)
        gradient_LMN = torch.stack([p.grad for p in parameters if p.grad is not None])
        if frozen is not None:
            # What does not move must not lend its length, nor a mixing inverse, to what does.
            gradient_LMN = gradient_LMN.masked_fill(frozen[0], 0.0)
        gradient_LMN = self._preconditioned(gradient_LMN, pick)
        turned_LMN = self._turn(gradient_LMN, pick)
        if frozen is None:
            m_LMN.lerp_(gradient_LMN, 1 - beta1)
            v_LMN.mul_(beta2).addcmul_(turned_LMN, turned_LMN, value=1 - beta2)
        else:
            kept_LMN, kept_turned_LMN = frozen
            m_LMN = m_LMN.lerp(gradient_LMN, 1 - beta1).where(~kept_LMN, m_LMN)
            new_v_LMN = v_LMN * beta2 + turned_LMN.square() * (1 - beta2)
            v_LMN = new_v_LMN.where(~kept_turned_LMN, v_LMN)
        if not whole or frozen is not None:
            self.m_LMN[pick], self.v_LMN[pick] = m_LMN, v_LMN
        correction1, correction2 = (self._correction(beta, chosen) for beta in (beta1, beta2))
        second_LMN = v_LMN / correction2
        if self.rule == "ekfac":
            second_LMN += self.damping * second_LMN.mean((1, 2), keepdim=True)
        update_LMN = self._turn(m_LMN, pick) / correction1 * options["lr"]
        update_LMN /= second_LMN.sqrt_().add_(options["eps"])
        update_LMN = self._turn(update_LMN, pick, back=True)
        if options["weight_decay"]:
            decay_LMN = torch.stack(parameters) * (options["lr"] * options["weight_decay"])
            update_LMN = update_LMN + decay_LMN
        if frozen is not None:
            update_LMN = update_LMN.masked_fill(frozen[0], 0.0)
        torch._foreach_sub_(parameters, list(update_LMN.unbind()))

    def _preconditioned(self, gradient_LMN: Tensor, pick: Any) -> Tensor:
        if self.shaping.inverse_LRR is None:
            return gradient_LMN
        inverse_LRR = self.shaping.inverse_LRR[pick]
        of_A = self.side == "lora_A"
        shaped_LMN = inverse_LRR @ gradient_LMN if of_A else gradient_LMN @ inverse_LRR
        if self.rule == "paper":
            return shaped_LMN
        length_L11 = gradient_LMN.norm(dim=(1, 2), keepdim=True)
        shaped_length_L11 = shaped_LMN.norm(dim=(1, 2), keepdim=True)
        grafted_LMN: Tensor = shaped_LMN * (length_L11 / shaped_length_L11.clamp_min(1e-30))
        return grafted_LMN

    def _places(self, chosen: Sequence[int]) -> Tensor:
        """Places of layers in the stack, on the device; usually those of the step before."""
        if self._picked[0] != tuple(chosen):
            self._picked = tuple(chosen), to_device(torch.tensor(chosen), self.m_LMN.device)
        return self._picked[1]

    def _frozen(self, chosen: Sequence[int], pick: Any) -> tuple[Tensor, Tensor] | None:
        """The entries of frozen directions, in the original coordinates and in those of v."""
        active_LR, turned_LR = self.shaping.active_LR, self.shaping.active_turned_LR
        if active_LR is None or turned_LR is None or not any(self._frozen_L[i] for i in chosen):
            return None
        first, second = ((~a_LR[pick])[:, :, None] for a_LR in (active_LR, turned_LR))
        return self._rank_first(first), self._rank_first(second)

    def _turn(self, value_LMN: Tensor, pick: Any, *, back: bool = False) -> Tensor:
        """Express the rank axis in the rule's basis, or undo that."""
        if self.shaping.basis_LRR is None:
            return value_LMN
        basis_LRR = self.shaping.basis_LRR[pick]
        basis_LRR = basis_LRR.mT if back else basis_LRR
        return basis_LRR.mT @ value_LMN if self.side == "lora_A" else value_LMN @ basis_LRR

    def _transport_second(self, map_LRR: Tensor) -> None:
        moved_LRX = transport_squares(self._rank_first(self.v_LMN), map_LRR)
        self.v_LMN = self._rank_first(moved_LRX).contiguous()

    def _rank_first(self, value: Tensor) -> Tensor:
        """Put the rank axis in front, or back again: B holds it last."""
        return value if self.side == "lora_A" else value.mT

    def _correction(self, beta: float, chosen: Sequence[int]) -> float | Tensor:
        """Adam's bias correction; one number as long as all layers have made the same steps."""
        corrections = [1 - beta ** self.steps[i] for i in chosen]
        if len(set(corrections)) == 1:
            return corrections[0]
        factors_L = torch.tensor(corrections, dtype=self.m_LMN.dtype)
        return to_device(factors_L, self.m_LMN.device)[:, None, None]


def step_adamw(
    parameters: Sequence[nn.Parameter],
    first_moments: list[Tensor],
    second_moments: list[Tensor],
    steps: list[Tensor],
    options: Mapping[str, Any],
) -> None:
    """Call the function that `torch.optim.AdamW` calls, with the arguments that it gives."""
    beta1, beta2 = options["betas"]
    adamw(
        list(parameters),
        [p.grad for p in parameters if p.grad is not None],
        first_moments,
        second_moments,
        [],
        steps,
        amsgrad=False,
        beta1=beta1,
        beta2=beta2,
        lr=options["lr"],
        weight_decay=options["weight_decay"],
        eps=options["eps"],
        maximize=False,
    )


def shape_stacks(stacks: Sequence[SideStack], *, transports: bool = False) -> None:
    """Bring what the groups say of their layers to the device, in one copy for each type.

    Args:
        stacks: Of one device.
        transports: Whether second moments move from the old basis to the new one.
    """
    if not stacks:
        return
    shapings = [stack.read_group() for stack in stacks]
    tensors = [tensor for shaping in shapings for tensor in shaping.tensors()]
    moved = iter(all_to_device(tensors, stacks[0].m_LMN.device))
    for stack, shaping in zip(stacks, shapings, strict=True):
        stack.shape(shaping.filled(moved), transports=transports)


def stacks_of(group: RankGroup, *, step_rule: str, damping: float) -> list[SideStack]:
    """Stack a group's layers by side, shape and rule."""
    members: dict[tuple[str, torch.Size, str], list[int]] = {}
    for index, layer in enumerate(group.layers):
        rule = "adam" if step_rule == "gauge" or not layer.natural_gradient else step_rule
        for side, parameter in (("lora_A", layer.lora_A), ("lora_B", layer.lora_B)):
            members.setdefault((side, parameter.shape, rule), []).append(index)
    return [
        SideStack(group, chosen, side, rule=rule, damping=damping)
        for (side, _, rule), chosen in members.items()
    ]
