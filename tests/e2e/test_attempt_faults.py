"""What becomes of a job whose device, memory, disk or dataset fails, in real processes."""

import os
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from store import workers
from store.database import transaction
from store.jobs import retry_job
from store.models import Job, JobStatus, Worker
from tests.e2e.deployment import TEAM, Broker, Deployment, deployed
from tests.e2e.failpoints import Failpoints
from tests.tiny_models import tiny_causal_folder, tiny_chat_rows, write_jsonl

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

STEPS = 60
EVERY = 10
"""Steps between checkpoints."""
WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def failpoints(tmp_path_factory: pytest.TempPathFactory) -> Failpoints:
    return Failpoints(tmp_path_factory.mktemp("faults") / "failpoints")


@pytest.fixture(scope="module")
def deployment(
    tmp_path_factory: pytest.TempPathFactory, failpoints: Failpoints
) -> Iterator[Deployment]:
    home = tmp_path_factory.mktemp("home")
    rows = write_jsonl(home / "rows.jsonl", tiny_chat_rows(32, images=False))
    broker = Broker(tmp_path_factory.mktemp("broker"))
    broker.start()
    with deployed(home=home, broker_url=broker.url) as deployment:
        deployment.environment |= failpoints.environment
        model = tiny_causal_folder(tmp_path_factory.mktemp("models"))
        deployment.prepare(model=model, rows=rows)
        yield deployment
    broker.stop()


@pytest.fixture(autouse=True)
def no_fault_left_behind(deployment: Deployment, failpoints: Failpoints) -> Iterator[None]:
    deployment.worker()
    yield
    failpoints.clear()
    deployment.cancel_open_jobs()


@pytest.fixture(scope="module")
def reference(deployment: Deployment, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The adapter of a run that nothing disturbs."""
    deployment.worker()
    job = deployment.wait_ended(submit(deployment))
    return adapter_of(deployment, job, tmp_path_factory.mktemp("reference"))


def submit(deployment: Deployment, *, max_attempts: int = 3) -> str:
    return deployment.submit(
        max_steps=STEPS, checkpoint_every_steps=EVERY, max_attempts=max_attempts
    )


def adapter_of(deployment: Deployment, job: Job, folder: Path) -> bytes:
    return (deployment.adapter_folder(job, folder) / WEIGHTS).read_bytes()


def warnings_of(deployment: Deployment, job_id: str) -> list[tuple[str, str]]:
    return [
        (event.payload["code"], event.payload["message"])
        for event in deployment.events(job_id)
        if event.type == "warned" and event.payload["code"] != "diagonal_is_adam"
    ]


def row_of_worker(deployment: Deployment) -> Worker:
    with transaction(deployment.engine, read_only=True) as session:
        rows = workers.live_workers(session)
    (row,) = [row for row in rows if row.process_id == deployment.worker().pid]
    return row


def test_a_step_too_large_for_the_device_is_tried_once_more_and_says_how_large_it_was(
    deployment: Deployment, failpoints: Failpoints, reference: bytes, tmp_path: Path
) -> None:
    failpoints.set("out_of_memory", **{"from": 3})
    job_id = submit(deployment)
    job = deployment.wait_ended(job_id)
    assert job.error is not None
    assert (job.error["code"], job.error["category"]) == ("out_of_memory_device", "user")
    assert "step 3 has micro-batches of 2 rows of " in job.error["message"]
    assert "layers of rank 2" in job.error["message"]
    assert "batch_size" in job.error["hint"]
    assert deployment.outcomes(job_id) == [("failed", "out_of_memory_device")] * 2

    failpoints.clear()
    job = deployment.wait_ended(submit(deployment))
    assert adapter_of(deployment, job, tmp_path) == reference


MEMORY = Path("/sys/fs/cgroup/memory")


@pytest.fixture
def group() -> Iterator[Path | None]:
    """A control group with little memory; none where this process may not make one."""
    folder = MEMORY / f"grit-tests-{os.getpid()}"
    try:
        folder.mkdir()
        (folder / "memory.limit_in_bytes").write_text(str(96 * 2**20))
    except OSError:
        yield None
        return
    yield folder
    for _ in range(50):  # it is busy until the kernel has reaped its last process
        with suppress(OSError):
            folder.rmdir()
            return
        time.sleep(0.1)


def test_a_device_side_assert_is_the_jobs_fault_and_not_tried_again(
    deployment: Deployment, failpoints: Failpoints
) -> None:
    failpoints.set("raise", message="CUDA error: device-side assert triggered", **{"from": 3})
    job_id = submit(deployment)
    job = deployment.wait_ended(job_id)
    assert job.error is not None
    assert (job.error["code"], job.error["category"]) == ("device_assertion", "user")
    assert deployment.outcomes(job_id) == [("failed", "device_assertion")]
    failpoints.clear()
    assert deployment.wait_ended(submit(deployment)).status == JobStatus.SUCCEEDED


def test_a_process_that_the_machine_has_no_memory_for_is_tried_once_more_at_most(
    deployment: Deployment, failpoints: Failpoints, group: Path | None
) -> None:
    worker = deployment.worker()
    if group is not None:
        failpoints.set("hog", tasks=str(group / "tasks"), **{"from": 5})
    else:  # without the kernel's killer: an allocation that is refused
        failpoints.set("address_space", **{"from": 5})
    job_id = submit(deployment)
    job = deployment.wait_ended(job_id)
    assert job.error is not None
    assert job.error["code"] == "out_of_memory_host"
    assert "memory" in job.error["hint"]
    assert deployment.outcomes(job_id) == [("failed", "out_of_memory_host")] * 2
    failpoints.clear()
    assert deployment.wait_ended(submit(deployment)).status == JobStatus.SUCCEEDED
    assert deployment.worker() is worker


def test_a_disk_that_is_full_for_a_while_costs_checkpoints_and_nothing_else(
    deployment: Deployment, failpoints: Failpoints, reference: bytes, tmp_path: Path
) -> None:
    failpoints.set("full_disk", bytes=500, **{"from": 15, "to": 45})
    job_id = submit(deployment)
    job = deployment.wait_ended(job_id)
    assert adapter_of(deployment, job, tmp_path) == reference
    assert deployment.outcomes(job_id) == [("succeeded", None)]
    warned = warnings_of(deployment, job_id)
    assert [code for code, _ in warned] == ["checkpoint_not_saved"] * 3
    assert "step 20 could not be written (File too large)" in warned[0][1]
    assert deployment.metric_steps(job_id) == list(range(1, STEPS + 1))


def test_a_disk_that_stays_full_is_named_and_the_job_goes_on_once_there_is_room(
    deployment: Deployment, failpoints: Failpoints, reference: bytes, tmp_path: Path
) -> None:
    failpoints.set("full_disk", bytes=500, **{"from": 35})
    job_id = submit(deployment, max_attempts=1)
    job = deployment.wait_ended(job_id)
    assert job.error is not None
    assert (job.error["code"], job.error["retryable"]) == ("storage_full", True)
    assert "GRIT_HOME" in job.error["hint"]
    assert deployment.outcomes(job_id) == [("failed", "storage_full")]
    assert deployment.checkpoint_steps(job_id)[-1] == 30

    failpoints.clear()
    with transaction(deployment.engine) as session:
        retry_job(session, job_id, team=TEAM)
    deployment.doorbell.ring("cpu")
    job = deployment.wait_ended(job_id)
    assert adapter_of(deployment, job, tmp_path) == reference
    started = [event for event in deployment.events(job_id) if event.type == "training_started"]
    assert [event.payload["start_step"] for event in started] == [0, 30]
    assert deployment.metric_steps(job_id) == list(range(1, STEPS + 1))


def test_an_attempt_that_would_fill_the_disk_is_refused_with_numbers(
    deployment: Deployment,
) -> None:
    job_id = deployment.submit(
        max_steps=3, max_attempts=1, plan_changes={"trainable_parameters": 10**15}
    )
    job = deployment.wait_ended(job_id)
    assert job.error is not None
    assert (job.error["code"], job.error["retryable"]) == ("storage_full", True)
    assert "bytes free" in job.error["message"]
    assert "need about 44,000,000,0" in job.error["message"]
    assert deployment.metric_steps(job_id) == []


def test_rows_that_were_altered_after_their_validation_are_not_trained_on(
    deployment: Deployment, tmp_path: Path
) -> None:
    good, dataset_id = tmp_path / "rows.jsonl", deployment.dataset_id
    deployment.dataset_id = deployment.upload(
        write_jsonl(good, tiny_chat_rows(8, images=False)),
    )
    try:
        job_id = deployment.submit(max_steps=3, ring=False)
        (key,) = [
            stored.key
            for stored in deployment.objects.list("datasets/")
            if stored.size_bytes == good.stat().st_size
        ]
        altered = bytearray(good.read_bytes())
        altered[len(altered) // 2] ^= 1
        deployment.objects.put_bytes(key, bytes(altered))
        deployment.doorbell.ring("cpu")
        job = deployment.wait_ended(job_id)
        assert job.error is not None
        assert (job.error["code"], job.error["category"]) == ("dataset_invalid", "user")
        assert deployment.dataset_id in job.error["message"]
        assert "SHA-256" in job.error["message"]
        assert deployment.outcomes(job_id) == [("failed", "dataset_invalid")]
    finally:
        deployment.dataset_id = dataset_id


def test_a_job_that_loses_its_device_at_every_attempt_takes_it_from_no_other_job(
    deployment: Deployment, failpoints: Failpoints, reference: bytes, tmp_path: Path
) -> None:
    failpoints.set("raise", message="CUDA error: unspecified launch failure", **{"from": 25})
    worker = deployment.worker()
    job_id = submit(deployment, max_attempts=3)
    assert deployment.wait_ended(job_id).status == JobStatus.FAILED
    assert deployment.outcomes(job_id) == [("failed", "device_lost")] * 3
    failpoints.clear()
    job = deployment.wait_ended(submit(deployment))
    assert adapter_of(deployment, job, tmp_path) == reference
    assert deployment.worker() is worker
    assert not row_of_worker(deployment).stopping


def test_a_device_that_fails_its_examination_gets_no_further_job_until_its_worker_is_new(
    deployment: Deployment, failpoints: Failpoints, reference: bytes, tmp_path: Path
) -> None:
    message = "CUDA error: unspecified launch failure"
    failpoints.set("raise", message=message, examination="it does not answer", **{"from": 25})
    job_id = submit(deployment, max_attempts=5)
    worker = deployment.worker()
    deployment.wait(job_id, lambda _job: "device_quarantined" in worker.text())
    deployment.wait(job_id, lambda _job: row_of_worker(deployment).stopping)
    row = row_of_worker(deployment)
    assert row.details is not None
    assert "it failed its examination: it does not answer" in row.details["quarantine"]
    assert deployment.outcomes(job_id) == [("failed", "device_lost")]
    assert worker.running
    deployment.doorbell.ring("cpu")
    time.sleep(1.5)
    assert deployment.job(job_id).status == JobStatus.QUEUED

    worker.stop()
    failpoints.clear()
    deployment.start_worker()
    job = deployment.wait_ended(job_id)
    assert adapter_of(deployment, job, tmp_path) == reference
