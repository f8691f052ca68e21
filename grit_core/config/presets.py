"""Predefined configurations, each complete in itself."""

import dataclasses
import difflib
from collections.abc import Callable, Mapping
from typing import Any

from grit_core.config.bounds import shown
from grit_core.config.families import FAMILIES, Family
from grit_core.config.model_configs import (
    PARAMETER_OF_STRATEGY,
    STRATEGY_PARAMETERS,
    GRITLoRAConfig,
    LayerSelectionStrategy,
    Modality,
    ModalityConfig,
    ModelGRITConfig,
    config_from_dict,
    config_to_dict,
)
from grit_core.errors import Fault, UnknownPreset

MAX_LAYERS_BALANCED = 20
"""The guide's "max 20/modality"."""

APPROXIMATION = "kfac"
"""The whole factors: of a diagonal one the eigenbasis is the axes, and the step is Adam's."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Preset:
    """A named configuration and what it is for."""

    name: str
    family: str
    description: str
    build: Callable[[], ModelGRITConfig]


def get_model_config(name: str) -> ModelGRITConfig:
    """A fresh copy of a predefined configuration, to use or to change.

    A name that does not exist raises `UnknownPreset`, which names the nearest.
    """
    return _preset(name).build()


def preset_names() -> tuple[str, ...]:
    """The names of all presets, those of the guide first."""
    return tuple(_PRESETS)


def describe_preset(name: str) -> dict[str, Any]:
    """A preset as JSON values: name, family, the model types it fits, description, config.

    A name that does not exist raises `UnknownPreset`.
    """
    preset = _preset(name)
    return {
        "name": preset.name,
        "family": preset.family,
        "model_types": list(FAMILIES[preset.family].model_types),
        "description": preset.description,
        "config": config_to_dict(preset.build()),
    }


def resolve_config(
    config: ModelGRITConfig | GRITLoRAConfig | Mapping[str, Any] | None,
    *,
    preset: str | None = None,
    pointer: str = "/config",
) -> ModelGRITConfig:
    """The configuration that a preset and a caller's settings make together.

    Settings are laid over the preset field by field. Of a `ModelGRITConfig` those fields count
    that differ from the defaults; of a mapping those that are in it. A strategy laid over a
    preset's takes the parameters of the preset's own strategy away. Nothing is checked but names:
    an unknown preset raises `UnknownPreset`, an unknown field `InvalidConfig`.

    Args:
        config: The caller's settings, whole or in part.
        preset: The name of a predefined configuration.
        pointer: Where the settings stand in the caller's request.
    """
    if preset is None and isinstance(config, ModelGRITConfig):
        return config
    base = ModelGRITConfig() if preset is None else get_model_config(preset)
    partial = _partial(config)
    config_from_dict(partial, pointer=pointer)  # refuses unknown names at their place
    return config_from_dict(_laid_over(config_to_dict(base), partial), pointer=pointer)


def _partial(
    config: ModelGRITConfig | GRITLoRAConfig | Mapping[str, Any] | None,
) -> dict[str, Any]:
    if config is None:
        return {}
    if isinstance(config, GRITLoRAConfig):
        return config.overlay()
    if isinstance(config, Mapping):
        return dict(config)
    return _differing(config_to_dict(config), config_to_dict(ModelGRITConfig()))


def _differing(data: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    inner = dataclasses.asdict(ModalityConfig())
    found: dict[str, Any] = {}
    for name, value in data.items():
        if isinstance(value, Mapping):
            found[name] = _differing(value, inner)
        elif value != defaults[name]:
            found[name] = value
    return found


def _laid_over(base: Mapping[str, Any], partial: Mapping[str, Any]) -> dict[str, Any]:
    data = dict(base)
    for name, value in partial.items():
        below = base.get(name)
        if name in tuple(Modality) and isinstance(value, Mapping) and isinstance(below, Mapping):
            data[name] = {**_without_stale_parameters(below, value), **value}
        else:
            data[name] = value
    return data


def _without_stale_parameters(below: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    strategy = over.get("strategy")
    if strategy not in tuple(LayerSelectionStrategy):
        return dict(below)
    needed = PARAMETER_OF_STRATEGY.get(LayerSelectionStrategy(strategy))
    stale = {name: None for name in STRATEGY_PARAMETERS if name != needed}
    return {**below, **stale}


def describe_unknown_preset(name: object) -> str:
    """Say that there is no preset of a name, and which names are near."""
    nearest = difflib.get_close_matches(str(name)[:100], _PRESETS, n=3, cutoff=0.4)
    hint = (
        f"The nearest are {', '.join(nearest)}; GET /presets lists all."
        if nearest
        else "Every family has NAME_fast and NAME_balanced; the families are"
        f" {', '.join(FAMILIES)}."
    )
    return f"There is no preset {shown(name)}. {hint}"


def _preset(name: str) -> Preset:
    if isinstance(name, str) and name in _PRESETS:
        return _PRESETS[name]
    raise UnknownPreset([
        Fault(
            pointer="/preset",
            code="unknown_preset",
            detail=describe_unknown_preset(name),
            input=name if isinstance(name, str) and len(name) <= 100 else None,
        )
    ])


def _fast(family: Family, *, name: str) -> ModelGRITConfig:
    """3 vision blocks from the start, 4 text blocks from the end, the connector."""
    vision, text = family.queries.get(Modality.VISION), family.values[Modality.TEXT]
    return ModelGRITConfig(
        model_name=name,
        model_type=family.model_types[0],
        vision=None if vision is None else _first(3, vision),
        text=_last(4, text, *family.mixers),
        cross_modal=_all_of(family, Modality.CROSS_MODAL),
        fusion=_all_of(family, Modality.FUSION),
    )


def _balanced(
    family: Family, *, name: str, step_size: int, text_patterns: list[str] | None = None
) -> ModelGRITConfig:
    """Every nth vision block, 8 text blocks from the end, the connector."""
    vision = family.default_patterns(Modality.VISION)
    text = text_patterns or family.default_patterns(Modality.TEXT)
    return ModelGRITConfig(
        model_name=name,
        model_type=family.model_types[0],
        vision=ModalityConfig(
            layer_patterns=vision,
            strategy=LayerSelectionStrategy.EVERY_NTH,
            step_size=step_size,
            fisher_approximation=APPROXIMATION,
        )
        if vision
        else None,
        text=_last(family.balanced_blocks, *text),
        cross_modal=_all_of(family, Modality.CROSS_MODAL),
        fusion=_all_of(family, Modality.FUSION),
        max_layers_per_modality=MAX_LAYERS_BALANCED,
    )


def _first(count: int, *patterns: str) -> ModalityConfig:
    return ModalityConfig(
        layer_patterns=list(patterns),
        strategy=LayerSelectionStrategy.FIRST_N,
        n_layers=count,
        fisher_approximation=APPROXIMATION,
    )


def _last(count: int, *patterns: str) -> ModalityConfig:
    return ModalityConfig(
        layer_patterns=list(patterns),
        strategy=LayerSelectionStrategy.LAST_N,
        n_layers=count,
        fisher_approximation=APPROXIMATION,
    )


def _all_of(family: Family, modality: Modality) -> ModalityConfig | None:
    patterns = family.default_patterns(modality)
    if not patterns:
        return None
    return ModalityConfig(layer_patterns=patterns, fisher_approximation=APPROXIMATION)


def _parts(family: Family) -> tuple[str, str]:
    """The words for a family's fast and balanced presets."""
    has_vision = Modality.VISION in family.queries
    has_cross = Modality.CROSS_MODAL in family.queries
    fast = ("3 vision layers (first_n), " if has_vision else "") + "4 text layers (last_n)"
    balanced = "every 3rd vision block, " if has_vision else ""
    balanced += f"queries and values of the last {family.balanced_blocks} text blocks"
    tail = ", the connector (all)" if has_cross else ""
    tail += ", the attention to images (all)" if Modality.FUSION in family.queries else ""
    return fast + tail, balanced + tail


def _family_presets(family: Family) -> list[Preset]:
    def fast() -> ModelGRITConfig:
        return _fast(family, name=f"{family.name}_fast")

    def balanced() -> ModelGRITConfig:
        return _balanced(family, name=f"{family.name}_balanced", step_size=3)

    fast_words, balanced_words = _parts(family)
    return [
        Preset(
            name=f"{family.name}_fast",
            family=family.name,
            description=f"{family.title}: quick trials with {fast_words}.",
            build=fast,
        ),
        Preset(
            name=f"{family.name}_balanced",
            family=family.name,
            description=f"{family.title}: {balanced_words}; at most"
            f" {MAX_LAYERS_BALANCED} layers of a modality.",
            build=balanced,
        ),
    ]


def _smolvlm_full(name: str, *, title: str, step_size: int, vision_words: str) -> Preset:
    family = FAMILIES["smolvlm"]

    def build() -> ModelGRITConfig:
        text = [family.values[Modality.TEXT]]
        return _balanced(family, name=name, step_size=step_size, text_patterns=text)

    return Preset(
        name=name,
        family=family.name,
        description=f"{title}: {vision_words}, values of the last 8 text blocks,"
        f" the connector; at most {MAX_LAYERS_BALANCED} layers of a modality.",
        build=build,
    )


def _all_presets() -> dict[str, Preset]:
    half = "12 vision layers (queries and values of every 2nd of 12 blocks)"
    third = "18 vision layers (queries and values of every 3rd of 27 blocks)"
    smolvlm_fast = _family_presets(FAMILIES["smolvlm"])[0]
    presets = [
        smolvlm_fast,
        _smolvlm_full("smolvlm_256m", title="SmolVLM-256M", step_size=2, vision_words=half),
        _smolvlm_full("smolvlm_500m", title="SmolVLM-500M", step_size=2, vision_words=half),
        _smolvlm_full("smolvlm_2b", title="SmolVLM (2.2B)", step_size=3, vision_words=third),
    ]
    presets += [preset for family in FAMILIES.values() for preset in _family_presets(family)]
    return {preset.name: preset for preset in presets}


_PRESETS = _all_presets()
