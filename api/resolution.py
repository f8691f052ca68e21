"""The merge of preset, configuration, overrides and training into a plan."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from grit_core.config.model_configs import Modality, ModelGRITConfig, config_to_dict
from grit_core.config.presets import resolve_config
from grit_core.config.training import TrainingConfig, training_from_dict
from grit_core.config.training import validate as validate_training
from grit_core.errors import Fault, InvalidConfig
from grit_core.inventory import ModelInventory
from grit_core.plan import AdaptationPlan, Estimate, estimate, plan_adaptation, resolve_training


@dataclass(frozen=True, kw_only=True)
class ResolvedJob:
    """A request with nothing left open."""

    config: ModelGRITConfig
    training: TrainingConfig
    plan: AdaptationPlan
    estimate: Estimate

    def config_json(self) -> dict[str, Any]:
        """Return the configuration as JSON."""
        return config_to_dict(self.config)

    def training_json(self) -> dict[str, Any]:
        """Return the training settings as JSON."""
        return dataclasses.asdict(self.training)

    def estimate_json(self) -> dict[str, Any]:
        """Return the estimate as JSON."""
        return dataclasses.asdict(self.estimate)


def resolve_job(
    spec: Mapping[str, Any],
    inventory: ModelInventory | None,
    *,
    num_rows: int | None,
    device: str,
) -> ResolvedJob | None:
    """Resolve a request as far as what is known allows; none when a part is not known.

    Raises:
        InvalidConfig: With every fault.
    """
    faults: list[Fault] = []
    training = training_from_dict(spec.get("training") or {})
    faults += validate_training(training)
    try:
        config = resolve_config(spec.get("config"), preset=spec.get("preset"))
        overrides = {
            modality: spec[f"{modality}_layers"]
            for modality in Modality
            if spec.get(f"{modality}_layers") is not None
        }
        plan = (
            None if inventory is None else plan_adaptation(config, inventory, overrides=overrides)
        )
    except InvalidConfig as error:
        raise InvalidConfig([*error.faults, *faults]) from None
    if faults:
        raise InvalidConfig(faults)
    if plan is None or inventory is None or num_rows is None:
        return None
    resolved = resolve_training(training, num_rows=num_rows, device=device)
    return ResolvedJob(
        config=config,
        training=resolved,
        plan=plan,
        estimate=estimate(plan, inventory, resolved, num_rows=num_rows),
    )
