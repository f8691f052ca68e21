"""Base models: which ones this deployment allows, and what is known of their layers."""

import os
import re
from datetime import datetime
from fnmatch import fnmatchcase
from typing import Any, Final

from sqlalchemy import null, select, update
from sqlalchemy.orm import Session, defer
from sqlalchemy.orm.attributes import set_committed_value

from grit_core.inventory import ModelInventory
from store.database_time import database_now
from store.dialects import insert_unless_there
from store.errors import NotFound
from store.models import BaseModelRow, ModelStatus
from store.settings import Settings

_HUB_ID: Final = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9][\w.-]{0,95})?", re.ASCII)
_MAX_INVENTORIES: Final = 32
_Key = tuple[str, str | None, datetime | None]
_Cached = tuple[dict[str, Any], ModelInventory]
_inventories: dict[_Key, _Cached] = {}


def allowed(settings: Settings, source: str) -> bool:
    """Tell whether a hub id or a folder is among the deployment's globs.

    A folder is judged by its real path, so that neither `..` nor a link leads out of an allowed
    one.
    """
    if not is_folder(source):
        wanted = [glob for glob in settings.allowed_models if not is_folder(glob)]
        known = _HUB_ID.fullmatch(source) is not None and ".." not in source
        return known and any(fnmatchcase(source, glob) for glob in wanted)
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
    return source.startswith(("/", "./", "../", "~")) or source in {".", ".."}


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
        .values(status=ModelStatus.REGISTERING, failure=null(), requested_at=database_now()),
        execution_options={"synchronize_session": False},
    )
    row = get(session, id)
    if row.source != source:
        raise ValueError(f"model {id!r} is already registered from {row.source!r}")
    return row


def registering(session: Session, *, limit: int = 10) -> list[BaseModelRow]:
    """Return the models whose inventory is still to be built, the oldest first."""
    return list(
        session.scalars(
            select(BaseModelRow)
            .where(BaseModelRow.status == ModelStatus.REGISTERING)
            .order_by(BaseModelRow.requested_at, BaseModelRow.id)
            .limit(limit)
        )
    )


def save_inventory(
    session: Session,
    *,
    id: str,  # noqa: A002
    inventory: dict[str, Any],
    inventory_hash: str,
) -> BaseModelRow:
    """Record a model's layers and mark it `ready`.

    Raises:
        NotFound: If there is no such model.
    """
    session.execute(
        update(BaseModelRow)
        .where(BaseModelRow.id == id)
        .values(
            status=ModelStatus.READY,
            inventory=inventory,
            inventory_hash=inventory_hash,
            failure=null(),
            ready_at=database_now(),
        ),
        execution_options={"synchronize_session": False},
    )
    return get(session, id)


def save_failure(session: Session, *, id: str, code: str, message: str) -> BaseModelRow:  # noqa: A002
    """Record why a model's inventory could not be built, unless it is ready.

    Raises:
        NotFound: If there is no such model.
    """
    session.execute(
        update(BaseModelRow)
        .where(BaseModelRow.id == id, BaseModelRow.status != ModelStatus.READY)
        .values(status=ModelStatus.FAILED, failure={"code": code, "message": message}),
        execution_options={"synchronize_session": False},
    )
    return get(session, id)


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
    """Return the ids of all base models, sorted."""
    return list(session.scalars(select(BaseModelRow.id).order_by(BaseModelRow.id)))


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
    """Return all base models by id."""
    return list(session.scalars(select(BaseModelRow).order_by(BaseModelRow.id)))


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
