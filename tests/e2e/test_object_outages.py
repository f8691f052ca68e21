"""An S3 server that fails while a job is trained, and workers that die in the middle of uploads."""

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from store.manifests import MANIFEST_NAME
from store.models import Job, JobStatus
from tests.e2e.deployment import Broker, Deployment, WorkerProcess, deployed
from tests.faulty_s3 import Fault, FaultyS3, faulty_s3
from tests.services import running_s3
from tests.tiny_models import tiny_causal_folder, tiny_chat_rows, write_jsonl

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

STEPS = 100
EVERY = 20
"""Steps between checkpoints."""


@pytest.fixture(scope="module")
def proxy() -> Iterator[FaultyS3]:
    with running_s3() as s3, faulty_s3(s3.endpoint) as proxy:
        yield proxy


@pytest.fixture(scope="module")
def deployment(tmp_path_factory: pytest.TempPathFactory, proxy: FaultyS3) -> Iterator[Deployment]:
    home = tmp_path_factory.mktemp("home")
    rows = write_jsonl(home / "rows.jsonl", tiny_chat_rows(32, images=False))
    broker = Broker(tmp_path_factory.mktemp("broker"))
    broker.start()
    values = {
        "home": home,
        "broker_url": broker.url,
        "objects_url": "s3://grit/outages",
        "s3_endpoint": proxy.endpoint,
        "s3_access_key_id": "tests",
        "s3_secret_access_key": "tests-secret",
        "objects_retry_seconds": "1",
        "objects_silence_seconds": "5",
    }
    with deployed(**values) as deployment:
        model = tiny_causal_folder(tmp_path_factory.mktemp("models"))
        deployment.prepare(model=model, rows=rows)
        yield deployment
    broker.stop()


@pytest.fixture(autouse=True)
def no_fault_left_behind(deployment: Deployment, proxy: FaultyS3) -> Iterator[None]:
    deployment.worker()
    yield
    proxy.pass_all()
    deployment.cancel_open_jobs()


@pytest.fixture(scope="module")
def reference(deployment: Deployment, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The adapter of a run that nothing disturbs."""
    deployment.worker()
    job = deployment.wait_ended(submit(deployment))
    return adapter_of(deployment, job, tmp_path_factory.mktemp("reference"))


def submit(deployment: Deployment, *, max_attempts: int = 3, steps: int = STEPS) -> str:
    return deployment.submit(
        max_steps=steps, checkpoint_every_steps=EVERY, max_attempts=max_attempts
    )


def adapter_of(deployment: Deployment, job: Job, folder: Path) -> bytes:
    folder = deployment.adapter_folder(job, folder)
    return (folder / "adapter_model.safetensors").read_bytes()


def test_a_job_ends_well_although_a_third_of_all_requests_fail(
    deployment: Deployment, proxy: FaultyS3, reference: bytes, tmp_path: Path
) -> None:
    proxy.injected = 0
    proxy.fail_with_probability(0.3, Fault(status=503), seed=3)
    job_id = submit(deployment)
    job = deployment.wait_ended(job_id)
    proxy.pass_all()
    assert proxy.injected >= 5
    assert job.status == JobStatus.SUCCEEDED, job.error
    assert adapter_of(deployment, job, tmp_path) == reference


def test_training_goes_on_while_the_store_is_away_and_says_what_it_missed(
    deployment: Deployment, proxy: FaultyS3
) -> None:
    job_id = submit(deployment, steps=1200)
    deployment.wait(job_id, lambda _job: deployment.checkpoint_steps(job_id) != [])
    proxy.fail(Fault(status=503))
    before = deployment.checkpoint_steps(job_id)[-1]

    def told() -> list[str]:
        return [
            event.payload["message"]
            for event in deployment.events(job_id)
            if event.type == "warned" and event.payload["code"] == "checkpoint_not_stored"
        ]

    job = deployment.wait(job_id, lambda _job: told() != [])
    assert job.status == JobStatus.RUNNING
    assert job.progress is not None
    assert job.progress["step"] > before + EVERY  # the outage has not stopped it
    proxy.pass_all()
    job = deployment.wait_ended(job_id)
    assert job.status == JobStatus.SUCCEEDED
    assert deployment.outcomes(job_id) == [("succeeded", None)]
    assert deployment.checkpoint_steps(job_id)[-1] == 1200
    assert len(told()) <= 3


def test_an_adapter_that_cannot_be_stored_is_tried_again_without_training_again(
    deployment: Deployment, proxy: FaultyS3, reference: bytes, tmp_path: Path
) -> None:
    proxy.fail(Fault(status=500), method="PUT", part="/adapters/")
    job_id = submit(deployment)
    deployment.wait(
        job_id, lambda _job: ("failed", "storage_failed") in deployment.outcomes(job_id)
    )
    proxy.pass_all()
    job = deployment.wait_ended(job_id)
    assert adapter_of(deployment, job, tmp_path) == reference
    started = [event for event in deployment.events(job_id) if event.type == "training_started"]
    assert {event.payload["start_step"] for event in started[1:]} == {STEPS}


def test_bytes_altered_on_their_way_are_fetched_again_and_cost_no_checkpoint(
    deployment: Deployment, proxy: FaultyS3, reference: bytes, tmp_path: Path
) -> None:
    job_id = submit(deployment, steps=STEPS)
    deployment.wait(job_id, lambda _job: deployment.checkpoint_steps(job_id) != [])
    proxy.fail(Fault(flip_bit_at=100), method="GET", part="optimizer.safetensors", times=1)
    deployment.worker().trainer().kill()
    job = deployment.wait_ended(job_id)
    assert adapter_of(deployment, job, tmp_path) == reference
    started = [event for event in deployment.events(job_id) if event.type == "training_started"]
    assert started[1].payload["start_step"] > 0
    assert "checkpoint_differs" in deployment.worker().text()


def kill_at(proxy: FaultyS3, worker: WorkerProcess, part: str, fault: Fault) -> None:
    """Kill a worker when it asks for something, and do that something as the fault says."""

    def faults(method: str, path: str) -> Fault | None:
        if method != "PUT" or "/jobs/" not in path or part not in path:
            return None
        worker.signal(signal.SIGKILL)
        return fault

    proxy.faults = faults


def test_a_worker_that_dies_in_an_upload_or_after_its_manifest_costs_steps_alone(
    deployment: Deployment, proxy: FaultyS3, reference: bytes, tmp_path: Path
) -> None:
    worker = deployment.worker()
    kill_at(proxy, worker, "step-20/adapter.safetensors", Fault(cut_request_at=700))
    job_id = submit(deployment, max_attempts=4)
    worker.wait()
    assert deployment.checkpoint_steps(job_id) == []

    worker = deployment.start_worker()
    manifest = f"step-40/{MANIFEST_NAME}"
    kill_at(proxy, worker, manifest, Fault(lose_answer=True))
    deployment.wait(job_id, lambda _job: not worker.running)
    assert 40 not in deployment.checkpoint_steps(job_id)
    stored = [found.key for found in deployment.objects.list(f"jobs/{job_id}/")]
    assert any(key.endswith(manifest) for key in stored)

    proxy.pass_all()
    deployment.start_worker()
    job = deployment.wait_ended(job_id)
    assert adapter_of(deployment, job, tmp_path) == reference
    lost = [("lost", "worker_lost")]
    assert deployment.outcomes(job_id) == [*lost, *lost, ("succeeded", None)]
    assert deployment.metric_steps(job_id) == list(range(1, STEPS + 1))
