"""Base models: which ones this deployment allows, and what is known of their layers."""

import os
import re
from fnmatch import fnmatchcase
from typing import Any, Final

from sqlalchemy import null, select, update
from sqlalchemy.orm import Session

from store.database_time import database_now
from store.dialects import insert_unless_there
from store.errors import NotFound
from store.models import BaseModelRow, ModelStatus
from store.settings import Settings

_HUB_ID: Final = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9][\w.-]{0,95})?", re.ASCII)


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
