"""`VLMGRITAdapter`: a model with LoRA on exactly the layers of a plan.

The LoRA layers are PEFT's. PEFT is given every layer by its full name, never a pattern, and what
it wrapped is compared with the plan afterwards: it matches names by suffix, and a plan is a
promise.
"""

import math
import re
from collections import Counter
from collections.abc import Sequence
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
from grit_core.models.inventory import inventory_of
from grit_core.optimizer import AdaptedLayer, FisherSettings, GRITOptimizer
from grit_core.plan import AdaptationPlan, plan_adaptation

ADAPTER = "default"
"""PEFT's name for the one adapter of a model in training."""


def lora_config_of(plan: AdaptationPlan) -> LoraConfig:
    """Return the PEFT configuration that a plan amounts to.

    The commonest rank and alpha are PEFT's `r` and `lora_alpha`; other layers go into
    `rank_pattern` and `alpha_pattern` under their full, escaped names, which plain PEFT reads
    back exactly.
    """
    rank = Counter(layer.rank for layer in plan.layers).most_common(1)[0][0]
    alpha = Counter(layer.alpha for layer in plan.layers).most_common(1)[0][0]
    dropout = Counter(layer.dropout for layer in plan.layers).most_common(1)[0][0]
    return LoraConfig(
        r=rank,
        lora_alpha=_plain_number(alpha),
        lora_dropout=dropout,
        target_modules=sorted(layer.name for layer in plan.layers),
        rank_pattern={re.escape(x.name): x.rank for x in plan.layers if x.rank != rank},
        alpha_pattern={
            re.escape(x.name): _plain_number(x.alpha) for x in plan.layers if x.alpha != alpha
        },
    )


def inject_lora(model: nn.Module, plan: AdaptationPlan, *, seed: int = 0) -> PeftModel:
    """Put LoRA on the layers of the plan, in place, and return the wrapped model.

    A starts Kaiming-uniform from a generator of its own, B at zero, both in float32 whatever the
    base model's type.

    Args:
        model: A transformers model whose layers are those the plan was made from.
        plan: Which layers, with which ranks.
        seed: Of the initialisation alone.

    Raises:
        PlanMismatch: The model has other layers than the plan was made from, or PEFT wrapped other
            layers than planned.
    """
    found = inventory_of(model).hash
    if found != plan.inventory_hash:
        detail = (
            f"The plan was made for layers that hash to {plan.inventory_hash[:12]}; this model's "
            f"hash to {found[:12]}. Plan again with this model."
        )
        raise PlanMismatch([Fault(pointer="/model", code="plan_mismatch", detail=detail)])
    adapted = get_peft_model(model, lora_config_of(plan))
    wrapped = lora_layers(adapted)
    planned = [layer.name for layer in plan.layers]
    if set(wrapped) != set(planned):
        differing = sorted(set(wrapped) ^ set(planned))
        detail = f"PEFT wrapped other layers than planned: {', '.join(differing[:5])}."
        raise PlanMismatch([Fault(pointer="/config", code="plan_mismatch", detail=detail)])
    generator = torch.Generator().manual_seed(seed)
    for layer in plan.layers:
        module = wrapped[layer.name]
        dropout = nn.Dropout(layer.dropout) if layer.dropout > 0 else nn.Identity()
        module.lora_dropout[ADAPTER] = dropout
        _initialise(module, generator)
    return adapted


def lora_layers(model: nn.Module) -> dict[str, LoraLayer]:
    """Return PEFT's LoRA layers by the name that the layer has in the base model."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    return {name: m for name, m in base.named_modules() if isinstance(m, LoraLayer)}


def adapted_layers(model: PeftModel, plan: AdaptationPlan) -> list[AdaptedLayer]:
    """Return the planned layers that use the natural gradient, as the optimizer takes them."""
    wrapped = lora_layers(model)
    return [
        AdaptedLayer(
            name=layer.name,
            modality=layer.modality.value,
            lora_A=wrapped[layer.name].lora_A[ADAPTER].weight,
            lora_B=wrapped[layer.name].lora_B[ADAPTER].weight,
            fisher_approximation=layer.fisher_approximation,
        )
        for layer in plan.layers
        if layer.natural_gradient
    ]


def build_optimizer(
    model: PeftModel, plan: AdaptationPlan, config: ModelGRITConfig, **options: Any
) -> GRITOptimizer:
    """Return the GRIT optimizer of an adapted model; `options` are AdamW's."""
    wrapped = lora_layers(model)
    plain = [
        parameter
        for layer in plan.layers
        if not layer.natural_gradient
        for parameter in (
            wrapped[layer.name].lora_A[ADAPTER].weight,
            wrapped[layer.name].lora_B[ADAPTER].weight,
        )
    ]
    fisher = FisherSettings(
        damping=config.fisher_damping,
        ema_decay=config.fisher_ema_decay,
        update_freq=config.fisher_update_freq,
    )
    return GRITOptimizer(adapted_layers(model, plan), plain=plain, fisher=fisher, **options)


def build_capture(model: PeftModel, plan: AdaptationPlan) -> CurvatureCapture:
    """Return the hooks over the planned layers that use the natural gradient."""
    wrapped = lora_layers(model)
    names = [layer.name for layer in plan.layers if layer.natural_gradient]
    return CurvatureCapture(
        {name: wrapped[name].lora_A[ADAPTER] for name in names},
        {name: wrapped[name].lora_B[ADAPTER] for name in names},
    )


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

    def optimizer(self, **options: Any) -> GRITOptimizer:
        """Return the GRIT optimizer over this adapter; `options` are AdamW's."""
        return build_optimizer(self.model, self.plan, self.config, **options)

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
