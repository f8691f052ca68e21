"""`VLMGRITAdapter`: a model with LoRA on exactly the layers of a plan.

The LoRA layers are PEFT's. PEFT is given every layer by its full name, never a pattern, and what
it wrapped is compared with the plan afterwards: it matches names by suffix, and a plan is a
promise.
"""

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn

from grit_core.config.model_configs import GRITLoRAConfig, Modality, ModelGRITConfig
from grit_core.config.presets import resolve_config
from grit_core.curvature.capture import CurvatureCapture
from grit_core.errors import Fault, InvalidConfig, PlanMismatch
from grit_core.library_errors import library_errors_as, reason
from grit_core.models.inventory import inventory_of
from grit_core.models.pretrained import known_warnings_ignored
from grit_core.optimizer import (
    AdaptedLayer,
    FisherSettings,
    GRITOptimizer,
    ProjectionSettings,
)
from grit_core.plan import AdaptationPlan, PlannedLayer, plan_adaptation

ADAPTER = "default"
"""PEFT's name for the one adapter of a model in training."""


def lora_config_of(plan: AdaptationPlan, *, spared: Sequence[str] = ()) -> LoraConfig:
    """Return the PEFT configuration that a plan amounts to.

    The commonest rank and alpha are PEFT's `r` and `lora_alpha`; other layers go into
    `rank_pattern` and `alpha_pattern` under their full, escaped names, which plain PEFT reads
    back exactly. PEFT knows one dropout; the commonest is recorded, and `inject_lora` gives every
    layer its own.

    Args:
        plan: Which layers, with which ranks.
        spared: Layers outside the plan whose names end like a planned one's; PEFT matches by
            suffix, so they are excluded by an expression that fits their full names alone.
    """
    rank = Counter(layer.rank for layer in plan.layers).most_common(1)[0][0]
    alpha = Counter(layer.alpha for layer in plan.layers).most_common(1)[0][0]
    dropout = Counter(layer.dropout for layer in plan.layers).most_common(1)[0][0]
    return LoraConfig(
        r=rank,
        lora_alpha=_plain_number(alpha),
        lora_dropout=dropout,
        target_modules=sorted(layer.name for layer in plan.layers),
        exclude_modules="|".join(re.escape(name) for name in sorted(spared)) or None,
        rank_pattern=layer_pattern({x.name: x.rank for x in plan.layers}, common=rank),
        alpha_pattern=layer_pattern(
            {x.name: _plain_number(x.alpha) for x in plan.layers}, common=_plain_number(alpha)
        ),
    )


def inject_lora(model: nn.Module, plan: AdaptationPlan, *, seed: int = 0) -> PeftModel:
    """Put LoRA on the layers of the plan, in place, and return the wrapped model.

    A starts Kaiming-uniform from a generator of its own, B at zero, both in float32 whatever the
    base model's type. The model stays in training or evaluation mode, whichever it was in.

    A model with other layers than the plan was made from is refused with `PlanMismatch`, and so is
    an outcome in which PEFT wrapped other layers, or with other ranks, than planned. Layers that
    PEFT cannot adapt raise `InvalidConfig`.

    Args:
        model: A transformers model whose layers are those the plan was made from.
        plan: Which layers, with which ranks.
        seed: Of the initialisation alone.
    """
    plan.check_model(inventory_of(model).hash)
    training = model.training
    names = [layer.name for layer in plan.layers]
    config = lora_config_of(
        plan, spared=spared_modules(names, [name for name, _ in model.named_modules()])
    )
    with known_warnings_ignored(), library_errors_as(_not_adaptable):
        adapted = get_peft_model(model, config)
    wrapped = lora_layers(adapted)
    _refuse_other_layers(wrapped, plan)
    # PEFT shortens a long list to suffixes that are unique in this model; a reader wants names.
    adapted.peft_config[ADAPTER].target_modules = set(names)
    generator = torch.Generator().manual_seed(seed)
    for layer in plan.layers:
        module = wrapped[layer.name]
        dropout = nn.Dropout(layer.dropout) if layer.dropout > 0 else nn.Identity()
        module.lora_dropout[ADAPTER] = dropout
        _initialise(module, generator)
    return adapted.train(training)


def lora_layers(model: nn.Module) -> dict[str, LoraLayer]:
    """Return PEFT's LoRA layers by the name that the layer has in the base model."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    return {name: m for name, m in base.named_modules() if isinstance(m, LoraLayer)}


def adapted_layers(model: PeftModel, plan: AdaptationPlan) -> list[AdaptedLayer]:
    """Return the planned layers that the optimizer observes, as it takes them."""
    wrapped = lora_layers(model)
    return [
        AdaptedLayer(
            name=layer.name,
            modality=layer.modality.value,
            lora_A=wrapped[layer.name].lora_A[ADAPTER].weight,
            lora_B=wrapped[layer.name].lora_B[ADAPTER].weight,
            fisher_approximation=layer.fisher_approximation,
            fisher_block_size=layer.fisher_block_size,
            natural_gradient=layer.natural_gradient,
            projection=layer.projection,
        )
        for layer in plan.layers
        if _observed(layer)
    ]


def build_optimizer(
    model: PeftModel,
    plan: AdaptationPlan,
    config: ModelGRITConfig,
    *,
    total_steps: int | None = None,
    **options: Any,
) -> GRITOptimizer:
    """Return the GRIT optimizer of an adapted model.

    Args:
        model: As `inject_lora` left it.
        plan: The same plan.
        config: What the plan was made from.
        total_steps: Optimizer steps of the whole job; a projection budget that moves needs it.
        **options: AdamW's.
    """
    wrapped = lora_layers(model)
    plain = [
        parameter
        for layer in plan.layers
        if not _observed(layer)
        for parameter in (
            wrapped[layer.name].lora_A[ADAPTER].weight,
            wrapped[layer.name].lora_B[ADAPTER].weight,
        )
    ]
    return GRITOptimizer(
        adapted_layers(model, plan),
        plain=plain,
        fisher=FisherSettings(
            damping=config.fisher_damping,
            ema_decay=config.fisher_ema_decay,
            update_freq=config.fisher_update_freq,
        ),
        projection=ProjectionSettings(
            budget_start=config.projection_budget_start,
            budget_end=config.projection_budget_end,
            schedule=config.projection_schedule,
            energy=config.projection_energy,
            update_freq=config.projection_update_freq,
        ),
        step_rule=config.step_rule,
        total_steps=total_steps,
        **options,
    )


def build_capture(model: PeftModel, plan: AdaptationPlan) -> CurvatureCapture:
    """Return the hooks over the planned layers with natural gradient or projection."""
    return capture_of(model, [layer.name for layer in plan.layers if _observed(layer)])


def capture_of(model: PeftModel, names: Sequence[str]) -> CurvatureCapture:
    """Return the hooks over adapted layers of these names."""
    wrapped = lora_layers(model)
    return CurvatureCapture(
        {name: wrapped[name].lora_A[ADAPTER] for name in names},
        {name: wrapped[name].lora_B[ADAPTER] for name in names},
    )


def _observed(layer: PlannedLayer) -> bool:
    """Tell whether a layer's factors are needed."""
    return layer.natural_gradient or layer.projection


class VLMGRITAdapter:
    """A model with GRIT adapters, by a configuration or a preset: the guide's entry point."""

    def __init__(
        self,
        model: nn.Module,
        config: ModelGRITConfig | GRITLoRAConfig | None = None,
        model_config_name: str | None = None,
        vision_layers: Sequence[str] | None = None,
        text_layers: Sequence[str] | None = None,
        cross_modal_layers: Sequence[str] | None = None,
        *,
        seed: int = 0,
    ) -> None:
        """Plan, and put LoRA on the planned layers of `model`, in place.

        Args:
            model: A transformers model.
            config: A complete `ModelGRITConfig`, or with a preset the settings laid over it.
            model_config_name: A preset's name.
            vision_layers: Layer names or patterns that replace the vision modality's own.
            text_layers: The same for text.
            cross_modal_layers: The same for the connector.
            seed: Of the adapter's initialisation.

        Raises:
            InvalidConfig: Every fault of the configuration; `NoLayersMatched` when nothing matches.
        """
        if not isinstance(config, ModelGRITConfig) and model_config_name is None:
            detail = "Give a ModelGRITConfig, or the name of a preset."
            raise InvalidConfig([Fault(pointer="/config", code="missing", detail=detail)])
        self.config = resolve_config(config, preset=model_config_name)
        named = {
            Modality.VISION: vision_layers,
            Modality.TEXT: text_layers,
            Modality.CROSS_MODAL: cross_modal_layers,
        }
        overrides = {
            modality: list(names) for modality, names in named.items() if names is not None
        }
        self.plan = plan_adaptation(self.config, inventory_of(model), overrides=overrides)
        self.model = inject_lora(model, self.plan, seed=seed)

    def summary(self) -> str:
        """One line for each modality: layers, ranks, parameters."""
        lines = []
        for modality in Modality:
            layers = [layer for layer in self.plan.layers if layer.modality == modality]
            if layers:
                ranks = "/".join(str(rank) for rank in sorted({layer.rank for layer in layers}))
                size = sum(layer.parameters for layer in layers)
                lines.append(f"{modality}: {len(layers)} layers, rank {ranks}, {size:,} parameters")
        size = self.plan.trainable_parameters
        lines.append(f"total: {len(self.plan.layers)} layers, {size:,} parameters")
        return "\n".join([*lines, *self.plan.warnings])

    def optimizer(self, *, total_steps: int | None = None, **options: Any) -> GRITOptimizer:
        """Return the GRIT optimizer over this adapter.

        Args:
            total_steps: Optimizer steps to come; a projection budget that moves needs it.
            **options: AdamW's.
        """
        return build_optimizer(
            self.model, self.plan, self.config, total_steps=total_steps, **options
        )

    def capture(self) -> CurvatureCapture:
        """Return the hooks that observe this adapter's curvature."""
        return build_capture(self.model, self.plan)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the adapter as a PEFT folder (safetensors)."""
        self.model.save_pretrained(str(folder), safe_serialization=True)

    def merge(self) -> nn.Module:
        """Fold the adapter into the base weights and return the plain model."""
        merged: nn.Module = self.model.merge_and_unload()
        return merged


def spared_modules(planned: Sequence[str], modules: Sequence[str]) -> list[str]:
    """The modules that PEFT would take for planned ones, because their names end alike."""
    own = set(planned)
    return [
        module
        for module in modules
        if module not in own
        and any(module[dot + 1 :] in own for dot, letter in enumerate(module) if letter == ".")
    ]


def layer_pattern(values: Mapping[str, Any], *, common: Any) -> dict[str, Any]:
    """The layers that differ from the common value, under escaped full names.

    PEFT takes a pattern for every name that ends with it; where another planned layer's does, the
    pattern is anchored at the beginning.
    """
    patterns = {}
    for name, value in values.items():
        if value != common:
            shared = any(other.endswith(f".{name}") for other in values)
            patterns[f"^{re.escape(name)}" if shared else re.escape(name)] = value
    return patterns


def _refuse_other_layers(wrapped: Mapping[str, LoraLayer], plan: AdaptationPlan) -> None:
    """Compare what PEFT did with the plan.

    Raises:
        PlanMismatch: They differ, in a layer, a rank or a scale.
    """
    planned = {layer.name: (layer.rank, layer.alpha / layer.rank) for layer in plan.layers}
    found = {name: (m.r[ADAPTER], m.scaling[ADAPTER]) for name, m in wrapped.items()}
    differing = sorted(
        name for name in planned.keys() | found.keys() if planned.get(name) != found.get(name)
    )
    if differing:
        detail = (
            f"PEFT adapted other layers, or otherwise, than planned: {', '.join(differing[:5])}."
        )
        raise PlanMismatch([Fault(pointer="/plan", code="plan_mismatch", detail=detail)])


def _not_adaptable(error: Exception) -> InvalidConfig:
    detail = f"PEFT cannot adapt a planned layer; leave it out of the patterns. {reason(error)}"
    return InvalidConfig([Fault(pointer="/config", code="layer_not_adaptable", detail=detail)])


def _initialise(module: LoraLayer, generator: torch.Generator) -> None:
    lora_A, lora_B = module.lora_A[ADAPTER].weight, module.lora_B[ADAPTER].weight
    start = torch.empty(lora_A.shape, dtype=torch.float32)
    nn.init.kaiming_uniform_(start, a=math.sqrt(5), generator=generator)
    with torch.no_grad():
        lora_A.copy_(start)
        lora_B.zero_()


def _plain_number(value: float) -> int | float:
    """A whole number as an int, as adapter configurations usually hold it."""
    return int(value) if float(value).is_integer() else float(value)
