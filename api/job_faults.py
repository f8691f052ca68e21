"""All faults of a job's request in one answer, also when its shape is faulty.

FastAPI stops at the shape: types, bounds, unknown fields. What the sound fields name is looked up
here all the same, so that nothing comes to light only after something else was corrected.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from anyio import to_thread
from fastapi import Request
from sqlalchemy.orm import Session

from api.devices import DEVICE_SEEN_SECONDS, find_device
from api.errors import Item, item_of
from api.model_names import describe_other_id
from api.services import Services
from api.submission import find_dataset, refuse_source
from grit_core.config.devices import DEFAULT_STRATEGY
from grit_core.image_use import image_faults
from grit_core.inventory import ModelInventory
from grit_core.job_faults import find_job_faults
from store import base_models, workers
from store.database import transaction

if TYPE_CHECKING:
    from store.models import Dataset

JOB_PATHS: Final = ("/jobs", "/jobs/plan")
"""Where the body is a job's request."""
_DATASETS: Final = ("dataset", "eval_dataset", "retention_dataset")
_MAX_NAME: Final = 512
_DESCRIBED_BY_LIBRARY: Final = frozenset({
    "field_unknown",
    "type_invalid",
    "out_of_range",
    "value_unknown",
})
"""Faults of shape that the library finds too, and describes with both bounds."""


async def find_request_faults(request: Request, body: Any, known: Sequence[Item]) -> list[Item]:
    """Return every fault of a request for a job, in the order of its fields.

    Args:
        request: The request, whose caller is known.
        body: What it holds.
        known: The faults of its shape.
    """
    if not isinstance(body, Mapping):
        return list(known)
    services: Services = request.app.state.services
    team = request.state.caller.team
    found = await to_thread.run_sync(_look_up, services, team, body)
    order = {name: index for index, name in enumerate(body)}
    merged = _merge(known, found)
    return sorted(merged, key=lambda item: order.get(_field(item.pointer), len(order)))


def _merge(known: Sequence[Item], found: Sequence[Item]) -> list[Item]:
    """Return faults of shape and of content, each place once: the library knows the bounds."""
    places = {item.pointer for item in found}
    shape = [
        item
        for item in known
        if item.pointer not in places or item.code not in _DESCRIBED_BY_LIBRARY
    ]
    kept = {item.pointer or "" for item in shape}
    content = [
        item
        for item in found
        if not any(each == item.pointer or each.startswith(f"{item.pointer}/") for each in kept)
    ]
    return [*content, *shape]


def _look_up(services: Services, team: str, body: Mapping[str, Any]) -> list[Item]:
    with transaction(services.engine, read_only=True) as session:
        faults: list[Item] = []
        inventory = _inventory(session, services, team, body.get("model"), faults)
        datasets: dict[str, Dataset] = {}
        for name in _DATASETS:
            given = body.get(name)
            if not _is_name(given):
                continue
            dataset = find_dataset(session, team, str(given), f"/{name}", faults, faults)
            if dataset is not None:
                datasets[f"/{name}"] = dataset
        seen = workers.live_workers(session, seen_within_seconds=DEVICE_SEEN_SECONDS)
    wanted = body.get("device", DEFAULT_STRATEGY)
    device = find_device(wanted, seen, faults) if _is_name(wanted) else None
    if inventory is not None:
        num_images = {place: each.num_images for place, each in datasets.items()}
        faults.extend(item_of(fault) for fault in image_faults(inventory, num_images))
    trained = datasets.get("/dataset")
    found = find_job_faults(
        body,
        inventory,
        num_rows=None if trained is None else trained.num_rows,
        device="cpu" if device is None else device.choice.device,
    )
    return [*faults, *map(item_of, found)]


def _inventory(
    session: Session, services: Services, team: str, name: Any, faults: list[Item]
) -> ModelInventory | None:
    """Return the layers of a model that is ready; a faulty request makes no model known."""
    if not _is_name(name):
        return None
    row = base_models.find(session, name)
    if row is not None:
        return base_models.inventory_of(row)
    other = describe_other_id(session, team, name)
    if other is not None:
        item = Item(code="model_not_found", detail=other, pointer="/model", input=name)
        refused: Item | None = item
    else:
        refused = refuse_source(services, session, name)
    if refused is not None:
        faults.append(refused)
    return None


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and 0 < len(value) <= _MAX_NAME and value.isprintable()


def _field(pointer: str | None) -> str:
    return (pointer or "/").split("/")[1]
