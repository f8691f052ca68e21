"""`GRITOptimizer`: AdamW for LoRA adapters, shaped by their rank-space factors.

For a layer with factors Z = U_Z diag(.) U_Z' and H = U_H diag(.) U_H' (see `grit_core.curvature`)
the default rule, `ekfac`, after EKFAC (George et al. 2018) and SOAP (Vyas et al. 2024), is

    A [R, I]:  m = b1 m + (1-b1) dA       v = b2 v + (1-b2) (U_H' dA)^2     rows turn with H
               A <- A - lr U_H [ (U_H' m^) / (sqrt(v^ + d mean v^) + eps) ]
    B [O, R]:  m = b1 m + (1-b1) dB       v = b2 v + (1-b2) (dB U_Z)^2      columns turn with Z
               B <- B - lr [ (m^ U_Z) / (sqrt(v^ + d mean v^) + eps) ] U_Z'

^ is Adam's bias correction, d is `fisher_damping`, relative to the side's mean second moment. The
first moment lives in the original coordinates; the second is carried from basis to basis by squared
overlaps. The other rules are in `grit_core.curvature.side_stack`. Until a layer has been observed
it is stepped by torch's own AdamW, and so are layers with neither natural gradient nor projection:
bit for bit.

Layers with projection, and all layers of the `gauge` rule, are written in the canonical Fisher
gauge every `update_freq` steps (`grit_core.curvature.gauge`), with their moments; the projection
budget then says which directions move (`grit_core.curvature.projection`).

Layers whose matrices have equal shapes are stacked, so that a step is a dozen operations a shape
and not a dozen a parameter.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from grit_core.curvature.capture import LayerSums, sums_on_host
from grit_core.curvature.projection import Budget, ProjectionSettings, allocate, requested_budget
from grit_core.curvature.rank_group import (
    AdaptedLayer,
    FisherSettings,
    LayerCurvature,
    RankGroup,
    group_by_rank,
    summarise_by_modality,
)
from grit_core.curvature.side_stack import shape_stacks, stacks_of, step_adamw
from grit_core.transfer import all_to_device, all_to_host

if TYPE_CHECKING:
    from grit_core.curvature.gauge import Gauge

__all__ = [
    "STEP_RULES",
    "AdaptedLayer",
    "FisherSettings",
    "GRITOptimizer",
    "LayerCurvature",
    "ProjectionSettings",
    "Reprojection",
    "budgets_by_modality",
    "summarise_by_modality",
]

STEP_RULES = ("ekfac", "kfac", "gauge", "paper")


@dataclass(frozen=True, kw_only=True, slots=True)
class Reprojection:
    """What one reprojection did."""

    budgets: Mapping[str, Budget] = field(default_factory=dict)
    """By modality with projection."""
    refused: tuple[str, ...] = ()
    """Observed layers whose gauge was too badly conditioned; they keep their coordinates."""


class GRITOptimizer(torch.optim.Optimizer):
    """AdamW on LoRA adapters, shaped by their rank-space factors once these are observed."""

    def __init__(  # noqa: PLR0913 - four of them are AdamW's
        self,
        layers: Iterable[AdaptedLayer],
        *,
        plain: Iterable[nn.Parameter] = (),
        fisher: FisherSettings | None = None,
        projection: ProjectionSettings | None = None,
        step_rule: str = "ekfac",
        total_steps: int | None = None,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        """Collect the parameters.

        Args:
            layers: Adapters with natural gradient, projection or both; their matrices are float32,
                which is what PEFT makes of them whatever the base model's type, or float64.
            plain: Parameters stepped by torch's AdamW.
            fisher: Damping, decay and frequency of the factors.
            projection: Budget and frequency of the reprojections, for layers that ask for it.
            step_rule: `ekfac`, `kfac`, `gauge` or `paper`.
            total_steps: Of the whole job; a budget that moves needs it.
            lr: Learning rate.
            betas: Decay of the first and second moment.
            eps: Added to the root of the second moment.
            weight_decay: Decoupled, as in AdamW.

        Raises:
            ValueError: A layer is in half precision, there is no such rule, or a budget that moves
                has no number of steps to move over.
        """
        chosen, self._plain = list(layers), list(plain)
        for layer in chosen:
            types = {layer.lora_A.dtype, layer.lora_B.dtype}
            if types not in ({torch.float32}, {torch.float64}):
                raise ValueError(
                    f"The adapter of {layer.name} is {layer.lora_A.dtype} and {layer.lora_B.dtype};"
                    " keep adapters in float32 and let autocast choose the type of computation."
                )
        if step_rule not in STEP_RULES:
            raise ValueError(f"{step_rule!r} is no step rule; use {', '.join(STEP_RULES)}.")
        self.fisher = fisher or FisherSettings()
        self.projection = projection or ProjectionSettings()
        moving = self.projection.schedule not in {"constant", "adaptive"}
        if moving and total_steps is None and any(layer.projection for layer in chosen):
            raise ValueError(
                f"The projection budget moves ({self.projection.schedule}) over the steps of the"
                " job; give total_steps, take projection_schedule constant, or set"
                " enable_projection to false."
            )
        parameters = [p for layer in chosen for p in (layer.lora_A, layer.lora_B)] + self._plain
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(parameters, defaults)
        self.total_steps = total_steps
        self.skipped_observations = 0
        """Layers' observations that were refused because they were not finite."""
        self.budgets: dict[str, Budget] = {}
        """By modality with projection, as last allocated."""
        self.reprojection: Reprojection | None = None
        """What the last step's reprojection did; none if it had none."""
        self.rank_groups = group_by_rank(chosen)
        self.stacks = [
            stack
            for group in self.rank_groups
            for stack in stacks_of(group, step_rule=step_rule, damping=self.fisher.damping)
        ]
        self._reprojects = {
            layer.name: layer.projection or (step_rule == "gauge" and layer.natural_gradient)
            for layer in chosen
        }
        shape_stacks(self.stacks)
        self._modality = {layer.name: layer.modality for layer in chosen}
        self._num_steps = 0
        self._reprojected = False

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
        """The layers with natural gradient, projection or both."""
        return tuple(layer for group in self.rank_groups for layer in group.layers)

    def observation_due(self) -> bool:
        """Tell whether the coming step should be observed.

        Every `update_freq`-th step, and each step until a first observation has succeeded: while
        B is zero there is no gradient in rank space to observe.
        """
        if not self.rank_groups:
            return False
        return not self._any_observed() or self._num_steps % self.fisher.update_freq == 0

    def observe(self, sums: Mapping[str, LayerSums]) -> int:
        """Fold one observation into the factors and turn the second moments to the new bases.

        Returns:
            How many layers were refused because their sums are not finite.
        """
        refused, moved = 0, []
        sums = sums_on_host(sums)
        for group in self.rank_groups:
            taken, bad = group.observe(sums, self.fisher)
            refused += bad
            if taken:
                moved.append(group)
        shape_stacks([s for s in self.stacks if s.group in moved], transports=True)
        self.skipped_observations += refused
        return refused

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # closures are not used
        """Step every parameter that has a gradient; reproject when that is due.

        Raises:
            ValueError: A closure was given; second moments need the gradients that are there.
        """
        if closure is not None:
            raise ValueError("GRITOptimizer takes no closure; call backward before step.")
        options = self.param_groups[0]
        for stack in self.stacks:
            stack.step(options)
        self._step_plain(options)
        self._end_step()

    @torch.no_grad()
    def skip_step(self) -> None:
        """Count a step of the job that brought no update, so that the budget reaches its end."""
        self._end_step()

    def curvature(self) -> dict[str, LayerCurvature]:
        """What the factors say of each observed layer."""
        found: dict[str, LayerCurvature] = {}
        for group in self.rank_groups:
            found |= group.curvature()
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
            "reprojected": self._reprojected,
            "skipped_observations": self.skipped_observations,
            "budgets": {
                name: [budget.requested, budget.effective, budget.num_directions]
                for name, budget in self.budgets.items()
            },
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
        self._reprojected = bool(state_dict["reprojected"])
        self.skipped_observations = int(state_dict["skipped_observations"])
        self.budgets = {
            name: Budget(requested=requested, effective=effective, num_directions=number)
            for name, (requested, effective, number) in state_dict["budgets"].items()
        }
        for group, saved in zip(self.rank_groups, state_dict["groups"], strict=True):
            group.load(saved)
        for stack, saved in zip(self.stacks, state_dict["stacks"], strict=True):
            stack.load(saved)
        shape_stacks(self.stacks)
        for parameter, saved in zip(self._plain, state_dict["plain"], strict=True):
            # AdamW keeps the number of steps on the CPU.
            self.state[parameter] = {
                key: (value if key == "step" else value.to(parameter)).clone()
                for key, value in saved.items()
            }

    def _end_step(self) -> None:
        self._num_steps += 1
        self.reprojection = self._reproject() if self._reprojection_due() else None

    def _any_observed(self) -> bool:
        return any(any(group.observed_L) for group in self.rank_groups)

    def _reprojection_due(self) -> bool:
        """At the first step with factors, every `update_freq` steps, and at the last one."""
        if not any(self._reprojects.values()) or not self._any_observed():
            return False
        every = self._num_steps % self.projection.update_freq == 0
        return every or not self._reprojected or self._num_steps == self.total_steps

    def _reproject(self) -> Reprojection:
        """Write the layers in the canonical gauge, then give out the budget."""
        entered = [(group, places) for group in self.rank_groups if (places := self._due(group))]
        stacks = [s for s in self.stacks if any(s.group is group for group, _ in entered)]
        # Once to the host and once back, for all layers together: each copy is a wait.
        parameters = [
            parameter
            for group, places in entered
            for place in places
            for parameter in (group.layers[place].lora_A, group.layers[place].lora_B)
        ]
        on_host = iter(all_to_host([*parameters, *(stack.m_LMN for stack in stacks)]))
        refused: list[str] = []
        gauges: dict[int, Gauge] = {}
        moved: list[Tensor] = []
        for group, places in entered:
            adapters = {place: (next(on_host), next(on_host)) for place in places}
            gauge = gauges[id(group)] = group.gauge(adapters, damping=self.fisher.damping)
            sound_L = gauge.sound_L.tolist()
            refused += [group.layers[place].name for place in places if not sound_L[place]]
            moved += [side for pair in group.enter(gauge, adapters).values() for side in pair]
        self._allocate()
        # Only now, for a basis keeps active and frozen directions apart.
        for group, _ in entered:
            group.take_bases()
        for stack in stacks:
            moved += stack.moved(gauges[id(stack.group)], next(on_host))
        if moved:
            there = iter(all_to_device(moved, parameters[0].device))
            for parameter in parameters:
                parameter.copy_(next(there))
            for stack in stacks:
                stack.enter(next(there), next(there))
        shape_stacks(stacks)
        self._reprojected = True
        return Reprojection(budgets=dict(self.budgets), refused=tuple(refused))

    def _due(self, group: RankGroup) -> list[int]:
        """Places of the group's layers that are written in the gauge."""
        return [
            place
            for place, (layer, seen) in enumerate(zip(group.layers, group.observed_L, strict=True))
            if seen and self._reprojects[layer.name]
        ]

    def _allocate(self) -> None:
        """Give every modality's budget to the strongest directions of its observed layers."""
        energies: dict[str, dict[str, Tensor]] = {}
        for group in self.rank_groups:
            observed_L = group.observed_L
            for layer, energy_R, seen in zip(
                group.layers, group.energies_LR(), observed_L, strict=True
            ):
                if layer.projection and seen:
                    energies.setdefault(layer.modality, {})[layer.name] = energy_R
        active: dict[str, Tensor] = {}
        for modality, of_layers in energies.items():
            requested = requested_budget(
                self.projection,
                step=self._num_steps,
                total_steps=self.total_steps or 0,
                energies=list(of_layers.values()),
            )
            self.budgets[modality], chosen = allocate(of_layers, requested)
            active |= chosen
        for group in self.rank_groups:
            for index, layer in enumerate(group.layers):
                if layer.name in active:
                    group.active_LR[index] = active[layer.name]

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
        step_adamw(
            active,
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [state["step"] for state in states],
            options,
        )


def budgets_by_modality(optimizer: GRITOptimizer) -> dict[str, dict[str, float]]:
    """Return what each modality's budget is, and what dropping the frozen directions would cost."""
    found: dict[str, dict[str, float]] = {
        modality: {
            "requested_budget": budget.requested,
            "effective_budget": budget.effective,
            "num_directions": budget.num_directions,
            "predicted_kl": 0.0,
        }
        for modality, budget in optimizer.budgets.items()
    }
    for group in optimizer.rank_groups:
        for layer, cost in zip(group.layers, group.frozen_kl_L().tolist(), strict=True):
            if layer.projection and layer.modality in found:
                found[layer.modality]["predicted_kl"] += cost
    return found
