"""Which objects belong to a row: the stored object's side of every reference.

Objects come in groups that live and go together: a dataset, an adapter's folder, a checkpoint's
folder, the log of an attempt. A group is as young as its youngest object, so that one whose upload
takes long is not torn apart.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Final

from sqlalchemy import Engine, select
from sqlalchemy.orm import Session

from store.database import transaction
from store.models import Adapter, Attempt, Checkpoint, Dataset
from store.objects import Objects, StoredObject

DATASETS: Final = "datasets"
ADAPTERS: Final = "adapters"
JOBS: Final = "jobs"
_DEPTH: Final = {DATASETS: 2, ADAPTERS: 2, JOBS: 4}
"""Segments of a key that name its group."""
_BATCH: Final = 200


@dataclass(kw_only=True, slots=True)
class Group:
    """Objects that are needed together or not at all."""

    name: str
    """What their keys begin with, or the one key itself."""
    is_object: bool
    youngest: datetime
    num_objects: int = 0
    size_bytes: int = 0

    @property
    def kind(self) -> str:
        """Which folder of the store it is in."""
        return self.name.partition("/")[0]


def find_orphans(engine: Engine, objects: Objects, *, before: datetime) -> Iterator[Group]:
    """Yield the groups last written before a moment that no row refers to.

    The rows are read after the objects were listed: a row that came meanwhile is seen.
    """
    for kind in _DEPTH:
        groups = _grouped(objects.list(kind))
        old = sorted(
            (group for group in groups if group.youngest < before), key=lambda group: group.name
        )
        for start in range(0, len(old), _BATCH):
            batch = old[start : start + _BATCH]
            with transaction(engine, read_only=True) as session:
                kept = names_with_rows(session, batch)
            yield from (group for group in batch if group.name not in kept)


def names_with_rows(session: Session, groups: Sequence[Group]) -> set[str]:
    """Return the names of those groups that a row refers to."""
    by_kind: dict[str, list[str]] = {}
    for group in groups:
        by_kind.setdefault(group.kind, []).append(group.name)
    found = _datasets(session, by_kind.get(DATASETS, []))
    found |= _adapters(session, by_kind.get(ADAPTERS, []))
    return found | _of_jobs(session, by_kind.get(JOBS, []))


def _datasets(session: Session, names: list[str]) -> set[str]:
    keys = session.scalars(select(Dataset.object_key).where(Dataset.object_key.in_(names)))
    return {key for key in keys if key is not None}


def _adapters(session: Session, names: list[str]) -> set[str]:
    either = [*names, *(f"{name}/" for name in names)]
    return {
        prefix.rstrip("/")
        for prefix in session.scalars(select(Adapter.prefix).where(Adapter.prefix.in_(either)))
    }


def _of_jobs(session: Session, names: list[str]) -> set[str]:
    jobs = {name.split("/")[1] for name in names}
    prefixes = [
        prefix.rstrip("/")
        for prefix in session.scalars(select(Checkpoint.prefix).where(Checkpoint.job_id.in_(jobs)))
    ]
    executed = select(Attempt.job_id, Attempt.number).where(Attempt.job_id.in_(jobs))
    logs: set[str] = set()
    for job, number in session.execute(executed):
        logs |= {log_key(job, number), live_log_prefix(job, number)}
    return {
        name for name in names if name in logs or any(_belongs(name, prefix) for prefix in prefixes)
    }


def log_key(job_id: str, attempt: int) -> str:
    """Return where the log of an attempt is stored."""
    return f"jobs/{job_id}/a{attempt}/log.txt"


def live_log_prefix(job_id: str, attempt: int) -> str:
    """Return below what the log of an attempt is stored while the attempt runs."""
    return f"jobs/{job_id}/a{attempt}/log.live"


def _belongs(name: str, prefix: str) -> bool:
    """Tell whether a group lies at, below or around a prefix."""
    return f"{name}/".startswith(f"{prefix}/") or f"{prefix}/".startswith(f"{name}/")


def _grouped(found: Iterable[StoredObject]) -> list[Group]:
    groups: dict[str, Group] = {}
    for each in found:
        segments = each.key.split("/")
        depth = _DEPTH[segments[0]]
        name = "/".join(segments[:depth])
        group = groups.setdefault(name, Group(name=name, is_object=True, youngest=each.modified_at))
        group.is_object = group.is_object and len(segments) <= depth
        group.youngest = max(group.youngest, each.modified_at)
        group.num_objects += 1
        group.size_bytes += each.size_bytes
    return list(groups.values())
