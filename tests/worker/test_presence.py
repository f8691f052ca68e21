"""When a worker is in the list of live workers."""

from sqlalchemy import Engine

from store import workers
from store.database import transaction
from worker.presence import Presence


def live(engine: Engine) -> list[str]:
    with transaction(engine, read_only=True) as session:
        return [worker.id for worker in workers.live_workers(session)]


def presence(engine: Engine, *, hidden: bool = False) -> Presence:
    return Presence(engine, worker_id="wrk_1", queues=["infer.cuda"], device="cuda", hidden=hidden)


def test_a_worker_that_left_is_not_brought_back_by_a_late_beat(sqlite_engine: Engine) -> None:
    made = presence(sqlite_engine)
    made.beat()
    assert live(sqlite_engine) == ["wrk_1"]
    made.leave()
    made.beat()
    made.show()
    assert live(sqlite_engine) == []


def test_a_worker_whose_device_is_not_examined_yet_is_not_listed(sqlite_engine: Engine) -> None:
    made = presence(sqlite_engine, hidden=True)
    made.beat()
    assert live(sqlite_engine) == []
    made.show()
    assert live(sqlite_engine) == ["wrk_1"]
