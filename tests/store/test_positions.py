"""The place of a waiting job is the order in which jobs are claimed."""

import random
from collections.abc import Collection

from sqlalchemy import Engine

from store.database import transaction
from store.models import Job
from store.positions import Positions
from tests.builders import claim, finish, queued_job
from tests.store.test_device_binding import open_job


def places(engine: Engine, *jobs: Job, live: Collection[str] = ("cpu",)) -> list[int | None]:
    with transaction(engine, read_only=True) as session:
        found = Positions(session, live)
        return [found.place(job) for job in jobs]


def test_the_place_in_the_queue_counts_priority_and_age(engine: Engine) -> None:
    first = queued_job(engine)
    second = queued_job(engine)
    urgent = queued_job(engine, priority=1)
    elsewhere = queued_job(engine, queue="cuda")
    assert places(engine, urgent, first, second, elsewhere) == [1, 2, 3, 1]
    running = claim(engine).job
    assert running.id == urgent.id
    assert places(engine, running, first) == [None, 1]


def test_the_place_counts_the_turns_of_other_teams_and_not_their_priority(engine: Engine) -> None:
    for team in ("loud", "quiet"):  # a turn of each, so that the order is settled
        queued_job(engine, team=team)
    for _ in range(2):
        claimed = claim(engine)
        with transaction(engine) as session:
            finish(session, claimed)
    loud = [queued_job(engine, team="loud", priority=100) for _ in range(3)]
    quiet = queued_job(engine, team="quiet")
    assert places(engine, *loud, quiet) == [1, 3, 4, 2]


def test_before_a_worker_is_live_named_and_free_jobs_have_places_in_one_line(
    engine: Engine,
) -> None:
    waiting = [
        open_job(engine, "cuda", "mps", "cpu"),
        queued_job(engine),
        open_job(engine, "cpu", "cuda", "mps"),
    ]
    assert places(engine, *waiting, live=()) == [1, 2, 3]
    # One that names another device is in no line with those that the live worker claims.
    elsewhere = queued_job(engine, queue="cuda")
    assert places(engine, *waiting, elsewhere) == [1, 2, 3, 1]


def test_a_job_that_is_claimed_while_it_is_looked_at_has_a_place_all_the_same(
    engine: Engine,
) -> None:
    job = queued_job(engine)
    claim(engine)
    assert job.status == "queued"  # as it was read
    assert places(engine, job) == [1]


def test_the_places_are_the_order_of_the_claims(engine: Engine) -> None:
    draw = random.Random(7)  # noqa: S311 - draws that a seed repeats
    for team in "abc":  # each has had a turn and runs some jobs
        for _ in range(draw.randint(1, 3)):
            queued_job(engine, team=team)
    while places(engine, *_waiting(engine)):
        claim(engine)
    waiting = []
    for _ in range(14):
        team, priority = draw.choice("abc"), draw.randint(-1, 1)
        if draw.random() < 0.5:
            waiting.append(open_job(engine, "cuda", "mps", "cpu", team=team, priority=priority))
        else:
            waiting.append(queued_job(engine, team=team, priority=priority))
    expected = dict(zip(places(engine, *waiting), (job.id for job in waiting), strict=True))
    assert [claim(engine).job.id for _ in waiting] == [expected[n + 1] for n in range(14)]


def _waiting(engine: Engine) -> list[Job]:
    with transaction(engine, read_only=True) as session:
        return list(session.query(Job).where(Job.status == "queued"))
