"""One modality's way into a plan: what it names, matches and chooses, and what is wrong with it."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from grit_core.config.bounds import wrong_type
from grit_core.config.model_configs import (
    PARAMETER_OF_STRATEGY,
    STRATEGY_PARAMETERS,
    LayerSelectionStrategy,
    Modality,
    ModalityConfig,
    ModelGRITConfig,
    validate_modality,
)
from grit_core.errors import Fault, InvalidConfig
from grit_core.inventory import LayerRecord, ModelInventory
from grit_core.matching import (
    default_patterns,
    match_layers,
    no_default_fault,
    unmatched_defaults_fault,
    unmatched_faults,
)
from grit_core.selection import Selection, select_layers


@dataclass
class ModalityDraft:
    """One modality on its way into a plan."""

    modality: Modality
    config: ModalityConfig
    pointer: str
    """Where its settings stand in the request."""
    named_at: str
    """Where its patterns or names stand in the request."""
    named: bool
    """The layers were named by the caller, every one of which must exist."""
    pattern_of: Mapping[str, str] = field(default_factory=dict)
    by_default: bool = False
    """The patterns are the family's."""
    selection: Selection | None = None
    faults: list[Fault] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def drafts_of(
    config: ModelGRITConfig, overridden: Mapping[Modality, Sequence[str]], *, pointer: str
) -> list[ModalityDraft]:
    """One draft for each modality that is configured or overridden, in planning order."""
    drafts = []
    for modality in Modality:
        own = getattr(config, modality.value)
        place = f"{pointer}/{modality}"
        if modality in overridden:
            base = own if isinstance(own, ModalityConfig) else ModalityConfig()
            drafts.append(_override(modality, base, overridden[modality], pointer=place))
        elif isinstance(own, ModalityConfig):
            drafts.append(
                ModalityDraft(
                    modality=modality,
                    config=own,
                    pointer=place,
                    named_at=f"{place}/layer_patterns",
                    named=False,
                )
            )
    return drafts


def _override(
    modality: Modality, base: ModalityConfig, names: Sequence[str], *, pointer: str
) -> ModalityDraft:
    """Replace a modality's patterns and strategy by a caller's list, at its place `/<m>_layers`."""
    place = f"/{modality}_layers"
    draft = ModalityDraft(
        modality=modality,
        config=dataclasses.replace(
            base,
            layer_patterns=[] if isinstance(names, str) else list(names),
            strategy=LayerSelectionStrategy.ALL,
            n_layers=None,
            step_size=None,
            specific_indices=None,
        ),
        pointer=pointer,
        named_at=place,
        named=True,
    )
    listed = f"{pointer}/layer_patterns"
    for fault in validate_modality(draft.config, pointer=pointer):
        if fault.pointer == listed or fault.pointer.startswith(f"{listed}/"):
            moved = place + fault.pointer.removeprefix(listed)
            draft.faults.append(dataclasses.replace(fault, pointer=moved))
    if isinstance(names, str):
        draft.faults = [wrong_type(names, pointer=place, expected="a list of layer names")]
    elif not names:
        draft.faults.append(
            Fault(
                pointer=place,
                code="out_of_range",
                detail=f"{modality}_layers is empty; name at least one layer, or give null.",
            )
        )
    return draft


def fill(
    draft: ModalityDraft, config: ModelGRITConfig, inventory: ModelInventory, *, known_bad: set[str]
) -> None:
    """Match, select and check one modality; what is wrong goes into the draft's faults."""
    if draft.faults or _touches(known_bad, draft.pointer, ("layer_patterns",)):
        return
    matched = _matched(draft, inventory)
    choosing = ("strategy", *STRATEGY_PARAMETERS)
    if not matched or (not draft.named and _touches(known_bad, draft.pointer, choosing)):
        return
    root = draft.pointer.rpartition("/")[0]
    capped = not _touches(known_bad, root, ("max_layers_per_modality",))
    try:
        draft.selection = select_layers(
            matched,
            draft.config,
            max_layers=config.max_layers_per_modality if capped else None,
            pointer=draft.pointer,
        )
    except InvalidConfig as error:
        draft.faults += error.faults
    chosen = matched if draft.selection is None else draft.selection.kept
    draft.faults += _rank_faults(draft, chosen, config, root=root, known_bad=known_bad)
    draft.warnings += _warnings(draft, inventory)


def _touches(known_bad: set[str], pointer: str, names: Sequence[str]) -> bool:
    starts = tuple(f"{pointer}/{name}" for name in names)
    return any(bad == start or bad.startswith(f"{start}/") for bad in known_bad for start in starts)


def _matched(draft: ModalityDraft, inventory: ModelInventory) -> tuple[LayerRecord, ...]:
    patterns = draft.config.layer_patterns
    if not patterns:
        patterns = default_patterns(draft.modality, inventory)
        draft.by_default = True
        if not patterns:
            draft.faults.append(no_default_fault(draft.modality, inventory, pointer=draft.pointer))
            return ()
    match = match_layers(patterns, inventory)
    draft.pattern_of = match.pattern_of
    if draft.by_default:
        layers = tuple(layer for layer in match.layers if inventory.uses(layer))
        if not layers:
            draft.faults.append(
                unmatched_defaults_fault(patterns, draft.modality, inventory, pointer=draft.pointer)
            )
        return layers
    if match.unmatched and (draft.named or not match.layers):
        draft.faults += unmatched_faults(
            match.unmatched, inventory, modality=draft.modality, pointer=draft.named_at
        )
    elif match.unmatched:
        idle = ", ".join(pattern for _, pattern in match.unmatched)
        draft.warnings.append(f"Of the {draft.modality} patterns, these match no layer: {idle}.")
    return match.layers


def _rank_faults(
    draft: ModalityDraft,
    layers: Sequence[LayerRecord],
    config: ModelGRITConfig,
    *,
    root: str,
    known_bad: set[str],
) -> list[Fault]:
    """A rank above a layer's smaller side adds parameters and no directions."""
    own = draft.config.rank is not None
    place = f"{draft.pointer}/rank" if own else f"{root}/global_rank"
    if place in known_bad:
        return []
    rank = rank_of(draft.config, config)
    too_small = [layer for layer in layers if rank > min(layer.in_features, layer.out_features)]
    if not too_small:
        return []
    layer = min(too_small, key=lambda layer: min(layer.in_features, layer.out_features))
    bound = min(layer.in_features, layer.out_features)
    others = f" ({len(too_small)} such layers)" if len(too_small) > 1 else ""
    return [
        Fault(
            pointer=place,
            code="rank_too_large",
            detail=f"The rank of {draft.modality} is {rank} and {layer.name} is"
            f" {layer.in_features} x {layer.out_features}{others}; give at most {bound}.",
            input=rank,
        )
    ]


def _warnings(draft: ModalityDraft, inventory: ModelInventory) -> list[str]:
    if draft.selection is None:
        return []
    selection, modality, found = draft.selection, draft.modality, []
    if selection.dropped:
        kept = len(selection.kept)
        found.append(
            f"Limiting {modality} layers to {kept} (was {kept + len(selection.dropped)})"
            " by max_layers_per_modality."
        )
    needed = PARAMETER_OF_STRATEGY.get(LayerSelectionStrategy(draft.config.strategy))
    found += [
        f"{modality}.{name} is set and the strategy {draft.config.strategy} does not use it."
        for name in STRATEGY_PARAMETERS
        if name != needed and getattr(draft.config, name) is not None
    ]
    elsewhere = [layer for layer in selection.kept if layer.modality not in {None, modality}]
    if elsewhere and modality != Modality.FUSION:
        found.append(
            f"{len(elsewhere)} of the {modality} layers lie in the model's"
            f" {elsewhere[0].modality} part, such as {elsewhere[0].name}."
        )
    return found + _layer_warnings(selection, inventory)


def _layer_warnings(selection: Selection, inventory: ModelInventory) -> list[str]:
    found = []
    unused = [layer for layer in selection.kept if not inventory.uses(layer)]
    if unused:
        found.append(
            f"{len(unused)} vision layers come after block {inventory.last_used_vision_block}, the"
            f" last whose output this model uses; they get no gradient, such as {unused[0].name}."
        )
    if any(layer.name.rpartition(".")[2] == "lm_head" for layer in selection.kept):
        found.append("lm_head adapts; merging breaks a weight that it shares with the embeddings.")
    return found


def overlap_faults(drafts: Sequence[ModalityDraft]) -> list[Fault]:
    """One fault for each modality that chose layers which an earlier one chose."""
    taken: dict[str, ModalityDraft] = {}
    faults = []
    for draft in drafts:
        kept = draft.selection.kept if draft.selection is not None else ()
        shared = [layer.name for layer in kept if layer.name in taken]
        if shared:
            first = taken[shared[0]].modality
            faults.append(
                Fault(
                    pointer=draft.named_at,
                    code="layer_in_two_modalities",
                    detail=f"{len(shared)} layers are chosen by {first} and by {draft.modality},"
                    f" such as {shared[0]}; take them out of one of the two.",
                    input=shared[0],
                )
            )
        taken |= {layer.name: draft for layer in kept}
    return faults


def rank_of(own: ModalityConfig, config: ModelGRITConfig) -> int:
    """A modality's own rank, or the global one."""
    return config.global_rank if own.rank is None else own.rank
