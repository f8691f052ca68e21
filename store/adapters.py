"""Adapters as their team sees them: what jobs made, and what was imported or merged."""

from typing import Any

from sqlalchemy import delete, select
from sqlalchemy.orm import Session

from store.errors import NotFound, StillReferenced
from store.ids import new_id
from store.lifecycle import OPEN
from store.models import Adapter, AdapterOrigin, Job, JobKind
from store.pages import Page, read_page
from store.quotas import hold_team, refuse_bytes


def create_adapter(  # noqa: PLR0913 - the columns of one row
    session: Session,
    *,
    team: str,
    origin: AdapterOrigin,
    model: str,
    prefix: str,
    id: str | None = None,  # noqa: A002 - the vocabulary's word for it
    job_id: str | None = None,
    parent_id: str | None = None,
    name: str | None = None,
    sha256: str | None = None,
    size_bytes: int | None = None,
    trainable_parameters: int | None = None,
    details: dict[str, Any] | None = None,
) -> Adapter:
    """Record an adapter; its objects are already stored under `prefix`."""
    adapter = Adapter(
        id=id or new_id("adp"),
        team=team,
        origin=origin,
        model=model,
        prefix=prefix,
        job_id=job_id,
        parent_id=parent_id,
        name=name,
        sha256=sha256,
        size_bytes=size_bytes,
        trainable_parameters=trainable_parameters,
        details=details,
    )
    session.add(adapter)
    session.flush()
    return adapter


def find_import(
    session: Session,
    *,
    team: str,
    model: str,
    sha256: str,
    manifest_sha256: str,
    name: str | None = None,
) -> Adapter | None:
    """Return the first adapter that a team imported with this content and, if told, this name."""
    found = session.scalars(
        select(Adapter)
        .where(
            Adapter.team == team,
            Adapter.origin == AdapterOrigin.IMPORT,
            Adapter.model == model,
            Adapter.sha256 == sha256,
        )
        .order_by(Adapter.id)
    )
    return next(
        (
            adapter
            for adapter in found
            if (adapter.details or {}).get("manifest_sha256") == manifest_sha256
            and name in {None, adapter.name}
        ),
        None,
    )


def import_adapter(  # noqa: PLR0913 - the columns of one row
    session: Session,
    *,
    team: str,
    id: str,  # noqa: A002 - the vocabulary's word for it
    model: str,
    prefix: str,
    name: str | None,
    sha256: str,
    manifest_sha256: str,
    size_bytes: int,
    trainable_parameters: int,
    details: dict[str, Any],
    max_stored_bytes: int | None = None,
) -> Adapter:
    """Record an imported adapter, unless the team has one with the same content and name.

    Returns:
        The new row, or the one that was there; its id tells which.

    Raises:
        QuotaExceeded: If it would be too much for the team.
    """
    # Locked, so that of two equal imports at once the second finds the first.
    owner = hold_team(session, team)
    content = {"model": model, "sha256": sha256, "manifest_sha256": manifest_sha256}
    found = find_import(session, team=team, name=name, **content)
    if found is not None:
        return found
    refuse_bytes(session, owner, adding=size_bytes, default=max_stored_bytes)
    return create_adapter(
        session,
        team=team,
        origin=AdapterOrigin.IMPORT,
        id=id,
        model=model,
        prefix=prefix,
        name=name,
        sha256=sha256,
        size_bytes=size_bytes,
        trainable_parameters=trainable_parameters,
        details={**details, "manifest_sha256": manifest_sha256},
    )


def get_adapter(session: Session, adapter_id: str, *, team: str) -> Adapter:
    """Return a team's adapter.

    Raises:
        NotFound: If there is none, or it is another team's.
    """
    adapter = session.scalars(
        select(Adapter).where(Adapter.id == adapter_id, Adapter.team == team)
    ).one_or_none()
    if adapter is None:
        raise NotFound("adapter", adapter_id)
    return adapter


def adapter_of_job(session: Session, job_id: str, *, team: str) -> Adapter | None:
    """Return the adapter that a team's job made, if it has made one."""
    return session.scalars(
        select(Adapter).where(Adapter.job_id == job_id, Adapter.team == team)
    ).one_or_none()


def list_adapters(
    session: Session,
    *,
    team: str,
    model: str | None = None,
    name: str | None = None,
    cursor: str | None = None,
    limit: int = 50,
) -> Page[Adapter]:
    """Return a page of a team's adapters, newest first.

    Raises:
        InvalidCursor: If the cursor is not one of ours.
    """
    statement = select(Adapter).where(Adapter.team == team)
    if model is not None:
        statement = statement.where(Adapter.model == model)
    if name is not None:
        statement = statement.where(Adapter.name == name)
    return read_page(session, statement, key=Adapter.id, cursor=cursor, limit=limit)


def training_job_of(session: Session, adapter: Adapter) -> Job | None:
    """Return the job that trained an adapter, or what it was cut from; none if that is gone."""
    seen: set[str] = set()
    current: Adapter | None = adapter
    while current is not None and current.id not in seen:
        seen.add(current.id)
        job = None if current.job_id is None else session.get(Job, current.job_id)
        if job is not None and job.kind == JobKind.TRAINING:
            return job
        current = None if current.parent_id is None else session.get(Adapter, current.parent_id)
    return None


def delete_adapter(session: Session, adapter_id: str, *, team: str) -> str:
    """Delete an adapter's row, unless a job that has not ended is to compress it.

    Returns:
        The prefix of its objects, for the caller to delete after the commit.

    Raises:
        NotFound: If the team has no such adapter.
        StillReferenced: If an open job has it as its source.
    """
    # Locked, so that no job can take it as its source between the check and the deletion.
    prefix = session.scalars(
        select(Adapter.prefix)
        .where(Adapter.id == adapter_id, Adapter.team == team)
        .with_for_update()
    ).one_or_none()
    if prefix is None:
        raise NotFound("adapter", adapter_id)
    needed_by = session.scalars(
        select(Job.id).where(Job.source_adapter_id == adapter_id, Job.status.in_(OPEN)).limit(1)
    ).one_or_none()
    if needed_by is not None:
        raise StillReferenced("adapter", adapter_id, by=f"job {needed_by}")
    session.execute(
        delete(Adapter).where(Adapter.id == adapter_id),
        execution_options={"synchronize_session": False},
    )
    return prefix
