"""The log of a running attempt is stored as it grows, and read as one text."""

import io
import time
from pathlib import Path

import pytest

from grit_core.events import StepCompleted, Warned
from store.attempt_logs import CHUNK_BYTES, chunk_key, find_log, read_log
from store.objects import Objects
from store.orphans import live_log_prefix, log_key
from store.settings import Settings
from worker.attempt_log import AttemptLog
from worker.log_uploads import MAX_CHUNKS_AT_ONCE, LogUploads, replace_by_whole_log


@pytest.fixture
def objects(embedded_settings: Settings) -> Objects:
    return Objects(embedded_settings)


@pytest.fixture
def log(tmp_path: Path) -> Path:
    path = tmp_path / "attempt.log"
    path.touch()
    return path


def uploads(objects: Objects, log: Path, *, interval_seconds: float = 0.01) -> LogUploads:
    return LogUploads(
        objects, job_id="job_1", attempt=1, path=log, interval_seconds=interval_seconds
    )


def append(log: Path, data: bytes) -> None:
    with log.open("ab") as file:
        file.write(data)


def stored(objects: Objects) -> bytes:
    return read_log(objects, "job_1", 1, start=0, length=2 * MAX_CHUNKS_AT_ONCE * CHUNK_BYTES)


def test_only_what_has_grown_is_stored_again(objects: Objects, log: Path) -> None:
    growing = uploads(objects, log)
    growing.store()
    assert find_log(objects, "job_1", 1) is None
    append(log, b"x" * (2 * CHUNK_BYTES + 5))
    growing.store()
    assert stored(objects) == log.read_bytes()
    objects.delete(chunk_key("job_1", 1, 0))
    objects.put_bytes(chunk_key("job_1", 1, 2), b"changed")
    growing.store()  # nothing has grown: nothing is written
    assert objects.get_bytes(chunk_key("job_1", 1, 2)) == b"changed"
    append(log, b"y")
    growing.store()  # the last chunk alone is
    assert objects.get_bytes(chunk_key("job_1", 1, 2)) == b"x" * 5 + b"y"
    assert not objects.exists(chunk_key("job_1", 1, 0))


class CountingObjects(Objects):
    """A store that counts what is written to it."""

    num_bytes = 0

    def put_bytes(self, key: str, data: bytes) -> None:
        self.num_bytes += len(data)
        super().put_bytes(key, data)


def test_a_log_that_grows_for_a_day_costs_little_at_each_beat(
    embedded_settings: Settings, log: Path
) -> None:
    objects = CountingObjects(embedded_settings)
    growing = uploads(objects, log)
    num_rounds = 300
    for _ in range(num_rounds):
        append(log, b"x" * 4096)
        growing.store()
    assert stored(objects) == log.read_bytes()
    assert objects.num_bytes < num_rounds * 100_000


def test_a_log_that_grows_fast_is_stored_in_rounds(objects: Objects, log: Path) -> None:
    growing = uploads(objects, log)
    append(log, b"x" * ((MAX_CHUNKS_AT_ONCE + 1) * CHUNK_BYTES))
    growing.store()
    assert len(stored(objects)) == MAX_CHUNKS_AT_ONCE * CHUNK_BYTES
    growing.store()
    assert stored(objects) == log.read_bytes()


def test_the_thread_stores_until_it_is_closed_and_the_whole_log_takes_its_place(
    objects: Objects, log: Path
) -> None:
    growing = uploads(objects, log)
    growing.start()
    append(log, b"one\n")
    deadline = time.monotonic() + 60
    while find_log(objects, "job_1", 1) is None and time.monotonic() < deadline:
        time.sleep(0.01)
    assert stored(objects) == b"one\n"
    growing.close()
    append(log, b"two\n")
    key = log_key("job_1", 1)
    replace_by_whole_log(objects, key=key, path=log, job_id="job_1", attempt=1)
    found = find_log(objects, "job_1", 1)
    assert found is not None
    assert found.is_whole
    assert stored(objects) == b"one\ntwo\n"
    assert list(objects.list(live_log_prefix("job_1", 1))) == []


def step(number: int) -> StepCompleted:
    return StepCompleted(
        step=number, total_steps=1000, epoch=0.1, train_loss=0.5, learning_rate=2e-4,
        grad_norm=1.0, num_tokens=10, tokens_per_second=1234.0, elapsed_seconds=1.0,
    )  # fmt: skip


def test_the_log_has_a_line_an_event_and_not_one_a_step() -> None:
    out = io.StringIO()
    log = AttemptLog(out, step_seconds=3600)
    for number in range(1, 1001):
        log.write(step(number))
    log.write(Warned(code="x", message="two\nlines"))
    lines = [line.partition(" ")[2] for line in out.getvalue().splitlines()]
    assert lines == [
        "step 1/1000 loss 0.5000 lr 2.00e-04 1,234 tokens/s",
        "step 1000/1000 loss 0.5000 lr 2.00e-04 1,234 tokens/s",
        "warning: two lines",
    ]
