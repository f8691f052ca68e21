"""Base models: which ones this deployment allows, and what is known of their layers.

A new row is `registering`. Of a hub id, a worker first asks the hub whether it has the model
(`Stage.LOOK_UP`); a name that the hub refuses fails with a code of `LOOK_UP_FAILURES`, is in no
list and is deleted by the next collection. Then a worker probes the model.
"""

import os
import re
from datetime import datetime
from enum import StrEnum
from fnmatch import fnmatchcase
from typing import Any, Final

from sqlalchemy import ColumnElement, and_, delete, exists, func, not_, null, or_, select, update
from sqlalchemy.orm import Session, defer
from sqlalchemy.orm.attributes import set_committed_value

from grit_core.inventory import ModelInventory
from store.database_time import database_now, database_time_in
from store.dialects import insert_unless_there
from store.errors import NotFound, StillReferenced
from store.models import Adapter, BaseModelRow, Job, ModelStatus
from store.settings import Settings

_HUB_ID: Final = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9][\w.-]{0,95})?", re.ASCII)
LOOK_UP_FAILURES: Final = ("model_not_found", "model_gated", "hub_unreachable")
"""Codes of failures that say that the name led to no model."""
_ANSWERED_SECONDS: Final = 60.0
"""Long after every request that waited for the hub's answer has had it."""
_FOLDER_STARTS: Final = ("/", "./", "../", "~")
_FOLDER_NAMES: Final = (".", "..")
_MAX_INVENTORIES: Final = 32
_Key = tuple[str, str | None, datetime | None]
_Cached = tuple[dict[str, Any], ModelInventory]
_inventories: dict[_Key, _Cached] = {}
_UNCLAIMED: Final[dict[str, Any]] = {"claimed_by": None, "claimed_until": None}


class Stage(StrEnum):
    """What a registering model waits for; each stage has workers' places of its own."""

    LOOK_UP = "look_up"
    """A hub id that the hub has not confirmed."""
    HUB = "hub"
    """The probe of a hub model."""
    FOLDER = "folder"
    """The probe of a folder."""


def allowed(settings: Settings, source: str) -> bool:
    """Tell whether a hub id or a folder is among the deployment's globs.

    A folder is judged by its real path, so that neither `..` nor a link leads out of an allowed
    one.
    """
    if not is_folder(source):
        wanted = [glob for glob in settings.allowed_models if not is_folder(glob)]
        return is_hub_id(source) and any(fnmatchcase(source, glob) for glob in wanted)
    if "\0" in source:
        return False
    real = os.path.realpath(source)
    return any(
        fnmatchcase(real, glob if glob == "*" else _real_glob(glob))
        for glob in settings.allowed_models
        if glob == "*" or is_folder(glob)
    )


def is_folder(source: str) -> bool:
    """Tell whether a source names a folder of this machine and not a hub id."""
    return source.startswith(_FOLDER_STARTS) or source in _FOLDER_NAMES


def is_hub_id(source: str) -> bool:
    """Tell whether a source is written as a hub id is: `name` or `org/name`."""
    return _HUB_ID.fullmatch(source) is not None and ".." not in source


def led_nowhere(row: BaseModelRow) -> bool:
    """Tell whether a row only says that its name led to no model."""
    return row.status == ModelStatus.FAILED and (row.failure or {}).get("code") in LOOK_UP_FAILURES


def register(session: Session, *, id: str, source: str) -> BaseModelRow:  # noqa: A002
    """Record a base model as `registering`; a failed one is tried again, a known one returned.

    Raises:
        ValueError: If the id is taken by a model with another source.
    """
    new = {"id": id, "source": source, "status": ModelStatus.REGISTERING}
    if insert_unless_there(session, BaseModelRow, new):
        return get(session, id)
    session.execute(
        update(BaseModelRow)
        .where(
            BaseModelRow.id == id,
            BaseModelRow.source == source,
            BaseModelRow.status == ModelStatus.FAILED,
        )
        .values(
            status=ModelStatus.REGISTERING,
            failure=null(),
            requested_at=database_now(),
            found_at=null(),
            **_UNCLAIMED,
        ),
        execution_options={"synchronize_session": False},
    )
    row = get(session, id)
    if row.source != source:
        raise ValueError(f"model {id!r} is already registered from {row.source!r}")
    return row


def claim_models(
    session: Session, stage: Stage, *, worker_id: str, lease_seconds: float, limit: int
) -> list[BaseModelRow]:
    """Claim models that wait at a stage, the oldest first.

    Args:
        session: The caller's transaction.
        stage: What they wait for.
        worker_id: Who claims them.
        lease_seconds: How long the claim holds unless it is renewed.
        limit: Most rows to claim.
    """
    waiting = list(
        session.scalars(
            select(BaseModelRow.id)
            .where(_waits_at(stage))
            .order_by(BaseModelRow.requested_at, BaseModelRow.id)
            .limit(limit)
        )
    )
    # Compare and set: of two workers that saw the same row, the second changes nothing.
    claimed = [
        session.scalars(
            update(BaseModelRow)
            .where(BaseModelRow.id == model_id, _waits_at(stage))
            .values(claimed_by=worker_id, claimed_until=database_time_in(lease_seconds))
            .returning(BaseModelRow.id),
            execution_options={"synchronize_session": False},
        ).one_or_none()
        for model_id in waiting
    ]
    return [get(session, model_id) for model_id in claimed if model_id is not None]


def is_waiting(session: Session, stage: Stage) -> bool:
    """Tell whether a model waits at a stage; a read, for workers that look often."""
    return (
        session.scalars(select(BaseModelRow.id).where(_waits_at(stage)).limit(1)).first()
        is not None
    )


def renew_claim(
    session: Session,
    *,
    id: str,  # noqa: A002
    worker_id: str,
    lease_seconds: float,
) -> bool:
    """Hold a claim for longer; false if the model was deleted or another worker has it."""
    changed = session.scalars(
        update(BaseModelRow)
        .where(*_held(id, worker_id))
        .values(claimed_until=database_time_in(lease_seconds))
        .returning(BaseModelRow.id),
        execution_options={"synchronize_session": False},
    )
    return changed.one_or_none() is not None


def release_claim(session: Session, *, id: str, worker_id: str, found: bool = False) -> None:  # noqa: A002
    """Leave a model to whichever worker looks next.

    Args:
        session: The caller's transaction.
        id: The model.
        worker_id: Who held it.
        found: Whether the hub has confirmed that it has the model.
    """
    values: dict[str, Any] = {"found_at": database_now()} if found else {}
    session.execute(
        update(BaseModelRow).where(*_held(id, worker_id)).values(**values, **_UNCLAIMED),
        execution_options={"synchronize_session": False},
    )


def save_inventory(
    session: Session,
    *,
    id: str,  # noqa: A002
    inventory: dict[str, Any],
    inventory_hash: str,
    worker_id: str | None = None,
) -> BaseModelRow:
    """Record a model's layers and mark it `ready`.

    Args:
        session: The caller's transaction.
        id: The model.
        inventory: Its layers.
        inventory_hash: Their hash.
        worker_id: Who probed it; without the claim that it had, nothing is recorded.

    Raises:
        NotFound: If there is no such model.
    """
    held = [BaseModelRow.id == id] if worker_id is None else _held(id, worker_id)
    session.execute(
        update(BaseModelRow)
        .where(*held)
        .values(
            status=ModelStatus.READY,
            inventory=inventory,
            inventory_hash=inventory_hash,
            failure=null(),
            ready_at=database_now(),
            **_UNCLAIMED,
        ),
        execution_options={"synchronize_session": False},
    )
    return get(session, id)


def save_failure(
    session: Session,
    *,
    id: str,  # noqa: A002
    code: str,
    message: str,
    worker_id: str | None = None,
) -> BaseModelRow:
    """Record why a model's inventory could not be built, unless it is ready.

    Args:
        session: The caller's transaction.
        id: The model.
        code: The kind of failure.
        message: Why, for its users.
        worker_id: Who looked; without the claim that it had, nothing is recorded.

    Raises:
        NotFound: If there is no such model.
    """
    held = [BaseModelRow.id == id] if worker_id is None else _held(id, worker_id)
    session.execute(
        update(BaseModelRow)
        .where(*held, BaseModelRow.status != ModelStatus.READY)
        .values(
            status=ModelStatus.FAILED, failure={"code": code, "message": message}, **_UNCLAIMED
        ),
        execution_options={"synchronize_session": False},
    )
    return get(session, id)


def delete_model(session: Session, model_id: str) -> None:
    """Delete a base model that no job and no adapter names.

    Raises:
        NotFound: If there is no such model.
        StillReferenced: If a job or an adapter names it.
    """
    # Locked, so that no job can name it between the check and the deletion.
    row = session.scalars(
        select(BaseModelRow.id).where(BaseModelRow.id == model_id).with_for_update()
    ).one_or_none()
    if row is None:
        raise NotFound("model", model_id)
    for kind, table in (("job", Job), ("adapter", Adapter)):
        named_by = session.scalars(
            select(table.id).where(table.model == model_id).limit(1)
        ).one_or_none()
        if named_by is not None:
            raise StillReferenced("model", model_id, by=f"{kind} {named_by}")
    session.execute(
        delete(BaseModelRow).where(BaseModelRow.id == model_id),
        execution_options={"synchronize_session": False},
    )


def delete_failed(session: Session, *, after_seconds: float) -> int:
    """Delete failed models that no job and no adapter names; returns how many.

    Args:
        session: The caller's transaction.
        after_seconds: How long a model that is there and cannot be used is kept after it was last
            asked for. A name that led to no model is kept for a minute, for those who ask just now.
    """
    old = BaseModelRow.requested_at < database_time_in(-after_seconds)
    answered = BaseModelRow.requested_at < database_time_in(-_ANSWERED_SECONDS)
    deleted = session.scalars(
        delete(BaseModelRow)
        .where(
            BaseModelRow.status == ModelStatus.FAILED,
            or_(old, and_(_was_not_there(), answered)),
            ~exists().where(Job.model == BaseModelRow.id),
            ~exists().where(Adapter.model == BaseModelRow.id),
        )
        .returning(BaseModelRow.id),
        execution_options={"synchronize_session": False},
    )
    return len(deleted.all())


def get(session: Session, model_id: str) -> BaseModelRow:
    """Return a base model.

    Raises:
        NotFound: If there is none.
    """
    row = session.get(BaseModelRow, model_id, populate_existing=True)
    if row is None:
        raise NotFound("model", model_id)
    return row


def find(session: Session, model_id: str) -> BaseModelRow | None:
    """Return a base model, if there is one. Its inventory is shared between calls: only read it.

    An inventory is tens of kilobytes and changes only when it is built again, so that the same one
    is fetched and decoded once in a process.
    """
    row = session.scalars(
        select(BaseModelRow)
        .where(BaseModelRow.id == model_id)
        .options(defer(BaseModelRow.inventory))
    ).one_or_none()
    if row is not None and row.status == ModelStatus.READY:
        data, _ = _inventories.get(_key(row)) or _fetch_inventory(session, row)
        set_committed_value(row, "inventory", data)
    elif row is not None:
        session.refresh(row, ["inventory"])
    return row


def find_existing(session: Session, model_id: str) -> BaseModelRow | None:
    """Return a base model with its stored inventory, unless its name led to none."""
    row = session.get(BaseModelRow, model_id, populate_existing=True)
    return None if row is None or led_nowhere(row) else row


def was_refused_within(session: Session, model_id: str, *, seconds: float) -> bool:
    """Tell whether the hub was asked for a model so lately, and its name led to none."""
    lately = BaseModelRow.requested_at > database_time_in(-seconds)
    found = session.scalars(
        select(BaseModelRow.id).where(BaseModelRow.id == model_id, _was_not_there(), lately)
    )
    return found.one_or_none() is not None


def inventory_of(row: BaseModelRow) -> ModelInventory | None:
    """Return the layers of a model, if they are known.

    Raises:
        PlanMismatch: If what is stored is not what its hash was made from.
    """
    if row.inventory is None:
        return None
    cached = _inventories.get(_key(row))
    return cached[1] if cached is not None else ModelInventory.from_json(row.inventory)


def names(session: Session) -> list[str]:
    """Return the ids of the base models that can be used, now or soon, sorted.

    A name that the hub is still asked about is left out: it may lead to no model.
    """
    registering = BaseModelRow.status == ModelStatus.REGISTERING
    found = or_(_names_folder(), BaseModelRow.found_at.is_not(None))
    usable = or_(BaseModelRow.status == ModelStatus.READY, and_(registering, found))
    return list(session.scalars(select(BaseModelRow.id).where(usable).order_by(BaseModelRow.id)))


def _key(row: BaseModelRow) -> _Key:
    return row.id, row.inventory_hash, row.ready_at


def _fetch_inventory(session: Session, row: BaseModelRow) -> _Cached:
    session.refresh(row, ["inventory"])
    data = row.inventory or {}
    cached = data, ModelInventory.from_json(data)
    _inventories[_key(row)] = cached
    while len(_inventories) > _MAX_INVENTORIES:
        # Of two threads that evict the same one, the second finds nothing to do.
        _inventories.pop(next(iter(_inventories), _key(row)), None)
    return cached


def list_models(session: Session) -> list[BaseModelRow]:
    """Return the base models by id, without the names that led to none."""
    there = not_(_was_not_there())
    return list(session.scalars(select(BaseModelRow).where(there).order_by(BaseModelRow.id)))


def _waits_at(stage: Stage) -> ColumnElement[bool]:
    folder = _names_folder()
    of_stage = {
        Stage.FOLDER: folder,
        Stage.LOOK_UP: and_(not_(folder), BaseModelRow.found_at.is_(None)),
        Stage.HUB: and_(not_(folder), BaseModelRow.found_at.is_not(None)),
    }
    return and_(
        BaseModelRow.status == ModelStatus.REGISTERING,
        or_(BaseModelRow.claimed_until.is_(None), BaseModelRow.claimed_until < database_now()),
        of_stage[stage],
    )


def _names_folder() -> ColumnElement[bool]:
    return or_(
        BaseModelRow.source.in_(_FOLDER_NAMES),
        *(BaseModelRow.source.startswith(start, autoescape=True) for start in _FOLDER_STARTS),
    )


def _held(model_id: str, worker_id: str) -> list[ColumnElement[bool]]:
    return [BaseModelRow.id == model_id, BaseModelRow.claimed_by == worker_id]


def _was_not_there() -> ColumnElement[bool]:
    code = BaseModelRow.failure["code"].as_string()
    failed = BaseModelRow.status == ModelStatus.FAILED
    return and_(failed, func.coalesce(code, "").in_(LOOK_UP_FAILURES))


def _real_glob(glob: str) -> str:
    """Resolve the links in the part of a glob before its first wildcard."""
    parts = glob.split("/")
    literal = next((at for at, part in enumerate(parts) if any(c in part for c in "*?[")), None)
    if literal is None:
        return os.path.realpath(glob)
    return "/".join([
        os.path.realpath("/".join(parts[:literal]) or "/").rstrip("/"),
        *parts[literal:],
    ])
