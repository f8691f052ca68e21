"""`AdaptationPlan`: exactly which layers adapt, with what, and why. String work; loads no torch."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from grit_core.config.model_configs import Modality, ModelGRITConfig
from grit_core.config.training import TrainingConfig
from grit_core.inventory import ModelInventory


@dataclass(frozen=True, kw_only=True, slots=True)
class PlannedLayer:
    """One layer that gets an adapter."""

    name: str
    modality: Modality
    block: int | None
    rank: int
    alpha: float
    dropout: float
    in_features: int
    out_features: int
    parameters: int
    """rank x (in_features + out_features)."""
    reason: str
    natural_gradient: bool
    projection: bool
    fisher_approximation: str


@dataclass(frozen=True, kw_only=True, slots=True)
class DroppedLayer:
    """One layer that was chosen and then left out by `max_layers_per_modality`."""

    name: str
    modality: Modality
    block: int | None
    reason: str


@dataclass(frozen=True, kw_only=True)
class AdaptationPlan:
    """What training will adapt. Two plans with equal `plan_hash` train the same adapter."""

    model_type: str
    inventory_hash: str
    layers: tuple[PlannedLayer, ...]
    """By modality (vision, text, cross_modal, fusion), then in depth order."""
    settings: Mapping[str, Any]
    """The Fisher and projection settings, which hold for all layers."""
    dropped: tuple[DroppedLayer, ...] = ()
    warnings: tuple[str, ...] = ()
    trainable_parameters: int
    plan_hash: str

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "AdaptationPlan":
        """Build the plan that `to_json` wrote.

        Raises:
            PlanMismatch: The hash in the data is not that of its layers.
        """
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What a run will cost, in steps (exact) and bytes (estimated)."""

    total_steps: int
    steps_per_epoch: int
    memory_bytes: int
    parts: Mapping[str, int] = field(default_factory=dict)
    """Bytes by name: `base_weights`, `adapter`, `gradients`, `optimizer`, `factors`,
    `activations`, `logits`."""
    basis: str = ""
    """What the estimate rests on."""


def plan_adaptation(
    config: ModelGRITConfig,
    inventory: ModelInventory,
    *,
    overrides: Mapping[Modality, Sequence[str]] = {},
) -> AdaptationPlan:
    """Decide which layers of the model adapt.

    Args:
        config: Resolved, see `grit_core.config.resolve_config`.
        inventory: The model's layers.
        overrides: Layer names or patterns that stand in for a modality's patterns and strategy.

    Raises:
        InvalidConfig: The configuration cannot be carried out on this model; every fault is in it.
        NoLayersMatched: As above, when all faults are names that match no layer.
    """
    raise NotImplementedError


def resolve_training(training: TrainingConfig, *, num_rows: int, device: str) -> TrainingConfig:
    """Replace every `auto` by what it stands for.

    Args:
        training: As the user gave it.
        num_rows: Rows to train on, the evaluation split taken out.
        device: The chosen device.

    Raises:
        InvalidConfig: A field is out of its bounds; every fault is in it.
    """
    raise NotImplementedError


def estimate(
    plan: AdaptationPlan, inventory: ModelInventory, training: TrainingConfig, *, num_rows: int
) -> Estimate:
    """Say how many steps a run has and about how much memory it takes.

    Args:
        plan: What adapts.
        inventory: The model's layers and sizes.
        training: Resolved.
        num_rows: Rows to train on, the evaluation split taken out.
    """
    raise NotImplementedError
