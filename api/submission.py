"""From a request to a job that can be created: model, dataset, device, configuration, plan.

Everything is looked at before anything is refused, so that one answer names all that is wrong.
"""

import time
from dataclasses import asdict, dataclass, field, replace
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import Any, Final

from anyio import sleep, to_thread
from sqlalchemy.orm import Session

from api.devices import DEVICE_SEEN_SECONDS, FoundDevice, find_device
from api.errors import InvalidRequest, Item, Problem, item_of
from api.model_names import describe_other_id, suggest_hub_id, suggest_models
from api.schemas.jobs import JobCreate
from api.services import Services
from grit_core.config.devices import DeviceChoice
from grit_core.config.training import training_from_dict
from grit_core.dataset_notes import dataset_notes
from grit_core.errors import InvalidConfig
from grit_core.estimate import resolve_training
from grit_core.image_use import image_faults, image_warnings
from grit_core.job_faults import find_job_faults
from grit_core.job_spec import ResolvedJob, resolve_job
from store import base_models, datasets, workers
from store.database import run_in_transaction, transaction
from store.errors import NotFound
from store.jobs import NewJob
from store.models import BaseModelRow, Dataset, DatasetStatus, ModelStatus, Worker
from store.queue import INFERENCE_QUEUES, TRAINING_QUEUES

_FIRST_LOOK_SECONDS: Final = 0.05
_MAX_LOOK_SECONDS: Final = 0.3
"""Looks at a model's row become rarer: many requests may wait at once."""
_FOUND_SECONDS: Final = 1.0
"""Time in which a worker hears the bell and writes down the hub's answer."""
_ASKED_SECONDS: Final = 5.0
"""For so long the hub's answer is taken as it was: one request may name a model twice."""
_COMPARED: Final = 200
"""Newest datasets whose names are compared with one that none has."""
_NO_SOURCE: Final = " It is written neither as a folder (`/models/x`) nor as a hub id (`org/name`)."


@dataclass(frozen=True, kw_only=True)
class Submission:
    """A request, found good."""

    body: JobCreate
    team: str
    model: BaseModelRow
    dataset: Dataset
    resolved: ResolvedJob
    device: FoundDevice

    def new_job(self, *, max_attempts: int) -> NewJob:
        """Return the row's columns.

        Raises:
            Problem: If the request names another plan than the one that it leads to now.
        """
        resolved = self.resolved
        seen, now = self.body.plan_hash, resolved.plan.plan_hash
        if seen is not None and seen != now:
            detail = f"The plan is now {now}; look at POST /jobs/plan again."
            item = Item(code="plan_changed", detail=detail, pointer="/plan_hash", input=seen)
            raise Problem("plan_changed", detail, errors=[item])
        return NewJob(
            model=self.model.id,
            dataset_id=self.dataset.id,
            eval_dataset_id=self.body.eval_dataset,
            retention_dataset_id=self.body.retention_dataset,
            request=self.body.spec(),
            config=resolved.config_json(),
            training=resolved.training_json(),
            plan=resolved.plan.to_json(),
            plan_hash=now,
            **self.device.columns(self._training_on),
            preset=self.body.preset,
            name=self.body.name,
            metadata=dict(self.body.metadata),
            priority=self.body.priority,
            max_attempts=max_attempts,
            auto_start=self.body.auto_start,
        )

    def _training_on(self, device: str) -> dict[str, Any]:
        """Return the training settings, resolved for a device."""
        given = training_from_dict(self.body.spec().get("training") or {})
        num_rows = self.resolved.num_rows
        return asdict(resolve_training(given, num_rows=num_rows, device=device))


async def consider(services: Services, team: str, body: JobCreate) -> Submission:
    """Look at everything that a request names, and plan it; what is wrong is raised at once."""
    # Nearly always the model is known: then one thread and one transaction see to everything.
    found = await to_thread.run_sync(_weigh_at_once, services, team, body)
    if found is not None:
        return found
    looked_up = await find_model(services, team, body.model)
    return await to_thread.run_sync(_weigh, services, team, body, looked_up)


# --- the model


async def find_model(services: Services, team: str, name: str) -> BaseModelRow | Item:
    """Return a model's row with its inventory, or what is wrong with its name.

    Raises:
        Problem: If its layers are still being read.
    """
    found = await to_thread.run_sync(find_or_register, services, team, name)
    if isinstance(found, Item):
        return found
    row = await wait_for_probe(services, found)
    if row.status == ModelStatus.REGISTERING:
        served = await to_thread.run_sync(_live_queues, services)
        who = "a worker does that" if served else "no worker is live that could do that"
        detail = (
            f"The layers of the model {name!r} are still being read; {who}. Try again soon, and"
            " look at GET /models."
        )
        item = Item(code="model_not_ready", detail=detail, pointer="/model")
        raise Problem("model_not_ready", detail, errors=[item])
    if row.status == ModelStatus.FAILED:
        return await to_thread.run_sync(partial(describe_failure, services, row))
    return row


async def wait_for_probe(
    services: Services, row: BaseModelRow, *, until_found: bool = False
) -> BaseModelRow:
    """Wait until a model is ready or failed, for as long as the settings allow.

    Args:
        services: The parts of this deployment.
        row: The model.
        until_found: Wait for the hub's answer only, and not for the probe.
    """
    seconds = services.settings.inventory_wait_seconds
    if until_found:
        seconds = min(seconds, services.settings.hub_seconds + _FOUND_SECONDS)
    if not await to_thread.run_sync(_live_queues, services):
        seconds = min(seconds, _FOUND_SECONDS)
    deadline = time.monotonic() + seconds
    pause = _FIRST_LOOK_SECONDS
    while row.status == ModelStatus.REGISTERING and time.monotonic() < deadline:
        if until_found and row.found_at is not None:
            break
        await sleep(pause)
        pause = min(pause * 1.5, _MAX_LOOK_SECONDS)
        row = await to_thread.run_sync(_reload, services, row.id)
    return row


def find_or_register(
    services: Services, team: str, name: str, *, source: str | None = None, pointer: str = "/model"
) -> BaseModelRow | Item:
    """Return a model's row, made now for an allowed source; or what is wrong with the name.

    A failed one is tried again, unless the hub refused it just now.

    Args:
        services: The parts of this deployment.
        team: Who asks.
        name: The model's id.
        source: An allowed folder or hub id; none: the registered one, or the id itself.
        pointer: Where the source stands in the request.

    Raises:
        Problem: If the id is registered from another source.
    """
    with transaction(services.engine, read_only=True) as session:
        known = base_models.find(session, name)
        if known is not None and source not in {None, known.source}:
            detail = f"The model {name!r} is already registered from {known.source!r}."
            raise Problem("model_conflict", detail)
        if known is not None and (
            known.status != ModelStatus.FAILED
            or base_models.was_refused_within(session, name, seconds=_ASKED_SECONDS)
        ):
            return known
        wanted = known.source if known is not None else source or name
        other = None if known is not None else describe_other_id(session, team, name)
        if other is not None:
            return Item(code="model_not_found", detail=other, pointer=pointer, input=name)
        refused = refuse_source(services, session, wanted, pointer=pointer)
        queues = _probing_queues(session)
    if refused is not None and (known is None or refused.code != "model_not_allowed"):
        return refused
    try:
        row = run_in_transaction(
            services.engine, lambda session: base_models.register(session, id=name, source=wanted)
        )
    except ValueError as error:  # another request was faster
        raise Problem("model_conflict", f"{error}.") from None
    services.doorbell.ring_models(queues)
    return row


def refuse_source(
    services: Services, session: Session, source: str, *, pointer: str = "/model"
) -> Item | None:
    """Return what is wrong with a folder or hub id, as far as it shows without the hub."""
    folder = base_models.is_folder(source)
    if not base_models.allowed(services.settings, source):
        globs = services.settings.allowed_models
        known_form = folder or base_models.is_hub_id(source)
        what = "" if known_form else f"{_NO_SOURCE}{suggest_hub_id(source)}"
        detail = (
            f"The model is neither registered nor allowed here.{what}"
            f" {suggest_models(session, source)} Allowed: {', '.join(globs[:20]) or 'none'}."
        )
        return Item(code="model_not_allowed", detail=detail, pointer=pointer, input=source)
    if folder and not (Path(source).expanduser() / "config.json").is_file():
        detail = (
            "The folder is not there, or holds no config.json; name a model's folder."
            f" {suggest_models(session, source)}"
        )
        return Item(code="model_not_found", detail=detail, pointer=pointer, input=source)
    return None


def describe_failure(services: Services, row: BaseModelRow, *, pointer: str = "/model") -> Item:
    """Return why a model failed; of a name that led to none, also the nearest registered ids."""
    failure = row.failure or {}
    why = failure.get("message", "its layers could not be read")
    if not base_models.led_nowhere(row):
        detail = f"The model {row.id!r} cannot be used: {why}"
        return Item(code="model_unavailable", detail=detail, pointer=pointer, input=row.id)
    with transaction(services.engine, read_only=True) as session:
        detail = f"{why} {suggest_models(session, row.source)}"
    return Item(code=str(failure["code"]), detail=detail, pointer=pointer, input=row.source)


def _reload(services: Services, model_id: str) -> BaseModelRow:
    with transaction(services.engine, read_only=True) as session:
        return base_models.get(session, model_id)


def _live_queues(services: Services) -> list[str]:
    with transaction(services.engine, read_only=True) as session:
        return _probing_queues(session)


def _probing_queues(session: Session) -> list[str]:
    """Return the queues of the live workers, each of which can probe a model."""
    known = {*TRAINING_QUEUES, *INFERENCE_QUEUES}
    return sorted(workers.live_queues(session) & known)


# --- the rest


def _weigh_at_once(services: Services, team: str, body: JobCreate) -> Submission | None:
    """Look at everything if the model is ready, else at nothing."""
    with transaction(services.engine, read_only=True) as session:
        model = base_models.find(session, body.model)
        if model is None or model.status != ModelStatus.READY:
            return None
        seen = _look(session, team, body)
    return _judge(team, body, model, seen)


def _weigh(
    services: Services, team: str, body: JobCreate, model: BaseModelRow | Item
) -> Submission:
    with transaction(services.engine, read_only=True) as session:
        seen = _look(session, team, body)
    return _judge(team, body, model, seen)


@dataclass(kw_only=True)
class _Seen:
    """What the database has of what a request names."""

    faults: list[Item] = field(default_factory=list)
    waiting: list[Item] = field(default_factory=list)
    dataset: Dataset | None = None
    others: dict[str, Dataset] = field(default_factory=dict)
    """The datasets that are not trained on, by their place in the request."""
    workers: list[Worker] = field(default_factory=list)


def _look(session: Session, team: str, body: JobCreate) -> _Seen:
    seen = _Seen()
    find = partial(find_dataset, session, team, faults=seen.faults, waiting=seen.waiting)
    seen.dataset = find(body.dataset, "/dataset")
    for name in ("eval_dataset", "retention_dataset"):
        given = getattr(body, name)
        other = None if given is None else find(given, f"/{name}")
        if other is not None:
            seen.others[f"/{name}"] = other
    seen.workers = workers.live_workers(session, seen_within_seconds=DEVICE_SEEN_SECONDS)
    return seen


def _judge(team: str, body: JobCreate, model: BaseModelRow | Item, seen: _Seen) -> Submission:
    dataset, waiting = seen.dataset, seen.waiting
    faults = ([] if isinstance(model, BaseModelRow) else [model]) + seen.faults
    # What has a CPU refuse the job, so that no CPU's worker may claim it either.
    half = (body.spec().get("training") or {}).get("precision") == "float16"
    device = find_device(body.device, seen.workers, faults, needs_accelerator=half)
    resolved = _plan(body, model, seen, None if device is None else device.choice, faults)
    if faults:
        raise InvalidRequest(faults + waiting)
    if waiting:
        raise Problem("dataset_not_ready", waiting[0].detail, errors=waiting)
    if not isinstance(model, BaseModelRow) or dataset is None or resolved is None or device is None:
        raise LookupError("a part of the request is missing and no fault says so")
    return Submission(
        body=body,
        team=team,
        model=model,
        dataset=dataset,
        resolved=resolved,
        device=device,
    )


def find_dataset(
    session: Any, team: str, dataset_id: str, pointer: str, faults: list[Item], waiting: list[Item]
) -> Dataset | None:
    """Return a team's dataset; what is wrong with it goes to `faults`, or to `waiting`."""
    try:
        found = datasets.get_dataset(session, dataset_id, team=team)
    except NotFound:
        detail = f"There is no dataset {dataset_id!r}; {_dataset_hint(session, team, dataset_id)}."
        faults.append(
            Item(code="dataset_not_found", detail=detail, pointer=pointer, input=dataset_id)
        )
        return None
    if found.status != DatasetStatus.READY:
        detail = f"The dataset {dataset_id} is {found.status}; see its report."
        waiting.append(Item(code="dataset_not_ready", detail=detail, pointer=pointer))
        return None
    return found


def _dataset_hint(session: Any, team: str, given: str) -> str:
    """Return what to do about a dataset that is not there, which may be a name or a file."""
    named = datasets.list_datasets(session, team=team, name=given, limit=3).rows
    if named:
        ids = ", ".join(row.id for row in named)
        return f"`{given}` is a name: send the id ({ids})"
    if Path(given).suffix:
        return "upload the file first (POST /datasets) and send the id of the answer"
    newest = datasets.list_datasets(session, team=team, limit=_COMPARED).rows
    by_name = {row.name: row.id for row in reversed(newest) if row.name}
    near = get_close_matches(given, by_name)
    meant = " or ".join(f"`{name}` ({by_name[name]})" for name in near)
    return f"the nearest by name: {meant}" if meant else "see GET /datasets"


def _plan(
    body: JobCreate,
    model: BaseModelRow | Item,
    seen: _Seen,
    choice: DeviceChoice | None,
    faults: list[Item],
) -> ResolvedJob | None:
    """Plan as far as what was found allows, so that its faults come in the same answer."""
    inventory, dataset = None, seen.dataset
    if isinstance(model, BaseModelRow):
        inventory = base_models.inventory_of(model)
    if inventory is not None:
        named = seen.others if dataset is None else {"/dataset": dataset, **seen.others}
        num_images = {pointer: each.num_images for pointer, each in named.items()}
        faults.extend(item_of(fault) for fault in image_faults(inventory, num_images))
    try:
        resolved = resolve_job(
            body.spec(),
            inventory,
            num_rows=None if dataset is None else dataset.num_rows,
            device="cpu" if choice is None else choice.device,
        )
    except InvalidConfig:
        # With those that stand behind them: a caller should hear of everything in one answer.
        found = find_job_faults(
            body.spec(),
            inventory,
            num_rows=None if dataset is None else dataset.num_rows,
            device="cpu" if choice is None else choice.device,
        )
        faults.extend(item_of(fault) for fault in found)
        return None
    if resolved is None or dataset is None:
        return resolved
    return _with_warnings(resolved, dataset)


def _with_warnings(resolved: ResolvedJob, dataset: Dataset) -> ResolvedJob:
    """Return the job with the plan's warnings extended by what the dataset makes of it."""
    plan = resolved.plan
    warnings = (
        *plan.warnings,
        *image_warnings(plan, num_images=dataset.num_images),
        *dataset_notes(dataset.details or {}),
    )
    return replace(resolved, plan=replace(plan, warnings=warnings))
