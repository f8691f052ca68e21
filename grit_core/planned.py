"""`AdaptationPlan` and its layers, as plain data. `grit_core.plan` makes them."""

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, fields
from typing import Any

from grit_core.config.model_configs import Modality
from grit_core.digests import canonical_sha256
from grit_core.errors import Fault, PlanMismatch


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
    fisher_block_size: int


@dataclass(frozen=True, kw_only=True, slots=True)
class DroppedLayer:
    """One layer that a strategy chose and `max_layers_per_modality` left out."""

    name: str
    modality: Modality
    block: int | None
    reason: str


@dataclass(frozen=True, kw_only=True)
class AdaptationPlan:
    """What training will adapt. Plans with equal `plan_hash` adapt the same layers alike."""

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

    def of(self, modality: Modality) -> tuple[PlannedLayer, ...]:
        """The layers of one modality."""
        return tuple(layer for layer in self.layers if layer.modality == modality)

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        values = {item.name: getattr(self, item.name) for item in fields(self)}
        values["layers"] = tuple(_flat(layer) for layer in self.layers)
        values["dropped"] = tuple(_flat(layer) for layer in self.dropped)
        values["settings"] = deepcopy(dict(self.settings))
        return values

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "AdaptationPlan":
        """Build the plan that `to_json` wrote.

        Raises:
            PlanMismatch: The hash in the data is not that of its layers.
        """
        values = {item.name: data[item.name] for item in fields(cls)}
        values["layers"] = tuple(
            PlannedLayer(**{**layer, "modality": Modality(layer["modality"])})
            for layer in data["layers"]
        )
        values["dropped"] = tuple(
            DroppedLayer(**{**layer, "modality": Modality(layer["modality"])})
            for layer in data["dropped"]
        )
        values["warnings"] = tuple(data["warnings"])
        values["settings"] = dict(data["settings"])
        plan = cls(**values)
        expected = hash_of(
            model_type=plan.model_type,
            inventory_hash=plan.inventory_hash,
            layers=plan.layers,
            settings=plan.settings,
        )
        if plan.plan_hash != expected:
            raise PlanMismatch([
                Fault(
                    pointer="/plan_hash",
                    code="plan_hash_mismatch",
                    detail=f"The plan's hash is {str(plan.plan_hash)[:64]} and its layers give"
                    f" {expected}; make the plan again.",
                )
            ])
        return plan

    def check_model(self, inventory_hash: str) -> None:
        """Refuse a model that the plan was not made for.

        Args:
            inventory_hash: Of the model at hand.

        Raises:
            PlanMismatch: It is another than the plan's.
        """
        if inventory_hash != self.inventory_hash:
            raise PlanMismatch([
                Fault(
                    pointer="/plan/inventory_hash",
                    code="inventory_hash_mismatch",
                    detail="The plan was made for a model whose layers have the hash"
                    f" {self.inventory_hash}; this model's have {inventory_hash}. Make the plan"
                    " again from this model.",
                )
            ])


def hash_of(
    *,
    model_type: str,
    inventory_hash: str,
    layers: tuple[PlannedLayer, ...],
    settings: Mapping[str, Any],
) -> str:
    """SHA-256 over what training consumes: no reasons, no warnings, nothing that was left out.

    Args:
        model_type: As in `config.json`.
        inventory_hash: Of the model's layers.
        layers: What adapts.
        settings: The Fisher and projection settings.
    """
    consumed = [
        {name: value for name, value in _flat(layer).items() if name != "reason"}
        for layer in layers
    ]
    for layer in consumed:  # 32 and 32.0 are one number to training
        layer["alpha"], layer["dropout"] = float(layer["alpha"]), float(layer["dropout"])
    return canonical_sha256({
        "model_type": model_type,
        "inventory_hash": inventory_hash,
        "layers": consumed,
        "settings": dict(settings),
    })


def _flat(layer: PlannedLayer | DroppedLayer) -> dict[str, Any]:
    # Their values are plain: `asdict` would copy each of hundreds of layers value by value.
    return {name: getattr(layer, name) for name in layer.__slots__}
