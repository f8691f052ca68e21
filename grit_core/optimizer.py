"""`GRITOptimizer`: AdamW for LoRA adapters in the eigenbasis of their rank-space factors.

The `ekfac` rule, after EKFAC (George et al. 2018) and SOAP (Vyas et al. 2024), in rank space. For a
layer with factors Z = U_Z diag(.) U_Z' and H = U_H diag(.) U_H' (see `grit_core.curvature`):

    A [R, I]:  m = b1 m + (1-b1) dA       v = b2 v + (1-b2) (U_H' dA)^2     rows turn with H
               A <- A - lr U_H [ (U_H' m^) / (sqrt(v^ + d mean v^) + eps) ]
    B [O, R]:  m = b1 m + (1-b1) dB       v = b2 v + (1-b2) (dB U_Z)^2      columns turn with Z
               B <- B - lr [ (m^ U_Z) / (sqrt(v^ + d mean v^) + eps) ] U_Z'

^ is Adam's bias correction, d is `fisher_damping`, relative to the side's mean second moment. The
first moment lives in the original coordinates and needs no transport; the second is carried to a
new basis by `transport_second_moment`. Until a layer has been observed it is stepped by torch's own
AdamW, and so are layers without natural gradient: bit for bit.

Layers whose matrices have equal shapes are stacked, so that a step is a dozen operations a shape
and not a dozen a parameter.

Shape suffixes: L layers of equal shape, R rank, M and N rows and columns of one side: [R, I] for A,
[O, R] for B.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from grit_core.curvature.capture import LayerSums
from grit_core.curvature.factors import transport_second_moment
from grit_core.curvature.rank_group import (
    AdaptedLayer,
    FisherSettings,
    LayerCurvature,
    RankGroup,
    group_by_rank,
    summarise_by_modality,
)

__all__ = [
    "AdaptedLayer",
    "FisherSettings",
    "GRITOptimizer",
    "LayerCurvature",
    "summarise_by_modality",
]


class SideStack:
    """One side (A or B) of layers of equal shape: Adam's moments and the basis that turns them."""

    def __init__(self, group: RankGroup, members: Sequence[int], side: str) -> None:
        self.group, self.members, self.side = group, tuple(members), side
        layers = [group.layers[index] for index in members]
        self.names = tuple(layer.name for layer in layers)
        self.parameters: list[nn.Parameter] = [getattr(layer, side) for layer in layers]
        first = self.parameters[0]
        self.m_LMN = torch.zeros(
            len(layers), *first.shape, dtype=torch.float32, device=first.device
        )
        """First moments, in the original coordinates."""
        self.v_LMN = torch.zeros_like(self.m_LMN)
        """Second moments, in the coordinates of `basis_LRR`."""
        self.steps = [0] * len(layers)
        self.basis_LRR = self._group_basis()

    def take_basis(self) -> None:
        """Carry the second moments to the bases that the group has now."""
        new_LRR = self._group_basis()
        if self.side == "lora_A":
            self.v_LMN = transport_second_moment(self.v_LMN, self.basis_LRR, new_LRR)
        else:
            v_LNM = transport_second_moment(self.v_LMN.mT, self.basis_LRR, new_LRR)
            self.v_LMN = v_LNM.mT.contiguous()
        self.basis_LRR = new_LRR

    def step(self, options: Mapping[str, Any], *, damping: float) -> None:
        """Step the layers that have a gradient."""
        active = [i for i, p in enumerate(self.parameters) if p.grad is not None]
        observed_L = self.group.observed_L
        turned = [i for i in active if observed_L[self.members[i]]]
        straight = [i for i in active if not observed_L[self.members[i]]]
        if straight:
            self._step_straight(straight, options)
        if turned:
            self._step_turned(turned, options, damping=damping)

    def state(self) -> dict[str, Any]:
        """Everything that later steps depend on; the bases are the group's."""
        return {"m": self.m_LMN, "v": self.v_LMN, "steps": list(self.steps)}

    def load(self, saved: Mapping[str, Any]) -> None:
        """Continue from `state` of a stack of the same layers, the group being loaded already."""
        self.m_LMN = saved["m"].to(self.m_LMN).clone()
        self.v_LMN = saved["v"].to(self.v_LMN).clone()
        self.steps = [int(number) for number in saved["steps"]]
        self.basis_LRR = self._group_basis()

    def _group_basis(self) -> Tensor:
        """The basis that turns the rank axis: H's for A, Z's for B."""
        basis = self.group.basis_H_LRR if self.side == "lora_A" else self.group.basis_Z_LRR
        return basis[list(self.members)]

    def _step_straight(self, chosen: Sequence[int], options: Mapping[str, Any]) -> None:
        """Step layers that no observation has reached, as AdamW does."""
        steps = [torch.tensor(float(self.steps[i])) for i in chosen]
        _adamw(
            [self.parameters[i] for i in chosen],
            [self.m_LMN[i] for i in chosen],
            [self.v_LMN[i] for i in chosen],
            steps,
            options,
        )
        for i in chosen:
            self.steps[i] += 1

    def _step_turned(
        self, chosen: Sequence[int], options: Mapping[str, Any], *, damping: float
    ) -> None:
        """Step layers in their eigenbasis."""
        beta1, beta2 = options["betas"]
        for i in chosen:
            self.steps[i] += 1
        parameters: list[Tensor] = [self.parameters[i] for i in chosen]
        # A slice is a view, so that the moments below change in place.
        whole = len(chosen) == len(self.parameters)
        pick = slice(None) if whole else torch.tensor(chosen, device=self.m_LMN.device)
        m_LMN, v_LMN, basis_LRR = self.m_LMN[pick], self.v_LMN[pick], self.basis_LRR[pick]
        gradient_LMN = torch.stack([p.grad for p in parameters if p.grad is not None])
        m_LMN.lerp_(gradient_LMN, 1 - beta1)
        turned_LMN = self._turn(gradient_LMN, basis_LRR)
        v_LMN.mul_(beta2).addcmul_(turned_LMN, turned_LMN, value=1 - beta2)
        if not whole:
            self.m_LMN[pick], self.v_LMN[pick] = m_LMN, v_LMN
        correction1, correction2 = (self._correction(beta, chosen) for beta in (beta1, beta2))
        second_LMN = v_LMN / correction2
        second_LMN += damping * second_LMN.mean((1, 2), keepdim=True)
        update_LMN = self._turn(m_LMN, basis_LRR) / correction1 * options["lr"]
        update_LMN /= second_LMN.sqrt_().add_(options["eps"])
        update_LMN = self._turn(update_LMN, basis_LRR.mT)
        if options["weight_decay"]:
            torch._foreach_mul_(parameters, 1 - options["lr"] * options["weight_decay"])
        torch._foreach_sub_(parameters, list(update_LMN.unbind()))

    def _turn(self, value_LMN: Tensor, basis_LRR: Tensor) -> Tensor:
        """Express the rank axis in a basis; with the transposed basis this undoes itself."""
        return basis_LRR.mT @ value_LMN if self.side == "lora_A" else value_LMN @ basis_LRR

    def _correction(self, beta: float, chosen: Sequence[int]) -> float | Tensor:
        """Adam's bias correction; one number as long as all layers have made the same steps."""
        corrections = [1 - beta ** self.steps[i] for i in chosen]
        if len(set(corrections)) == 1:
            return corrections[0]
        return torch.tensor(corrections, device=self.m_LMN.device)[:, None, None]


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
            layers: Adapters stepped with the natural gradient; their matrices are float32, which
                is what PEFT makes of them whatever the base model's type.
            plain: Parameters stepped by torch's AdamW.
            fisher: Damping, decay and frequency of the factors.
            lr: Learning rate.
            betas: Decay of the first and second moment.
            eps: Added to the root of the second moment.
            weight_decay: Decoupled, as in AdamW.

        Raises:
            ValueError: A layer is not float32.
        """
        chosen, self._plain = list(layers), list(plain)
        for layer in chosen:
            if {layer.lora_A.dtype, layer.lora_B.dtype} != {torch.float32}:
                raise ValueError(
                    f"The adapter of {layer.name} is {layer.lora_A.dtype} and {layer.lora_B.dtype};"
                    " keep adapters in float32 and let autocast choose the type of computation."
                )
        parameters = [p for layer in chosen for p in (layer.lora_A, layer.lora_B)] + self._plain
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(parameters, defaults)
        self.fisher = fisher or FisherSettings()
        self.skipped_observations = 0
        """Layers' observations that were refused because they were not finite."""
        self.rank_groups = group_by_rank(chosen)
        self.stacks = [stack for group in self.rank_groups for stack in _stacks_of(group)]
        self._modality = {layer.name: layer.modality for layer in chosen}
        self._num_steps = 0

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Take the one group of parameters that `__init__` makes.

        Raises:
            ValueError: There is a group already; the layers are grouped by shape, not by options.
        """
        if self.param_groups:
            raise ValueError("GRITOptimizer has one parameter group; give all layers at once.")
        super().add_param_group(param_group)

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
        unseen = not any(any(group.observed_L) for group in self.rank_groups)
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
                for stack in self.stacks:
                    if stack.group is group:
                        stack.take_basis()
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
        """Everything that later steps depend on: tensors and plain values alone."""
        options = self.param_groups[0]
        return {
            "options": {key: value for key, value in options.items() if key != "params"},
            "layers": [layer.name for layer in self.layers],
            "num_steps": self._num_steps,
            "skipped_observations": self.skipped_observations,
            "groups": [group.state() for group in self.rank_groups],
            "stacks": [stack.state() for stack in self.stacks],
            "plain": [dict(self.state[p]) for p in self._plain],
        }

    @torch.no_grad()
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue from `state_dict` of an optimizer over the same layers.

        Raises:
            ValueError: It belongs to other layers.
        """
        own = [layer.name for layer in self.layers]
        if list(state_dict["layers"]) != own or len(state_dict["plain"]) != len(self._plain):
            raise ValueError("This optimizer state belongs to other layers.")
        for stack, saved in zip(self.stacks, state_dict["stacks"], strict=True):
            if saved["m"].shape != stack.m_LMN.shape:
                raise ValueError(
                    f"This optimizer state belongs to layers of another shape: {stack.side} was"
                    f" {tuple(saved['m'].shape)} and is {tuple(stack.m_LMN.shape)}."
                )
        options = dict(state_dict["options"])
        options["betas"] = tuple(options["betas"])
        self.param_groups[0].update(options)
        self._num_steps = int(state_dict["num_steps"])
        self.skipped_observations = int(state_dict["skipped_observations"])
        for group, saved in zip(self.rank_groups, state_dict["groups"], strict=True):
            group.load(saved)
        for stack, saved in zip(self.stacks, state_dict["stacks"], strict=True):
            stack.load(saved)
        for parameter, saved in zip(self._plain, state_dict["plain"], strict=True):
            self.state[parameter] = {key: value.clone() for key, value in saved.items()}

    def _step_plain(self, options: Mapping[str, Any]) -> None:
        """Step the parameters without natural gradient exactly as `torch.optim.AdamW` does."""
        active = [p for p in self._plain if p.grad is not None]
        if not active:
            return
        for parameter in active:
            state = self.state[parameter]
            if not state:
                state["step"] = torch.zeros((), dtype=torch.float32)
                state["exp_avg"] = torch.zeros_like(parameter)
                state["exp_avg_sq"] = torch.zeros_like(parameter)
        states = [self.state[p] for p in active]
        _adamw(
            active,
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [state["step"] for state in states],
            options,
        )


def _adamw(
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


def _stacks_of(group: RankGroup) -> list[SideStack]:
    shapes: dict[tuple[str, torch.Size], list[int]] = {}
    for index, layer in enumerate(group.layers):
        shapes.setdefault(("lora_A", layer.lora_A.shape), []).append(index)
        shapes.setdefault(("lora_B", layer.lora_B.shape), []).append(index)
    return [SideStack(group, members, side) for (side, _), members in shapes.items()]
