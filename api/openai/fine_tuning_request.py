"""From a fine-tuning request in OpenAI's shape to the body of `POST /jobs`."""

from collections.abc import Mapping
from typing import Any, Final

from api.errors import InvalidRequest, Item
from api.openai.schemas.fine_tuning import BASE_LEARNING_RATE, FineTuningJobCreate
from api.schemas.jobs import JobCreate
from api.services import Services
from api.submission import find_model
from grit_core.config.presets import resolve_config
from grit_core.errors import InvalidConfig
from grit_core.inventory import ModelInventory
from grit_core.plan import plan_adaptation
from store.models import BaseModelRow

_TRAINED_BY: Final = {
    "epochs": "n_epochs",
    "batch_size": "batch_size",
    "learning_rate": "learning_rate_multiplier",
}
"""OpenAI's names of our training settings."""
_DEFAULT_SIZES: Final = ("balanced", "fast")


def names_of(body: FineTuningJobCreate) -> dict[str, str]:
    """Return the caller's pointer for every pointer of the job that the request becomes."""
    return {
        "": "/grit",
        "/model": "/model",
        "/dataset": "/training_file",
        "/eval_dataset": "/validation_file",
        "/name": "/suffix",
        "/metadata": "/metadata",
        **{
            f"/training/{ours}": f"{body.place}/{theirs}"
            for ours, theirs in _TRAINED_BY.items()
            if getattr(body.wanted, theirs) is not None
        },
        **({} if body.seed is None else {"/training/seed": "/seed"}),
    }


async def job_request_of(services: Services, team: str, body: FineTuningJobCreate) -> JobCreate:
    """Return the body of `POST /jobs` that asks the same.

    Raises:
        InvalidRequest: If the request says something twice.
        Problem: If the layers of the model are still being read.
    """
    said = {} if body.grit is None else body.grit.model_dump(mode="json", exclude_unset=True)
    said = {name: value for name, value in said.items() if value is not None}
    training = _training(body, said.pop("training", {}))
    fields = {
        "model": body.model,
        "dataset": body.training_file,
        "eval_dataset": body.validation_file,
        "name": body.suffix,
        "metadata": body.metadata,
        "training": training,
    }
    given = {name: value for name, value in fields.items() if value not in (None, {})}
    if "preset" not in said and "config" not in said:
        preset = await _default_preset(services, team, body.model)
        given |= {} if preset is None else {"preset": preset}
    return JobCreate.model_validate({**given, **said})


def _training(body: FineTuningJobCreate, said: Mapping[str, Any]) -> dict[str, Any]:
    wanted = body.wanted
    multiplier = wanted.learning_rate_multiplier
    rate = None if multiplier is None else multiplier * BASE_LEARNING_RATE
    found = {
        "epochs": wanted.n_epochs,
        "batch_size": wanted.batch_size,
        "learning_rate": rate,
        "seed": body.seed,
    }
    mapped = {name: value for name, value in found.items() if value is not None}
    twice = sorted(mapped.keys() & said.keys())
    if twice:
        places = names_of(body)
        raise InvalidRequest([
            Item(
                code="value_invalid",
                detail=f"`grit.training.{name}` says what"
                f" `{places[f'/training/{name}'].rpartition('/')[2]}` says too; send one of them.",
                pointer=f"/training/{name}",
            )
            for name in twice
        ])
    return {**said, **mapped}


async def _default_preset(services: Services, team: str, model: str) -> str | None:
    """Return the first preset of a model's family that the model has layers for, if there is one.

    Raises:
        Problem: If the layers of the model are still being read.
    """
    found = await find_model(services, team, model)
    if not isinstance(found, BaseModelRow) or found.inventory is None:
        return None
    inventory = ModelInventory.from_json(found.inventory)
    names = [f"{inventory.family}_{size}" for size in _DEFAULT_SIZES]
    return next((name for name in names if _fits(name, inventory)), None)


def _fits(preset: str, inventory: ModelInventory) -> bool:
    try:
        plan_adaptation(resolve_config(None, preset=preset), inventory)
    except InvalidConfig:
        return False
    return True
