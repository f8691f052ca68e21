"""From `POST /adapters/{id}/compress` to a job that can be created.

How the model is run meanwhile is the adapter's own: its plan, configuration and training settings
come from the job that made it, or from its `grit.json` when that job is deleted. An adapter that
was not made here has neither, and is run with the defaults.
"""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

from sqlalchemy.orm import Session

from api.devices import DEVICE_SEEN_SECONDS, find_device
from api.errors import InvalidRequest, Item, Problem
from api.schemas.adapters import AdapterCompress
from api.services import Services
from api.submission import find_dataset
from grit_core.config.devices import DeviceStrategy, kind_of
from grit_core.config.model_configs import config_from_dict, config_to_dict
from grit_core.config.training import training_from_dict
from grit_core.errors import GritError
from grit_core.plan import AdaptationPlan, resolve_training
from store import adapters, workers
from store.database import transaction
from store.errors import ObjectMissing
from store.jobs import NewJob
from store.models import Adapter, Dataset, Job, JobKind

_MANIFEST: Final = "grit.json"


class NotCompressible(Problem):
    """The problem of an adapter whose plan or settings this version cannot read."""

    def __init__(self, adapter: Adapter, error: Exception) -> None:
        detail = (
            f"How the adapter {adapter.id} was made is written in a way that this version cannot"
            f" read ({type(error).__name__}: {error}). Train it again to compress it."
        )
        super().__init__("adapter_not_compressible", detail)


@dataclass(frozen=True, kw_only=True)
class _Origin:
    """How an adapter came to be, as JSON values."""

    plan: Mapping[str, Any]
    config: Mapping[str, Any]
    training: Mapping[str, Any]
    preset: str | None = None


def consider_compression(
    services: Services, team: str, adapter_id: str, body: AdapterCompress
) -> NewJob:
    """Look at everything that a compression needs, and return the job's columns.

    Raises:
        NotFound: If the team has no such adapter.
        InvalidRequest: If a dataset is needed or unknown, or no device is live.
        Problem: If the dataset is not ready.
        NotCompressible: If this version cannot read how the adapter was made.
        LookupError: Never, unless a fault above was not told.
    """  # noqa: DOC502 - the first and the fourth come from what it calls
    faults: list[Item] = []
    waiting: list[Item] = []
    with transaction(services.engine, read_only=True) as session:
        adapter = adapters.get_adapter(session, adapter_id, team=team)
        made_by = None if adapter.job_id is None else session.get(Job, adapter.job_id)
        trained_by = adapters.training_job_of(session, adapter)
        dataset = _dataset(session, team, body, trained_by, faults, waiting)
        seen = workers.live_workers(session, seen_within_seconds=DEVICE_SEEN_SECONDS)
    device = find_device(DeviceStrategy.AUTO_PERFORMANCE, seen, faults)
    if faults:
        raise InvalidRequest(faults + waiting)
    if waiting:
        raise Problem("dataset_not_ready", waiting[0].detail, errors=waiting)
    if device is None or dataset is None:
        raise LookupError("a part of the request is missing and no fault says so")
    origin = _origin_of(services, adapter, made_by)
    num_rows = min(body.num_rows, dataset.num_rows or body.num_rows)
    columns = partial(_columns, adapter, origin, num_rows=num_rows)
    return NewJob(
        kind=JobKind.COMPRESSION,
        model=adapter.model,
        dataset_id=dataset.id,
        eval_dataset_id=None if trained_by is None else trained_by.eval_dataset_id,
        source_adapter_id=adapter.id,
        request={"adapter": adapter.id, **body.model_dump(mode="json")},
        **columns(device.choice.device),
        **device.columns(lambda kind: dict(columns(kind)["training"])),
        name=body.name,
        max_attempts=services.settings.max_attempts,
    )


def _dataset(
    session: Session,
    team: str,
    body: AdapterCompress,
    trained_by: Job | None,
    faults: list[Item],
    waiting: list[Item],
) -> Dataset | None:
    """Return the dataset to measure curvature on; what is wrong goes to `faults` or `waiting`."""
    if body.dataset is None and trained_by is None:
        detail = (
            "Nobody knows any more which dataset this adapter was trained on; name one in `dataset`"
            " (GET /datasets)."
        )
        faults.append(Item(code="dataset_unknown", detail=detail, pointer="/dataset"))
        return None
    chosen = body.dataset or (trained_by.dataset_id if trained_by is not None else "")
    return find_dataset(session, team, chosen, "/dataset", faults, waiting)


def _origin_of(services: Services, adapter: Adapter, made_by: Job | None) -> _Origin | None:
    """Return how an adapter came to be: from its job's row, else from its files; none if unknown.

    Raises:
        NotCompressible: If it is written down and cannot be read.
    """
    if made_by is not None:
        return _Origin(
            plan=made_by.plan,
            config=made_by.config,
            training=made_by.training,
            preset=made_by.preset,
        )
    try:
        stored = json.loads(services.objects.get_bytes(f"{adapter.prefix.rstrip('/')}/{_MANIFEST}"))
        return _Origin(plan=stored["plan"], config=stored["config"], training=stored["training"])
    except ObjectMissing:
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise NotCompressible(adapter, error) from error


def _columns(
    adapter: Adapter, origin: _Origin | None, device: str, *, num_rows: int
) -> dict[str, Any]:
    """Return plan, configuration and training settings for the row, without any `auto`.

    Raises:
        NotCompressible: If this version cannot read them.
    """
    try:
        training = training_from_dict(origin.training if origin else {})
        plan = AdaptationPlan.from_json(origin.plan) if origin and origin.plan else None
        config = config_to_dict(config_from_dict(origin.config)) if origin and plan else {}
    except (GritError, KeyError, TypeError, ValueError) as error:
        raise NotCompressible(adapter, error) from error
    if training.precision == "float16" and kind_of(device) == "cpu":
        # What a CPU can do instead, and exact for every number that float16 has.
        training = dataclasses.replace(training, precision="float32")
    training = resolve_training(training, num_rows=num_rows, device=device)
    return {
        "plan": {} if plan is None else plan.to_json(),
        "plan_hash": "" if plan is None else plan.plan_hash,
        "config": config,
        "training": dataclasses.asdict(training),
        "preset": None if origin is None else origin.preset,
    }
