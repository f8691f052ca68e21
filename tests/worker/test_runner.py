"""How one attempt is supervised, with a real process and rows."""

import threading
import time
from collections.abc import Iterator

import pytest
from sqlalchemy import Engine

from grit_core.events import RowsChecked
from store import jobs
from store.database import transaction
from store.objects import Objects
from store.settings import Settings
from tests.builders import TEAM, claim, queued_job
from worker.child import Beat, Child
from worker.runner import Runner
from worker.scratch import DatasetCache, Scratch
from worker.workbench import Workbench

STALL_SECONDS = 2.0
BEATS = 15
BEAT_SECONDS = 0.3


@pytest.fixture
def bench(sqlite_engine: Engine, embedded_settings: Settings) -> Workbench:
    settings = embedded_settings.model_copy(update={"stall_seconds": STALL_SECONDS})
    return Workbench(
        settings=settings,
        engine=sqlite_engine,
        objects=Objects(settings),
        scratch=Scratch(settings.home, "wrk_1"),
        datasets=DatasetCache(settings.home, bound_bytes=1_000_000),
        worker_id="wrk_1",
    )


@pytest.fixture
def child(bench: Workbench) -> Iterator[Child]:
    child = Child(bench.scratch.new_folder())
    yield child
    child.dismiss()


def test_a_job_whose_rows_are_being_checked_says_so_and_makes_progress(
    bench: Workbench, child: Child
) -> None:
    job = queued_job(bench.engine)
    runner = Runner(
        bench, claim(bench.engine), child, draining=lambda: False, on_stepping=lambda: None
    )
    runner._reporter.start()
    phases = []
    try:
        for done in (64, 100):
            runner._progress_at = 0.0
            runner._take(RowsChecked(done=done, total=100))
            assert runner._reporter.flush(30)
            assert time.monotonic() - runner._progress_at < STALL_SECONDS
            with transaction(bench.engine, read_only=True) as session:
                read = jobs.get_job(session, job.id, team=TEAM)
                phases.append((read.phase, read.progress))
    finally:
        runner._reporter.close()
    assert phases == [
        ("checking", {"checked_rows": 64, "rows_to_check": 100}),
        ("loading", {"checked_rows": 100, "rows_to_check": 100}),
    ]


@pytest.mark.slow
def test_a_process_that_beats_is_left_alone_and_one_that_has_stopped_is_ended(
    bench: Workbench, child: Child
) -> None:
    queued_job(bench.engine)
    claimed = claim(bench.engine)
    runner = Runner(bench, claimed, child, draining=lambda: False, on_stepping=lambda: None)
    alive_at_last_beat: list[bool] = []

    def beat() -> None:
        for _ in range(BEATS):
            time.sleep(BEAT_SECONDS)
            child.inbox.put(Beat())
        alive_at_last_beat.append(child.alive)

    beating = threading.Thread(target=beat)
    beating.start()
    runner._supervise(0)
    beating.join()
    assert alive_at_last_beat == [True]
    assert runner._failure is not None
    assert runner._failure.code == "stalled"
