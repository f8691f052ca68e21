"""`ModelGRITConfig`: which layers of a model adapt, and how.

The dataclasses are mutable on purpose: users were promised `config.vision.step_size = 3`. They own
names and defaults; the API's schemas mirror them. Nothing is checked on assignment: `validate`
returns every fault at once.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from grit_core.config.bounds import (
    Check,
    Choice,
    Flag,
    Number,
    Text,
    check_fields,
    unknown_fields,
    wrong_type,
)
from grit_core.errors import Fault, InvalidConfig
from grit_core.patterns import pattern_fault


class LayerSelectionStrategy(StrEnum):
    """How blocks are chosen among those that hold a matched layer."""

    ALL = "all"
    FIRST_N = "first_n"
    LAST_N = "last_n"
    EVERY_NTH = "every_nth"
    SPECIFIC = "specific"
    SKIP_FIRST_LAST = "skip_first_last"


class Modality(StrEnum):
    """The part of a model that a layer belongs to."""

    VISION = "vision"
    TEXT = "text"
    CROSS_MODAL = "cross_modal"
    FUSION = "fusion"


PARAMETER_OF_STRATEGY: dict[LayerSelectionStrategy, str] = {
    LayerSelectionStrategy.FIRST_N: "n_layers",
    LayerSelectionStrategy.LAST_N: "n_layers",
    LayerSelectionStrategy.EVERY_NTH: "step_size",
    LayerSelectionStrategy.SPECIFIC: "specific_indices",
}
"""The field that a strategy needs; the others need none."""

STRATEGY_PARAMETERS = ("n_layers", "step_size", "specific_indices")

MAX_PATTERNS = 512
"""Of one modality, full names included."""
MAX_WILDCARD_PATTERNS = 64
"""Of one modality: each of these is tried on every layer."""
MAX_INDICES = 1024
MAX_BLOCKS = 10_000
MAX_RANK = 4096


@dataclass
class ModalityConfig:
    """Which layers of one modality adapt, and with what."""

    layer_patterns: list[str] = field(default_factory=list)
    """Full dotted names in which `*` stands for any characters but a dot. Empty: the patterns that
    the model's family has for this modality, and of these the layers that reach the loss."""
    strategy: LayerSelectionStrategy = LayerSelectionStrategy.ALL
    """Chooses among the blocks that hold a matched layer, in depth order."""
    n_layers: int | None = None
    """For `first_n` and `last_n`: the number of blocks."""
    step_size: int | None = None
    """For `every_nth`: blocks 0, step_size, 2 * step_size, ... of the matched ones."""
    specific_indices: list[int] | None = None
    """For `specific`: block indices, as they stand in the layers' names."""
    rank: int | None = None
    """LoRA rank; `None` takes `global_rank`."""
    alpha: float | None = None
    """LoRA alpha, the update is scaled by alpha / rank; `None` takes `global_alpha`."""
    dropout: float | None = None
    """On the adapter's input; `None` takes `global_dropout`."""
    enable_natural_gradient: bool = True
    """Whether the steps of its layers use curvature; false is plain AdamW."""
    enable_projection: bool = True
    """Whether the steps of its layers keep to the budget of directions."""
    fisher_approximation: str = "diagonal"
    """`diagonal`, `block_diagonal` or `kfac`: how much of each rank-space factor is used. With
    `diagonal` an `ekfac` step is Adam's, and a job says so; the presets set `kfac`."""
    fisher_block_size: int = 4
    """Side of the blocks that `block_diagonal` keeps: 1 is `diagonal`, the rank is `kfac`."""


@dataclass
class ModelGRITConfig:
    """What a user asks for: modalities, and settings that hold for all of them."""

    model_name: str = "custom"
    """A label; it does not choose the model."""
    model_type: str = "custom"
    """The family that the configuration is meant for, as in a model's `config.json`; `custom` fits
    any. It does not choose the model."""
    vision: ModalityConfig | None = None
    """Layers of the vision tower; null: none adapt."""
    text: ModalityConfig | None = None
    """Layers of the text model; null: none adapt."""
    cross_modal: ModalityConfig | None = None
    """Layers between the vision tower and the text model; null: none adapt."""
    fusion: ModalityConfig | None = None
    """Layers that fuse modalities within the text model; null: none adapt."""
    global_rank: int = 16
    """LoRA rank of modalities without a `rank` of their own."""
    global_alpha: float = 32
    """LoRA alpha of modalities without an `alpha` of their own."""
    global_dropout: float = 0.1
    """Dropout of modalities without a `dropout` of their own."""
    fisher_damping: float = 1e-4
    """Relative to a factor's mean eigenvalue."""
    fisher_ema_decay: float = 0.95
    """Share of a factor's old value that each observation keeps."""
    fisher_update_freq: int = 10
    """Optimizer steps between two observations of the factors."""
    projection_budget_start: int = 32
    """Rank-space directions over a whole modality at the first step."""
    projection_budget_end: int = 96
    """Rank-space directions over a whole modality at the last step."""
    projection_schedule: str = "linear"
    """How the budget moves between its ends: `linear`, `cosine`, `exponential`, `constant` (the
    start alone) or `adaptive` (as many directions as hold `projection_energy`, within the ends)."""
    projection_energy: float = 0.99
    """For `adaptive`: the share of a modality's Fisher energy that the active directions hold."""
    projection_update_freq: int = 20
    """Optimizer steps between two reprojections."""
    step_rule: str = "ekfac"
    """How the natural gradient is taken: `ekfac`, `kfac`, `gauge` or `paper`; see `docs/method.md`.
    """
    initialization: str = "gradient"
    """Of A, for layers with natural gradient: `gradient` reads the first step's gradient (two
    backward passes more, once), `kaiming` is PEFT's random start."""
    max_layers_per_modality: int | None = None
    """Keeps at most so many layers of each modality, nearest the end that its strategy prefers."""

    def modalities(self) -> dict[Modality, ModalityConfig]:
        """The configured modalities, in the order in which they are planned."""
        found = {modality: getattr(self, modality.value) for modality in Modality}
        return {modality: value for modality, value in found.items() if value is not None}


@dataclass
class GRITLoRAConfig:
    """Settings to lay over a preset; `None` leaves what the preset says.

    Says how layers adapt and not which: the layers come from a preset or from explicit names.
    """

    rank: int | None = None
    alpha: float | None = None
    dropout: float | None = None
    fisher_damping: float | None = None
    fisher_ema_decay: float | None = None
    fisher_update_freq: int | None = None
    projection_budget_start: int | None = None
    projection_budget_end: int | None = None
    projection_schedule: str | None = None
    projection_energy: float | None = None
    projection_update_freq: int | None = None
    step_rule: str | None = None
    initialization: str | None = None
    max_layers_per_modality: int | None = None

    def overlay(self) -> dict[str, Any]:
        """The set fields under the names of `ModelGRITConfig`."""
        renamed = {name: f"global_{name}" for name in ("rank", "alpha", "dropout")}
        values = {item.name: getattr(self, item.name) for item in dataclasses.fields(self)}
        return {
            renamed.get(name, name): value for name, value in values.items() if value is not None
        }


_RANK = Number(low=1, high=MAX_RANK, integer=True)
_ALPHA = Number(low=0, high=65_536, above_low=True)
_DROPOUT = Number(low=0, high=1, below_high=True)
_BUDGET = Number(low=1, high=1_000_000, integer=True)

MODALITY_CHECKS: dict[str, Check] = {
    "strategy": Choice(values=tuple(LayerSelectionStrategy)),
    "n_layers": Number(low=1, high=MAX_BLOCKS, integer=True, optional=True),
    "step_size": Number(low=1, high=MAX_BLOCKS, integer=True, optional=True),
    "rank": dataclasses.replace(_RANK, optional=True),
    "alpha": dataclasses.replace(_ALPHA, optional=True),
    "dropout": dataclasses.replace(_DROPOUT, optional=True),
    "enable_natural_gradient": Flag(),
    "enable_projection": Flag(),
    "fisher_approximation": Choice(values=("diagonal", "block_diagonal", "kfac")),
    "fisher_block_size": Number(low=1, high=MAX_RANK, integer=True),
}
"""The rules for the fields of `ModalityConfig` that stand alone."""

MODEL_CHECKS: dict[str, Check] = {
    "model_name": Text(max_length=256),
    "model_type": Text(max_length=128),
    "global_rank": _RANK,
    "global_alpha": _ALPHA,
    "global_dropout": _DROPOUT,
    "fisher_damping": Number(low=0, high=1_000, above_low=True),
    "fisher_ema_decay": Number(low=0, high=1, below_high=True),
    "fisher_update_freq": Number(low=1, high=1_000_000, integer=True),
    "projection_budget_start": _BUDGET,
    "projection_budget_end": _BUDGET,
    "projection_schedule": Choice(
        values=("linear", "cosine", "exponential", "constant", "adaptive")
    ),
    "projection_energy": Number(low=0, high=1, above_low=True),
    "projection_update_freq": Number(low=1, high=1_000_000, integer=True),
    "step_rule": Choice(values=("ekfac", "kfac", "gauge", "paper")),
    "initialization": Choice(values=("gradient", "kaiming")),
    "max_layers_per_modality": Number(low=1, high=100_000, integer=True, optional=True),
}
"""The rules for the fields of `ModelGRITConfig` that are no modality."""


def validate(config: ModelGRITConfig, *, pointer: str = "/config") -> list[Fault]:
    """Every fault that can be told without a model, in field order."""
    faults = check_fields(config, MODEL_CHECKS, pointer=pointer)
    for modality in Modality:
        value = getattr(config, modality.value)
        if isinstance(value, ModalityConfig):
            faults += validate_modality(value, pointer=f"{pointer}/{modality}")
        elif value is not None:
            faults.append(
                wrong_type(
                    value,
                    pointer=f"{pointer}/{modality}",
                    expected="the settings of a modality, or null",
                )
            )
    return faults


def validate_modality(config: ModalityConfig, *, pointer: str) -> list[Fault]:
    """Every fault of one modality that can be told without a model."""
    faults = _pattern_faults(config.layer_patterns, pointer=f"{pointer}/layer_patterns")
    faults += check_fields(config, MODALITY_CHECKS, pointer=pointer)
    faults += _index_faults(config.specific_indices, pointer=f"{pointer}/specific_indices")
    parameter = _parameter_of(config.strategy)
    if parameter is not None and getattr(config, parameter) is None:
        faults.append(
            Fault(
                pointer=f"{pointer}/{parameter}",
                code="missing",
                detail=f"The strategy {config.strategy} needs {parameter}; give it, or take the"
                " strategy all.",
            )
        )
    return faults


def config_from_dict(data: Mapping[str, Any], *, pointer: str = "/config") -> ModelGRITConfig:
    """Build a configuration from JSON values, the inverse of `config_to_dict`.

    Values are not checked here (see `validate`); names are.

    Raises:
        InvalidConfig: A field is unknown or a modality is no object; every such fault is in it.
    """
    fields = [item.name for item in dataclasses.fields(ModelGRITConfig)]
    faults = unknown_fields(data, fields, pointer=pointer)
    values = dict(data)
    for modality in Modality:
        part = data.get(modality.value)
        if isinstance(part, Mapping):
            inner = [item.name for item in dataclasses.fields(ModalityConfig)]
            faults += unknown_fields(part, inner, pointer=f"{pointer}/{modality}")
            if not faults:
                values[modality.value] = _modality_from_dict(part)
        elif part is not None:
            faults.append(
                wrong_type(
                    part,
                    pointer=f"{pointer}/{modality}",
                    expected="an object with the settings of a modality, or null",
                )
            )
    if faults:
        raise InvalidConfig(faults)
    return ModelGRITConfig(**values)


def config_to_dict(config: ModelGRITConfig) -> dict[str, Any]:
    """The configuration as JSON values, every field of it."""
    data = dataclasses.asdict(config)
    for modality in Modality:
        part = data[modality.value]
        if part is not None:
            part["strategy"] = str(part["strategy"])
    return data


def _modality_from_dict(data: Mapping[str, Any]) -> ModalityConfig:
    values = dict(data)
    if values.get("strategy") in tuple(LayerSelectionStrategy):
        values["strategy"] = LayerSelectionStrategy(values["strategy"])
    for name in ("layer_patterns", "specific_indices"):
        if isinstance(values.get(name), list | tuple):
            values[name] = list(values[name])
    return ModalityConfig(**values)


def _parameter_of(strategy: object) -> str | None:
    if isinstance(strategy, str) and strategy in tuple(LayerSelectionStrategy):
        return PARAMETER_OF_STRATEGY.get(LayerSelectionStrategy(strategy))
    return None


def _pattern_faults(patterns: object, *, pointer: str) -> list[Fault]:
    if not isinstance(patterns, list | tuple):
        return [wrong_type(patterns, pointer=pointer, expected="a list of patterns")]
    if len(patterns) > MAX_PATTERNS:
        return [_too_many(len(patterns), MAX_PATTERNS, "patterns", pointer=pointer)]
    wildcards = sum(isinstance(pattern, str) and "*" in pattern for pattern in patterns)
    if wildcards > MAX_WILDCARD_PATTERNS:
        return [_too_many(wildcards, MAX_WILDCARD_PATTERNS, "patterns with *", pointer=pointer)]
    found = (
        pattern_fault(pattern, pointer=f"{pointer}/{position}")
        for position, pattern in enumerate(patterns)
    )
    return [fault for fault in found if fault is not None]


def _index_faults(indices: object, *, pointer: str) -> list[Fault]:
    if indices is None:
        return []
    if not isinstance(indices, list | tuple):
        return [wrong_type(indices, pointer=pointer, expected="a list of block indices, or null")]
    if len(indices) > MAX_INDICES:
        return [_too_many(len(indices), MAX_INDICES, "indices", pointer=pointer)]
    if not indices:
        return [
            Fault(
                pointer=pointer,
                code="out_of_range",
                detail="specific_indices is empty; give at least one block index, or null.",
            )
        ]
    check = Number(low=0, high=MAX_BLOCKS, integer=True)
    found = (
        check.fault(index, pointer=f"{pointer}/{position}")
        for position, index in enumerate(indices)
    )
    return [fault for fault in found if fault is not None]


def _too_many(count: int, bound: int, noun: str, *, pointer: str) -> Fault:
    return Fault(
        pointer=pointer,
        code="too_many",
        detail=f"There are {count} {noun}; at most {bound} are read. Let one * stand for more"
        " layers.",
    )
