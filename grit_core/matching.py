"""Which of a model's layers a modality asks for, by patterns or by name, and what is nearest."""

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from grit_core.config.families import family_of
from grit_core.config.model_configs import Modality, ModelGRITConfig
from grit_core.errors import Fault
from grit_core.inventory import LayerRecord, ModelInventory
from grit_core.patterns import matching

ATTENTION_INPUTS = frozenset({
    *("q_proj", "v_proj", "qkv_proj", "query_key_value", "c_attn", "Wqkv"),
    *("q_b_proj", "kv_b_proj", "kv_proj", "in_proj"),
})
"""Last names of the layers that make queries or values, or a state-space layer's input."""

MAX_HINTS = 5
"""Unmatched patterns that get their own list of near names; finding one is slow."""

_INDEX = re.compile(r"(?<=\.)\d+(?=\.|$)")


@dataclass(frozen=True, kw_only=True, slots=True)
class Match:
    """The layers that a modality's patterns match, in the model's order."""

    layers: tuple[LayerRecord, ...]
    pattern_of: Mapping[str, str]
    """By layer name, the first pattern that it fits."""
    unmatched: tuple[tuple[int, str], ...]
    """Patterns that no layer fits, with their place in the list."""


def match_layers(patterns: Sequence[str], inventory: ModelInventory) -> Match:
    """Find the layers that fit any of the patterns."""
    names = [layer.name for layer in inventory.layers]
    found = matching(patterns, names)
    used = set(found.values())
    idle = [(place, pattern) for place, pattern in enumerate(patterns) if pattern not in used]
    overshadowed = list(found)  # a pattern that is not used can fit only what others took
    return Match(
        layers=tuple(layer for layer in inventory.layers if layer.name in found),
        pattern_of=found,
        unmatched=tuple(
            (place, pattern) for place, pattern in idle if not matching([pattern], overshadowed)
        ),
    )


def default_patterns(modality: Modality, inventory: ModelInventory) -> list[str]:
    """What an empty list of patterns stands for.

    The queries and values of the family's attention, or its connector. For a text-only model of an
    unknown family: the language model's layers with a name of `ATTENTION_INPUTS`.
    """
    family = family_of(inventory.model_type)
    if family is not None:
        return family.default_patterns(modality)
    names = [layer.name for layer in inventory.of(modality)]
    wanted = [name for name in names if name.rpartition(".")[2] in ATTENTION_INPUTS]
    return list(dict.fromkeys(_INDEX.sub("*", name) for name in wanted))


def unmatched_faults(
    unmatched: Iterable[tuple[int, str]],
    inventory: ModelInventory,
    *,
    modality: Modality,
    pointer: str,
) -> list[Fault]:
    """One fault for each pattern or name that no layer fits, with the nearest real names.

    Args:
        unmatched: Patterns with their place in the request's list.
        inventory: The model's layers.
        modality: Whose layers are looked at first for near names.
        pointer: Where the list stands in the request.
    """
    return [
        Fault(
            pointer=f"{pointer}/{place}",
            code="no_layers_matched",
            detail=_bypassed(pattern, inventory)
            or f"No linear layer of this {inventory.model_type} model fits {pattern!a}."
            + (_nearest(pattern, inventory, modality) if count < MAX_HINTS else ""),
            input=pattern,
        )
        for count, (place, pattern) in enumerate(unmatched)
    ]


def _bypassed(pattern: str, inventory: ModelInventory) -> str | None:
    """Say why a layer that is there cannot adapt, when a pattern or name asks for such a one."""
    asked = _INDEX.sub("0", pattern)
    for group, reason in inventory.bypassed.items():
        if matching([asked], [group.replace("*", "0")]):
            return (
                f"{group} of this {inventory.model_type} model cannot adapt: {reason}, so an"
                " adapter there would never be used."
            )
    return None


def experts_warning(inventory: ModelInventory) -> str | None:
    """A word on experts that stay as they are, or nothing."""
    experts = inventory.stacked_experts
    if not experts:
        return None
    kinds = ", ".join(f"{count} {kind}" for kind, count in experts.items())
    return (
        f"The experts of this model ({kinds}) keep their weights in stacked parameters, not in"
        " linear layers, and do not adapt; attention and the layers outside of the experts can."
    )


def no_default_fault(modality: Modality, inventory: ModelInventory, *, pointer: str) -> Fault:
    """The fault of a modality without patterns in a model that has no default ones."""
    family = family_of(inventory.model_type)
    if family is not None:
        detail = (
            f"A model of the family {family.name} has no {modality} layers that adapt by default;"
            f" give layer_patterns, or leave {modality} out."
        )
    else:
        detail = (
            f"The model type {inventory.model_type} has no default patterns for {modality}; give"
            f" layer_patterns."
        )
    return Fault(
        pointer=f"{pointer}/layer_patterns",
        code="no_layers_matched",
        detail=f"{detail}{_sample(inventory)}",
    )


def unmatched_defaults_fault(
    patterns: Sequence[str], modality: Modality, inventory: ModelInventory, *, pointer: str
) -> Fault:
    """The fault of a modality whose default patterns match no layer of this model."""
    shown = ", ".join(repr(pattern) for pattern in patterns[:MAX_HINTS])
    return Fault(
        pointer=f"{pointer}/layer_patterns",
        code="no_layers_matched",
        detail=f"The default {modality} patterns of this {inventory.model_type} model ({shown})"
        f" match none of its layers; give layer_patterns, or leave {modality} out."
        f"{_sample(inventory)}",
    )


def family_warning(config: ModelGRITConfig, inventory: ModelInventory) -> str | None:
    """A word on a configuration that was made for another family, or nothing."""
    meant = family_of(config.model_type)
    if meant is None or inventory.model_type in meant.model_types:
        return None
    family = family_of(inventory.model_type)
    better = "" if family is None else f"; its presets begin with {family.name}_"
    return (
        f"The configuration is meant for {', '.join(meant.model_types)} and the model is"
        f" {inventory.model_type}{better}."
    )


def _nearest(pattern: str, inventory: ModelInventory, modality: Modality) -> str:
    general = _INDEX.sub("*", pattern)
    for layers in (inventory.of(modality), inventory.layers):
        groups = _groups(layers)
        nearest = difflib.get_close_matches(general, groups, n=3, cutoff=0.4)
        if nearest:
            return f" The nearest are {_listed([(group, groups[group]) for group in nearest])}."
    groups = _groups(inventory.of(modality))
    ends = dict.fromkeys(group.rpartition(".")[2] for group in groups)
    end = difflib.get_close_matches(general.rpartition(".")[2], ends, n=1)
    if end:
        alike = [each for each in groups.items() if each[0].rpartition(".")[2] == end[0]]
        return f" The nearest are {_listed(alike[:3])}."
    return _sample(inventory)


def _sample(inventory: ModelInventory) -> str:
    groups = _groups(inventory.layers)
    if not any(layer.block is not None for layer in inventory.layers) and inventory.unsupported:
        kinds = ", ".join(f"{count} {kind}" for kind, count in inventory.unsupported.items())
        return f" This model keeps its weights in layers that cannot adapt here: {kinds}."
    shown = _listed(list(groups.items())[:4])
    more = f" and {len(groups) - 4} more kinds" if len(groups) > 4 else ""
    return f" Its linear layers are {shown}{more}." if shown else ""


def _groups(layers: Iterable[LayerRecord]) -> dict[str, list[str]]:
    """Layer names by their pattern, every index a star."""
    groups: dict[str, list[str]] = {}
    for layer in layers:
        groups.setdefault(_INDEX.sub("*", layer.name), []).append(layer.name)
    return groups


def _listed(groups: Sequence[tuple[str, Sequence[str]]]) -> str:
    """Return groups of layers with their sizes; a real name of the first one shows the form."""
    shown: list[str] = []
    for group, names in groups:
        example = "" if shown else f", such as {names[0]}"
        shown.append(group if len(names) == 1 else f"{group} ({len(names)} layers{example})")
    return ", ".join(shown)
