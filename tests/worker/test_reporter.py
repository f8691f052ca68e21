"""Events reach the row in order, in batches, and survive a database that is away."""

import threading
import time
from collections.abc import Sequence
from typing import Any

from store.errors import LeaseLost, StorageUnavailable
from worker.reporter import Reporter


class Row:
    """Remembers what was written, and can be out of reach."""

    def __init__(self) -> None:
        self.batches: list[list[dict[str, Any]]] = []
        self.phases: list[str] = []
        self.error: Exception | None = None
        self.lost: list[str] = []

    def write(self, events: Sequence[dict[str, Any]], phase: str | None) -> None:
        if self.error is not None:
            raise self.error
        self.batches.append(list(events))
        if phase is not None:
            self.phases.append(phase)

    @property
    def steps(self) -> list[int]:
        return [event["step"] for batch in self.batches for event in batch]


def test_many_steps_become_few_writes_in_order() -> None:
    row = Row()
    reporter = Reporter(row.write, on_lost=row.lost.append)
    reporter.start()
    for step in range(200):
        reporter.report({"step": step})

    assert reporter.flush(5)
    reporter.close()
    assert row.steps == list(range(200))
    assert len(row.batches) <= 3


def test_a_phase_is_written_at_once() -> None:
    row = Row()
    reporter = Reporter(row.write, on_lost=row.lost.append)
    reporter.start()
    time.sleep(0.05)
    reporter.phase("training")
    time.sleep(0.2)

    assert row.phases == ["training"]
    reporter.close()


def test_nothing_is_lost_or_reordered_while_the_database_is_away() -> None:
    row = Row()
    row.error = StorageUnavailable("connection refused")
    reporter = Reporter(row.write, on_lost=row.lost.append)
    reporter.start()
    reporter.phase("training")
    reporter.report({"step": 1}, urgent=True)
    assert not reporter.flush(0.3)
    reporter.report({"step": 2})
    row.error = None

    assert reporter.flush(5)
    reporter.close()
    assert row.steps == [1, 2]
    assert row.phases == ["training"]


def test_a_lost_lease_stops_the_writing() -> None:
    row = Row()
    row.error = LeaseLost("job_x", attempt=1)
    reporter = Reporter(row.write, on_lost=row.lost.append)
    reporter.start()
    reporter.report({"step": 1}, urgent=True)

    assert not reporter.flush(5)
    reporter.close()
    assert len(row.lost) == 1


def test_reports_from_several_threads_are_all_written() -> None:
    row = Row()
    reporter = Reporter(row.write, on_lost=row.lost.append)
    reporter.start()
    threads = [
        threading.Thread(
            target=lambda start=start: [reporter.report({"step": start + n}) for n in range(50)]
        )
        for start in (0, 100, 200)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert reporter.flush(5)
    reporter.close()
    assert sorted(row.steps) == sorted(start + n for start in (0, 100, 200) for n in range(50))
