"""A deployment of training workers only: they read models too, also while they train."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from store import base_models
from store.database import transaction
from store.models import BaseModelRow, JobStatus, ModelStatus
from tests.e2e.deployment import Broker, Deployment, deployed
from tests.tiny_models import tiny_causal_folder, tiny_chat_rows, write_jsonl

pytestmark = [pytest.mark.e2e, pytest.mark.slow]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_causal_folder(tmp_path_factory.mktemp("models"))


@pytest.fixture
def deployment(tmp_path: Path, model: Path) -> Iterator[Deployment]:
    broker = Broker(tmp_path)
    broker.start()
    rows = write_jsonl(tmp_path / "rows.jsonl", tiny_chat_rows(8, images=False))
    with deployed(home=tmp_path / "home", broker_url=broker.url) as deployment:
        deployment.prepare(model=model, rows=rows)
        yield deployment
    broker.stop()


def test_a_training_worker_reads_a_model_while_it_trains_and_then_trains_it(
    deployment: Deployment, model: Path
) -> None:
    # Of a probe that took the device, the lock or the worker's turn, the job would be the victim.
    long = deployment.submit()
    deployment.start_worker()
    deployment.wait_for_step(long, 2)
    with transaction(deployment.engine) as session:
        base_models.register(session, id="late", source=str(model))
    assert deployment.doorbell.ring_models(["cpu"])
    training = deployment.wait(
        long, lambda _: _row(deployment).status != ModelStatus.REGISTERING, timeout_seconds=240
    )
    assert _row(deployment).status == ModelStatus.READY, _row(deployment).failure
    assert (training.status, training.attempt) == (JobStatus.RUNNING, 1)
    deployment.cancel(long)
    ended = deployment.wait_ended(deployment.submit(model="late", max_steps=2))
    assert (ended.status, ended.error) == (JobStatus.SUCCEEDED, None)


def _row(deployment: Deployment) -> BaseModelRow:
    with transaction(deployment.engine, read_only=True) as session:
        return base_models.get(session, "late")
