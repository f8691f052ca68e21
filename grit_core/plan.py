"""`plan_adaptation`: decide exactly which layers adapt, with what, and why. Loads no torch."""

from collections.abc import Mapping, Sequence
from typing import Any

from grit_core.config.model_configs import (
    STRATEGY_PARAMETERS,
    Modality,
    ModelGRITConfig,
    validate,
)
from grit_core.draft import ModalityDraft, drafts_of, fill, overlap_faults, rank_of
from grit_core.errors import Fault, InvalidConfig, NoLayersMatched
from grit_core.estimate import Estimate, estimate, resolve_training
from grit_core.inventory import LayerRecord, ModelInventory
from grit_core.matching import experts_warning, family_warning
from grit_core.planned import AdaptationPlan, DroppedLayer, PlannedLayer, hash_of

__all__ = [
    "AdaptationPlan",
    "DroppedLayer",
    "Estimate",
    "PlannedLayer",
    "estimate",
    "plan_adaptation",
    "resolve_training",
]

SETTINGS = (
    "fisher_damping",
    "fisher_ema_decay",
    "fisher_update_freq",
    "projection_budget_start",
    "projection_budget_end",
    "projection_schedule",
    "projection_energy",
    "projection_update_freq",
    "step_rule",
    "initialization",
)
"""The fields of `ModelGRITConfig` that hold for all layers and that training consumes."""


def plan_adaptation(
    config: ModelGRITConfig,
    inventory: ModelInventory,
    *,
    overrides: Mapping[Modality, Sequence[str]] = {},
    pointer: str = "/config",
) -> AdaptationPlan:
    """Decide which layers of the model adapt.

    A modality without patterns takes its family's. A layer that two modalities choose is a fault:
    it can have one rank alone. What cannot be carried out raises `InvalidConfig` with every fault
    in it; `NoLayersMatched` when all faults are patterns or names that match no layer.

    Args:
        config: Resolved, see `grit_core.config.resolve_config`.
        inventory: The model's layers.
        overrides: Layer names or patterns that stand in for a modality's patterns and strategy;
            its rank, alpha, dropout and switches stay. Each must match.
        pointer: Where the configuration stands in the caller's request.
    """
    overridden = {Modality(modality): names for modality, names in overrides.items()}
    faults = [
        fault
        for fault in validate(config, pointer=pointer)
        if not _mooted(fault, overridden, pointer=pointer)
    ]
    drafts = drafts_of(config, overridden, pointer=pointer)
    if not drafts and not faults:
        faults.append(_nothing_configured(inventory, pointer=pointer))
    for draft in drafts:
        fill(draft, config, inventory, known_bad={fault.pointer for fault in faults})
        faults += draft.faults
    faults += overlap_faults(drafts)
    if faults:
        only_names = all(fault.code == "no_layers_matched" for fault in faults)
        raise NoLayersMatched(faults) if only_names else InvalidConfig(faults)
    return _plan(drafts, config, inventory)


def _mooted(fault: Fault, overridden: Mapping[Modality, Sequence[str]], *, pointer: str) -> bool:
    """Tell whether a fault concerns a strategy or patterns that an override replaces."""
    replaced = ("layer_patterns", "strategy", *STRATEGY_PARAMETERS)
    return any(
        fault.pointer == start or fault.pointer.startswith(f"{start}/")
        for modality in overridden
        for start in (f"{pointer}/{modality}/{name}" for name in replaced)
    )


def _nothing_configured(inventory: ModelInventory, *, pointer: str) -> Fault:
    known = "" if inventory.family is None else f", or the preset {inventory.family}_fast"
    return Fault(
        pointer=pointer,
        code="no_modality",
        detail="No modality is configured, so no layer would adapt; give vision, text, cross_modal"
        f" or fusion{known}.",
    )


def _plan(
    drafts: Sequence[ModalityDraft], config: ModelGRITConfig, inventory: ModelInventory
) -> AdaptationPlan:
    layers, dropped, warnings = [], [], []
    general = (family_warning(config, inventory), experts_warning(inventory))
    warnings += [warning for warning in general if warning is not None]
    warnings += _chat_format_warnings(inventory)
    for draft in drafts:
        warnings += draft.warnings
        if draft.selection is None:
            continue
        layers += [_planned(layer, draft, config) for layer in draft.selection.kept]
        dropped += [
            DroppedLayer(
                name=layer.name,
                modality=draft.modality,
                block=layer.block,
                reason=f"{draft.selection.reason}; max_layers_per_modality is"
                f" {config.max_layers_per_modality}.",
            )
            for layer in draft.selection.dropped
        ]
    settings: dict[str, Any] = {name: getattr(config, name) for name in SETTINGS}
    return AdaptationPlan(
        model_type=inventory.model_type,
        inventory_hash=inventory.hash,
        layers=tuple(layers),
        settings=settings,
        dropped=tuple(dropped),
        warnings=tuple(warnings),
        trainable_parameters=sum(layer.parameters for layer in layers),
        plan_hash=hash_of(
            model_type=inventory.model_type,
            inventory_hash=inventory.hash,
            layers=tuple(layers),
            settings=settings,
        ),
    )


def _chat_format_warnings(inventory: ModelInventory) -> list[str]:
    """Name a chat template that ends turns otherwise than the model ends texts."""
    chat = inventory.chat_format
    if chat is None or chat["ends_with_eos"] or not chat["end_of_turn"]:
        return []
    eos = f" ({', '.join(chat['eos_tokens'])})" if chat["eos_tokens"] else ""
    end = chat["end_of_turn"]
    return [f"Turns end with {end}, which is not the model's EOS{eos}; answers stop at both."]


def _planned(layer: LayerRecord, draft: ModalityDraft, config: ModelGRITConfig) -> PlannedLayer:
    own = draft.config
    rank = rank_of(own, config)
    return PlannedLayer(
        name=layer.name,
        modality=draft.modality,
        block=layer.block,
        rank=rank,
        alpha=config.global_alpha if own.alpha is None else own.alpha,
        dropout=config.global_dropout if own.dropout is None else own.dropout,
        in_features=layer.in_features,
        out_features=layer.out_features,
        parameters=rank * (layer.in_features + layer.out_features),
        reason=_reason(layer, draft),
        natural_gradient=own.enable_natural_gradient,
        projection=own.enable_projection,
        fisher_approximation=own.fisher_approximation,
        fisher_block_size=own.fisher_block_size,
    )


def _reason(layer: LayerRecord, draft: ModalityDraft) -> str:
    """Such as `last_n took the last 8 of 30 blocks; fits model.text_model.layers.*...`."""
    pattern = draft.pattern_of[layer.name]
    if draft.named and pattern == layer.name:
        return f"named in {draft.modality}_layers"
    chosen = draft.selection.reason if draft.selection is not None else ""
    origin = ", a default pattern of the family" if draft.by_default else ""
    fits = f"fits {pattern}{origin}"
    return f"{fits}, given in {draft.modality}_layers" if draft.named else f"{chosen}; {fits}"
