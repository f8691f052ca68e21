"""Collecting all the time, with the shortest patience, never takes what a job needs."""

import os
import signal
import threading
import time
from pathlib import Path

import pytest
from sqlalchemy import select

from store.collection import collect, preview
from store.database import transaction
from store.errors import ObjectMissing
from store.models import Adapter, Checkpoint, Dataset, JobStatus
from tests.e2e.deployment import Broker, Deployment, deployed
from tests.tiny_models import tiny_causal_folder, tiny_chat_rows, write_jsonl

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

KILLS = 3
WINDOW_SECONDS = 4.0


def missing(deployment: Deployment) -> list[str]:
    """Return the objects that rows refer to and that are not there."""
    with transaction(deployment.engine, read_only=True) as session:
        folders = [
            *session.scalars(select(Checkpoint.prefix)),
            *session.scalars(select(Adapter.prefix)),
        ]
        keys = [key for key in session.scalars(select(Dataset.object_key)) if key]
    for prefix in folders:
        try:
            manifest = deployment.objects.read_manifest(prefix)
        except ObjectMissing as error:
            keys.append(error.key)
        else:
            keys += [f"{prefix.rstrip('/')}/{entry.path}" for entry in manifest.files]
    return [key for key in keys if not deployment.objects.exists(key)]


class Collecting(threading.Thread):
    """Collects without a pause, and counts."""

    def __init__(self, deployment: Deployment) -> None:
        super().__init__(daemon=True)
        self.deployment = deployment
        self.runs = 0
        self.stopping = threading.Event()

    def run(self) -> None:
        deployment = self.deployment
        while not self.stopping.wait(0.2):
            done = collect(deployment.engine, deployment.objects, deployment.settings)
            self.runs += done is not None


def test_nothing_that_a_row_refers_to_is_collected_while_attempts_are_killed(
    tmp_path: Path,
) -> None:
    """F44, and of F4: after the window no byte of a dead attempt is left."""
    broker = Broker(tmp_path / "broker")
    (tmp_path / "broker").mkdir()
    broker.start()
    rows = write_jsonl(tmp_path / "rows.jsonl", tiny_chat_rows(32, images=False))
    options = {
        "home": tmp_path / "home",
        "broker_url": broker.url,
        "collect_seconds": "1",
        "collect_after_seconds": str(WINDOW_SECONDS),
    }
    with deployed(**options) as deployment:
        deployment.prepare(model=tiny_causal_folder(tmp_path / "model"), rows=rows)
        worker = deployment.start_worker()
        worker.wait_warm()
        collecting = Collecting(deployment)
        collecting.start()
        job = deployment.submit(max_steps=1500, checkpoint_every_steps=25, max_attempts=20)
        for _ in range(KILLS):
            seen = len(deployment.checkpoint_steps(job)) and max(deployment.checkpoint_steps(job))
            deadline = time.monotonic() + 60
            while max(deployment.checkpoint_steps(job), default=0) <= seen:
                assert time.monotonic() < deadline, worker.text()[-3000:]
                time.sleep(0.05)
            attempt = deployment.job(job).attempt
            os.kill(worker.trainer().pid, signal.SIGKILL)
            deployment.wait(job, lambda row, attempt=attempt: row.attempt > attempt)
        done = deployment.wait_ended(job)
        collecting.stopping.set()
        collecting.join()
        assert done.status == JobStatus.SUCCEEDED
        assert done.attempt > KILLS
        assert collecting.runs > 10
        assert missing(deployment) == []
        assert "checkpoint_unusable" not in {
            event.payload.get("code") for event in deployment.events(job)
        }
        deadline = time.monotonic() + 10 * WINDOW_SECONDS
        stray = f"adapters/adp_{'0' * 26}/manifest.json"
        deployment.objects.put_bytes(stray, b"{}")
        time.sleep(WINDOW_SECONDS + 1)
        while preview(deployment.engine, deployment.objects, deployment.settings).num_groups:
            assert time.monotonic() < deadline
            collect(deployment.engine, deployment.objects, deployment.settings)
        assert not deployment.objects.exists(stray)
        assert missing(deployment) == []
    broker.stop()
