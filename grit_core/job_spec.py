"""From the body of `POST /jobs` to a resolved job: one merge for the API and the command line."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from grit_core.config.bounds import Number, unknown_fields, wrong_type
from grit_core.config.devices import FLOAT16_OVERFLOWS, kind_of
from grit_core.config.model_configs import (
    MODALITY_CHECKS,
    MODEL_CHECKS,
    Modality,
    ModelGRITConfig,
    config_to_dict,
)
from grit_core.config.presets import resolve_config
from grit_core.config.training import TRAINING_CHECKS, TrainingConfig, training_from_dict
from grit_core.config.training import validate as validate_training
from grit_core.errors import Fault, InvalidConfig, NoLayersMatched
from grit_core.estimate import Estimate, estimate, resolve_training
from grit_core.inventory import ModelInventory
from grit_core.plan import plan_adaptation
from grit_core.planned import AdaptationPlan
from grit_core.sampler import num_eval_rows

DEFAULT_EVAL_FRACTION: Final = 0.05
"""Share of the dataset held out for evaluation, where the request names none."""

AUTO: Final = "auto"
"""A setting that is decided by the device and the dataset."""

OVERRIDABLE: Final = (Modality.VISION, Modality.TEXT, Modality.CROSS_MODAL)
"""The modalities whose layers a request may name one by one."""

FIELDS: Final = (
    *("model", "dataset", "eval_dataset", "eval_fraction", "retention_dataset"),
    *("preset", "config"),
    *(f"{modality}_layers" for modality in OVERRIDABLE),
    *("training", "device", "name", "metadata", "priority", "plan_hash", "auto_start"),
)
"""What a request may hold."""

CARD_DECIDES: Final = (
    "On a card that only emulates bfloat16 the job trains in float16 instead, of as many bytes; its"
    " training_started event says so."
)
"""What an estimate adds where `auto` precision is decided by a card of another machine."""

_ELSEWHERE: Final = {
    **dict.fromkeys((*MODEL_CHECKS, *map(str, Modality)), "`config`"),
    **dict.fromkeys(
        ("layer_patterns", *MODALITY_CHECKS), "a modality of `config`, such as `config.text`"
    ),
    **dict.fromkeys(TRAINING_CHECKS, "`training`"),
}
"""Where a field belongs that people write beside `model` and `dataset`."""


@dataclass(frozen=True, kw_only=True)
class ResolvedJob:
    """A request with nothing left open."""

    config: ModelGRITConfig
    training: TrainingConfig
    """Without any `auto`; its `precision` is that of the job."""

    plan: AdaptationPlan
    estimate: Estimate
    eval_fraction: float
    """Of the dataset's rows; 0 when there is an evaluation dataset."""

    num_rows: int
    """Rows to train on."""

    def config_json(self) -> dict[str, Any]:
        """Return the configuration as JSON values."""
        return config_to_dict(self.config)

    def training_json(self) -> dict[str, Any]:
        """Return the training settings as JSON values."""
        return dataclasses.asdict(self.training)

    def estimate_json(self) -> dict[str, Any]:
        """Return the estimate as JSON values."""
        return dataclasses.asdict(self.estimate)


def resolve_job(
    spec: Mapping[str, Any],
    inventory: ModelInventory | None,
    *,
    num_rows: int | None,
    device: str,
    native_bfloat16: bool | None = None,
) -> ResolvedJob | None:
    """Merge preset, configuration, named layers and training settings, and plan.

    Args:
        spec: The body of `POST /jobs`, without the fields that the caller left out.
        inventory: The model's layers; `None` while the model is not known.
        num_rows: Rows of the dataset, those held out for evaluation included; `None` while the
            dataset is not known.
        device: As `choose_device` chose it.
        native_bfloat16: Whether the device has bfloat16 units; `None` where it is another
            machine's: a precision of `auto` is then decided there.

    Returns:
        `None` when the model or the dataset is not known and everything else is in order.

    Raises:
        InvalidConfig: With every fault, each with its pointer into the request.
        NoLayersMatched: When patterns or names that match no layer are all that is wrong.
    """
    faults = unknown_fields(spec, FIELDS, pointer="", elsewhere=_ELSEWHERE)
    fraction = _eval_fraction(spec, faults)
    training = _training(spec, faults, device=device)
    overrides = _overrides(spec, faults)
    config, plan, only_names = None, None, not faults
    try:
        config = resolve_config(_object(spec, "config", faults), preset=spec.get("preset"))
        if inventory is not None:
            plan = plan_adaptation(config, inventory, overrides=overrides)
    except InvalidConfig as error:
        only_names = only_names and not faults and isinstance(error, NoLayersMatched)
        faults.extend(error.faults)
    if faults and only_names:
        raise NoLayersMatched(faults)
    if faults:
        raise InvalidConfig(faults)
    if config is None or plan is None or inventory is None or num_rows is None or training is None:
        return None
    left = num_rows - num_eval_rows(num_rows, eval_fraction=fraction)
    if inventory.model_type in FLOAT16_OVERFLOWS:
        native_bfloat16 = True  # whatever the card, it computes in bfloat16
    resolved = resolve_training(
        training, num_rows=left, device=device, native_bfloat16=native_bfloat16 is not False
    )
    cost = estimate(plan, inventory, resolved, num_rows=left)
    if native_bfloat16 is None and training.precision == AUTO and kind_of(device) == "cuda":
        cost = dataclasses.replace(cost, basis=f"{cost.basis} {CARD_DECIDES}")
    return ResolvedJob(
        config=config,
        training=resolved,
        plan=plan,
        estimate=cost,
        eval_fraction=fraction,
        num_rows=left,
    )


def requested_precision(spec: Mapping[str, Any]) -> str:
    """Return the precision that a (valid) request asks for; `auto` where it names none."""
    return str((spec.get("training") or {}).get("precision") or AUTO)


def eval_fraction_of(spec: Mapping[str, Any]) -> float:
    """Share of the dataset that a (valid) request holds out for evaluation."""
    if spec.get("eval_dataset") is not None:
        return 0.0
    fraction = spec.get("eval_fraction")
    return DEFAULT_EVAL_FRACTION if fraction is None else float(fraction)


def _eval_fraction(spec: Mapping[str, Any], faults: list[Fault]) -> float:
    given = spec.get("eval_fraction")
    rule = Number(low=0, high=0.5)
    fault = None if given is None else rule.fault(given, pointer="/eval_fraction")
    if fault is not None:
        faults.append(fault)
        return 0.0
    return eval_fraction_of(spec)


def _training(
    spec: Mapping[str, Any], faults: list[Fault], *, device: str
) -> TrainingConfig | None:
    try:
        training = training_from_dict(_object(spec, "training", faults) or {})
    except InvalidConfig as error:
        faults.extend(error.faults)
        return None
    faults.extend(validate_training(training))
    if training.precision == "float16" and kind_of(device) == "cpu":
        faults.append(
            Fault(
                pointer="/training/precision",
                code="precision_unavailable",
                detail="precision is 'float16' and the device is the CPU, which trains in float32"
                " or bfloat16; give one of these, or auto.",
                input="float16",
            )
        )
    return training


def _overrides(spec: Mapping[str, Any], faults: list[Fault]) -> dict[Modality, list[str]]:
    found: dict[Modality, list[str]] = {}
    for modality in OVERRIDABLE:
        names = spec.get(f"{modality}_layers")
        if names is None:
            continue
        if isinstance(names, list) and all(isinstance(name, str) for name in names):
            found[modality] = names
        else:
            expected = "a list of layer names or patterns, or null"
            faults.append(wrong_type(names, pointer=f"/{modality}_layers", expected=expected))
    return found


def _object(spec: Mapping[str, Any], name: str, faults: list[Fault]) -> Mapping[str, Any] | None:
    value = spec.get(name)
    if value is None or isinstance(value, Mapping):
        return value
    faults.append(wrong_type(value, pointer=f"/{name}", expected="an object, or null"))
    return None
