"""What a look costs over 1,000 to 1,000,000 jobs: the slope through the logarithms."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Final

import httpx
from sqlalchemy import Engine, func, select
from sqlalchemy.orm import Session

from benchmarks.load.rows import MODELS, NUM_TEAMS, Filled, status_of
from benchmarks.load.stand import Server, Stand, say
from benchmarks.serving.memory import slope
from store import attempts, jobs
from store.database import create_engine_from
from store.lifecycle import OPEN
from store.models import Job
from store.pages import encode_cursor
from store.settings import Settings

SIZES: Final = (1_000, 10_000, 100_000, 1_000_000)
NUM_ASKED: Final = 60
TEAM: Final = 7
Numbers = dict[int, float]


def requests_of(database: Filled) -> dict[str, list[str]]:
    """Paths by name: a job, and lists with every filter and from deep inside."""
    mine = range(TEAM, database.num_jobs + 1, NUM_TEAMS)
    ended = [number for number in mine if status_of(number) == "succeeded"]
    deep = encode_cursor(database.job_id(mine[len(mine) // 2]))
    oldest = encode_cursor(database.job_id(mine[min(60, len(mine) - 1)]))
    filters = {
        "list": "",
        "list, status=succeeded": "?status=succeeded",
        "list, status=queued": "?status=queued",
        "list, two statuses": "?status=failed&status=running",
        "list, model": f"?model={MODELS[1]}",
        "list, device": "?device=cuda",
        "list, created_after": "?created_after=2026-01-01T00:00:00Z",
        "list, created_before all but the oldest": "?created_before=2026-01-01T00:00:00Z",
        "list, metadata that two jobs have": "?metadata[sweep]=s-5",
        "list, metadata that half a page has": "?metadata[seed]=3",
        "list, from the middle": f"?cursor={deep}",
        "list, the last page": f"?cursor={oldest}",
    }
    step = max(1, len(ended) // NUM_ASKED)
    return {
        "GET /jobs/{id}": [f"/jobs/{database.job_id(number)}" for number in ended[::step]],
        **{name: [f"/jobs{query}"] for name, query in filters.items()},
        "GET /metrics": ["/metrics"],
        "GET /readyz": ["/readyz"],
    }


def median_seconds(client: httpx.Client, paths: Sequence[str]) -> float:
    """The middle of as many answers, one after another on one connection."""
    found = []
    for number in range(NUM_ASKED + 5):
        started = time.perf_counter()
        client.get(paths[number % len(paths)]).raise_for_status()
        found.append(time.perf_counter() - started)
    return statistics.median(found[5:])


def statements() -> Mapping[str, Callable[[Session], object]]:
    """What workers and creations ask of the table, at each claim, bell and submission."""
    team = f"team-{TEAM}"
    quota = select(func.count()).where(Job.team == team, Job.status.in_(OPEN))
    return {
        "claim_next": partial(
            attempts.claim_next, queue="cpu", worker_id="wrk_load", lease_seconds=60
        ),
        "queues_to_ring": partial(attempts.queues_to_ring, again_after_seconds=30),
        "reap_expired": attempts.reap_expired,
        "quota of open jobs": lambda session: session.scalars(quota).one(),
        "count by status": jobs.count_by_status,
    }


def median_of(engine: Engine, work: Callable[[Session], object]) -> float:
    """The middle of several times, each undone."""
    found = []
    for _ in range(9):
        with Session(engine) as session:
            session.connection()
            started = time.perf_counter()
            work(session)
            found.append(time.perf_counter() - started)
            session.rollback()
    return statistics.median(found[1:])


def measure(stand: Stand, sizes: Sequence[int] = SIZES) -> dict[str, Any]:
    """Every look at every size, and its slope."""
    found: dict[str, Numbers] = {}
    for size in sizes:
        database = stand.database(size)
        with stand.service(database) as server:
            _ask(server, database, found)
        settings = Settings(database_url=database.url, statement_timeout_seconds=60)
        engine = create_engine_from(settings)
        for name, work in statements().items():
            found.setdefault(name, {})[size] = median_of(engine, work)
        engine.dispose()
        say(f"{size:,} jobs: looked")
    return {
        name: {"seconds": seconds, "slope": slope(list(seconds), list(seconds.values()))}
        for name, seconds in found.items()
    }


def _ask(server: Server, database: Filled, found: dict[str, Numbers]) -> None:
    headers = {"Authorization": f"Bearer {database.token_of(TEAM)}"}
    with httpx.Client(base_url=server.url, headers=headers, timeout=60) as client:
        for name, paths in requests_of(database).items():
            found.setdefault(name, {})[database.num_jobs] = median_seconds(client, paths)
