"""Bells for rows that nobody has rung for lately, against a real Valkey."""

from collections.abc import Iterator

import pytest
import redis
from sqlalchemy import Engine, update

from store.database import transaction
from store.models import Job
from store.queue import Doorbell
from store.settings import Settings
from tests.builders import queued_job
from worker.reconcile import MAX_UNHEARD, reconcile


@pytest.fixture
def doorbell(embedded_settings: Settings) -> Iterator[Doorbell]:
    made = Doorbell(embedded_settings)
    yield made
    made.close()


@pytest.fixture
def bells(valkey: str, queue_prefix: str) -> Iterator["Bells"]:
    made = Bells(redis.Redis.from_url(valkey), queue_prefix)
    yield made
    made.client.close()


class Bells:
    """What waits in the broker."""

    def __init__(self, client: redis.Redis, prefix: str) -> None:
        self.client = client
        self._key = f"{prefix}cpu"

    def count(self) -> int:
        return int(self.client.llen(self._key))

    def hear(self, count: int) -> None:
        self.client.lpop(self._key, count)


def look(engine: Engine, doorbell: Doorbell, settings: Settings) -> None:
    """Look at the rows after a while in which nobody rang for them."""
    with transaction(engine) as session:
        session.execute(update(Job).values(last_rung_at=None))
    reconcile(engine, doorbell, settings)


def test_a_job_whose_bell_was_lost_rings_again(
    sqlite_engine: Engine, doorbell: Doorbell, embedded_settings: Settings, bells: Bells
) -> None:
    queued_job(sqlite_engine)
    look(sqlite_engine, doorbell, embedded_settings)
    assert bells.count() == 1
    reconcile(sqlite_engine, doorbell, embedded_settings)
    assert bells.count() == 1


def test_bells_that_busy_workers_do_not_hear_do_not_fill_the_broker(
    sqlite_engine: Engine, doorbell: Doorbell, embedded_settings: Settings, bells: Bells
) -> None:
    for _ in range(3 * MAX_UNHEARD):
        queued_job(sqlite_engine)
    for _ in range(5):
        look(sqlite_engine, doorbell, embedded_settings)
    assert bells.count() == MAX_UNHEARD
    bells.hear(3)
    look(sqlite_engine, doorbell, embedded_settings)
    assert bells.count() == MAX_UNHEARD


def test_rows_are_looked_at_while_the_broker_is_away(
    sqlite_engine: Engine, embedded_settings: Settings
) -> None:
    queued_job(sqlite_engine)
    away = embedded_settings.model_copy(update={"broker_url": "redis://127.0.0.1:1/0"})
    doorbell = Doorbell(away)
    assert doorbell.num_unheard("cpu") is None
    look(sqlite_engine, doorbell, away)
    doorbell.close()
