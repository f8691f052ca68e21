"""Jobs for those who ask: the requests of a moment are looked up in one statement.

What is asked for while a look is under way waits for the next one, which begins after the request
came: nobody is shown less than what was written before they asked. So a thousand callers that poll
cost the database a few statements a moment, and a request that is alone waits for nothing.
"""

import asyncio
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple
from weakref import WeakKeyDictionary

from anyio import CapacityLimiter, to_thread
from sqlalchemy.orm import Session

from api.links import below, current_prefix
from api.schemas.jobs import JobRead
from api.services import Services
from api.standing import Standing
from store.errors import NotFound
from store.job_rows import read_rows
from store.reading import CONNECTIONS, Reader

_MAX_BATCH: Final = 64


class JobSeen(NamedTuple):
    """A job's answer."""

    data: bytes
    """JSON."""
    etag: str
    final: bool
    """Whether it will not change any more."""


class _Wanted(NamedTuple):
    job_id: str
    team: str
    prefix: str
    """Of the links that the caller is to follow."""
    answer: asyncio.Future[JobSeen]


@dataclass
class _Desk:
    """What an event loop has to do."""

    limiter: CapacityLimiter = field(default_factory=lambda: CapacityLimiter(CONNECTIONS))
    waiting: list[_Wanted] = field(default_factory=list)
    looks: set[asyncio.Task[None]] = field(default_factory=set)


class JobReads:
    """The jobs of an app's database."""

    def __init__(self, services: Services) -> None:
        self._services = services
        self._reader = Reader(services.engine)
        self._desks: WeakKeyDictionary[Any, _Desk] = WeakKeyDictionary()

    async def read(self, job_id: str, *, team: str) -> JobSeen:
        """Return a team's job as it stands; raises as `store.jobs.get_job` does."""
        loop = asyncio.get_running_loop()
        desk = self._desks.get(loop)
        if desk is None:
            desk = self._desks.setdefault(loop, _Desk())
        wanted = _Wanted(job_id, team, current_prefix(), loop.create_future())
        desk.waiting.append(wanted)
        if len(desk.looks) < CONNECTIONS:
            look = loop.create_task(self._look(desk))
            desk.looks.add(look)
            look.add_done_callback(desk.looks.discard)
        return await wanted.answer

    async def _look(self, desk: _Desk) -> None:
        while desk.waiting:
            batch, desk.waiting = desk.waiting[:_MAX_BATCH], desk.waiting[_MAX_BATCH:]
            try:
                found = await to_thread.run_sync(self._find, batch, limiter=desk.limiter)
            except Exception as error:  # noqa: BLE001 - each who waits is told
                found = [error] * len(batch)
            for wanted, seen in zip(batch, found, strict=True):
                if wanted.answer.done():  # the caller has left
                    continue
                if isinstance(seen, Exception):
                    wanted.answer.set_exception(seen)
                else:
                    wanted.answer.set_result(seen)

    def _find(self, batch: Sequence[_Wanted]) -> list[JobSeen | Exception]:
        return self._reader.run(lambda session: self._present(session, batch))

    def _present(self, session: Session, batch: Sequence[_Wanted]) -> list[JobSeen | Exception]:
        rows = read_rows(session, [wanted.job_id for wanted in batch])
        standing = Standing(session, self._services)
        found: list[JobSeen | Exception] = []
        for wanted in batch:
            row = rows.get(wanted.job_id)
            if row is None or row.team != wanted.team:
                found.append(NotFound("job", wanted.job_id))
                continue
            try:
                with below(wanted.prefix):
                    found.append(_seen(standing.show(row)))
            except ValueError as error:  # a row that cannot be shown is no other caller's fault
                found.append(error)
        return found


def _seen(shown: JobRead) -> JobSeen:
    data = shown.model_dump_json().encode()
    etag = f'"{hashlib.sha256(data).hexdigest()[:24]}"'
    return JobSeen(data, etag, shown.finished_at is not None)
