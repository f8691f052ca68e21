"""A queued job is trained, whatever dies meanwhile: real workers, a real broker, real kills."""

import json
import os
import secrets
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import psutil
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from grit_core.config.model_configs import config_to_dict
from store.attempt_logs import CHUNK_BYTES, find_log, read_log
from store.manifests import file_sha256
from store.models import JobStatus
from store.orphans import live_log_prefix
from tests.e2e.deployment import Broker, Deployment, WorkerProcess, deployed, tiny_config
from tests.services import running_postgres, running_s3
from tests.tiny_models import tiny_causal_folder, tiny_chat_rows, tiny_vlm_folder, write_jsonl

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

STEPS = 400
EVERY = 20
"""Steps between checkpoints."""
WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_causal_folder(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Broker]:
    broker = Broker(tmp_path_factory.mktemp("broker"))
    broker.start()
    yield broker
    broker.stop()


@pytest.fixture(scope="module")
def deployment(
    tmp_path_factory: pytest.TempPathFactory, model: Path, broker: Broker
) -> Iterator[Deployment]:
    home = tmp_path_factory.mktemp("home")
    rows = write_jsonl(home / "rows.jsonl", tiny_chat_rows(32, images=False))
    with deployed(home=home, broker_url=broker.url) as deployment:
        deployment.prepare(model=model, rows=rows)
        deployment.worker()
        yield deployment


@pytest.fixture(autouse=True)
def no_work_left_behind(deployment: Deployment) -> Iterator[None]:
    yield
    deployment.cancel_open_jobs()


@pytest.fixture(scope="module")
def reference(deployment: Deployment, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The adapter of a run that nothing interrupted."""
    deployment.worker()
    job_id = deployment.submit(max_steps=STEPS, checkpoint_every_steps=EVERY)
    job = deployment.wait_ended(job_id)
    return deployment.adapter_folder(job, tmp_path_factory.mktemp("reference"))


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # PEFT asks for it
def test_an_uninterrupted_job_gives_an_adapter_that_plain_peft_loads(
    reference: Path, model: Path
) -> None:
    base = AutoModelForCausalLM.from_pretrained(model)
    tokens = torch.arange(10)[None]
    before = base(tokens).logits.detach().clone()
    adapted = PeftModel.from_pretrained(base, reference)

    assert (adapted(tokens).logits - before).abs().max() > 0


def test_the_command_line_gives_the_same_bytes(
    deployment: Deployment, reference: Path, tmp_path: Path
) -> None:
    training = {"batch_size": 2, "epochs": 10_000, "precision": "float32", "max_steps": STEPS}
    job = {
        "model": str(deployment.model),
        "config": config_to_dict(tiny_config()),
        "training": {**training, "checkpoint_every_steps": EVERY},
        "eval_fraction": 0.0,
        "device": "cpu",
    }
    (tmp_path / "job.json").write_text(json.dumps(job))
    command = [sys.executable, "-m", "grit_core", "train", str(tmp_path / "job.json")]
    command += ["--dataset", str(deployment.rows), "--output", str(tmp_path / "out")]
    subprocess.run(command, check=True, env=deployment.environment, timeout=60, capture_output=True)

    (adapter,) = (tmp_path / "out").rglob(WEIGHTS)
    assert file_sha256(adapter) == file_sha256(reference / WEIGHTS)


def test_a_killed_training_process_resumes_and_ends_with_the_same_bytes(
    deployment: Deployment, reference: Path, tmp_path: Path
) -> None:
    worker = deployment.worker()
    job_id = deployment.submit(max_steps=STEPS, checkpoint_every_steps=EVERY)
    deployment.wait_for_step(job_id, EVERY + 5 + secrets.randbelow(STEPS // 2))
    worker.trainer().kill()
    job = deployment.wait_ended(job_id)

    adapter = deployment.adapter_folder(job, tmp_path)
    assert job.attempt == 2
    assert deployment.outcomes(job_id) == [("failed", "killed"), ("succeeded", None)]
    started = [event for event in deployment.events(job_id) if event.type == "training_started"]
    assert started[1].payload["start_step"] > 0
    assert started[1].payload["start_step"] % EVERY == 0
    assert deployment.metric_steps(job_id) == list(range(1, STEPS + 1))
    assert file_sha256(adapter / WEIGHTS) == file_sha256(reference / WEIGHTS)
    assert len(deployment.checkpoint_steps(job_id)) <= 2


def test_a_killed_worker_leaves_no_child_and_another_takes_the_job_over(
    deployment: Deployment, reference: Path, tmp_path: Path
) -> None:
    worker = deployment.worker()
    job_id = deployment.submit(max_steps=STEPS, checkpoint_every_steps=EVERY)
    deployment.wait_for_step(job_id, EVERY + 5)
    children = worker.children()
    worker.signal(signal.SIGKILL)
    worker.wait()
    _, alive = psutil.wait_procs(children, timeout=60)
    assert not alive

    deployment.worker()
    job = deployment.wait_ended(job_id)

    adapter = deployment.adapter_folder(job, tmp_path)
    assert deployment.outcomes(job_id) == [("lost", "worker_lost"), ("succeeded", None)]
    assert file_sha256(adapter / WEIGHTS) == file_sha256(reference / WEIGHTS)
    living = {path.name for path in (deployment.settings.home / "scratch").iterdir()}
    assert len(living) == 1


def test_a_worker_that_is_told_to_stop_hands_its_job_back_uncharged(
    deployment: Deployment, reference: Path, tmp_path: Path
) -> None:
    worker = deployment.worker()
    job_id = deployment.submit(max_steps=STEPS, checkpoint_every_steps=1000)
    deployment.wait_for_step(job_id, 10)
    asked = time.monotonic()
    worker.signal(signal.SIGTERM)

    assert worker.wait(30) == 0
    assert time.monotonic() - asked < 20
    job = deployment.job(job_id)
    assert job.status == JobStatus.QUEUED
    assert job.charged_attempts == 0
    assert "shutting down" in (job.status_reason or "")
    stopped = [event for event in deployment.events(job_id) if event.type == "training_stopped"]
    assert deployment.checkpoint_steps(job_id) == [stopped[0].payload["step"]]

    deployment.worker()
    job = deployment.wait_ended(job_id)
    adapter = deployment.adapter_folder(job, tmp_path)
    assert deployment.outcomes(job_id) == [("handed_back", None), ("succeeded", None)]
    assert file_sha256(adapter / WEIGHTS) == file_sha256(reference / WEIGHTS)


def test_a_running_job_is_cancelled_within_two_heartbeats(deployment: Deployment) -> None:
    job_id = deployment.submit(max_steps=100_000)
    deployment.wait_for_step(job_id, 3)
    child = deployment.worker().trainer()
    deployment.cancel(job_id)
    job = deployment.wait_ended(job_id, timeout_seconds=20)

    assert job.status == JobStatus.CANCELLED
    assert job.result is None
    assert not child.is_running()
    assert deployment.outcomes(job_id) == [("cancelled", None)]


def test_a_queued_job_is_cancelled_and_never_runs(deployment: Deployment) -> None:
    busy = deployment.submit(max_steps=100_000)
    deployment.wait_for_step(busy, 1)
    waiting = deployment.submit(max_steps=3)
    deployment.cancel(waiting)
    deployment.cancel(busy)
    deployment.wait_ended(busy)
    after = deployment.submit(max_steps=3)
    deployment.wait_ended(after)

    assert deployment.job(waiting).status == JobStatus.CANCELLED
    assert deployment.outcomes(waiting) == []


def test_a_job_that_kills_every_process_stops_after_its_attempts(deployment: Deployment) -> None:
    job_id = deployment.submit(max_steps=100_000, max_attempts=2)
    for attempt in (1, 2):
        deployment.wait(job_id, lambda job, attempt=attempt: job.attempt == attempt)
        deployment.wait(job_id, lambda job: job.phase == "training")
        os.kill(deployment.worker().trainer().pid, signal.SIGKILL)
        deployment.wait(job_id, lambda job: job.status != JobStatus.RUNNING)
    job = deployment.wait_ended(job_id, timeout_seconds=20)

    assert job.status == JobStatus.FAILED
    assert deployment.outcomes(job_id) == [("failed", "killed")] * 2
    assert job.error is not None
    assert job.error["code"] == "killed"
    assert "SIGKILL" in job.error["message"]


def test_a_diverging_job_fails_at_once_and_keeps_its_log(
    deployment: Deployment, model: Path, tmp_path: Path
) -> None:
    damaged = shutil.copytree(model, tmp_path / "damaged")
    weights = load_file(damaged / "model.safetensors")
    weights["model.norm.weight"] *= torch.inf
    save_file(weights, damaged / "model.safetensors", metadata={"format": "pt"})
    deployment.register("damaged", damaged)
    job_id = deployment.submit(model="damaged", max_steps=10)
    job = deployment.wait_ended(job_id)

    assert job.status == JobStatus.FAILED
    assert job.attempt == 1
    assert job.error is not None
    assert (job.error["code"], job.error["category"]) == ("diverged", "user")
    assert job.error["retryable"] is False
    log = deployment.objects.get_bytes(f"jobs/{job_id}/a1/log.txt").decode()
    assert "TrainingDiverged" in log
    assert "Traceback" not in str(job.error)


def test_the_log_of_an_attempt_is_read_while_it_runs(deployment: Deployment) -> None:
    deployment.worker()
    job_id = deployment.submit(max_steps=100_000, checkpoint_every_steps=100_000)
    deployment.wait_for_step(job_id, 2)

    def text() -> str:
        if find_log(deployment.objects, job_id, 1) is None:
            return ""
        return read_log(deployment.objects, job_id, 1, start=0, length=CHUNK_BYTES).decode()

    deployment.wait(job_id, lambda _: "loss" in text())
    assert deployment.job(job_id).status == JobStatus.RUNNING
    assert "training from step 0 of 100000 on cpu" in text()
    before = text()
    deployment.wait(job_id, lambda _: len(text()) > len(before))
    deployment.cancel(job_id)
    deployment.wait_ended(job_id)
    found = find_log(deployment.objects, job_id, 1)
    assert found is not None
    assert found.is_whole
    assert text().startswith(before)
    assert list(deployment.objects.list(live_log_prefix(job_id, 1))) == []


def test_a_lost_bell_is_rung_again(deployment: Deployment) -> None:
    job_id = deployment.submit(ring=False, max_steps=3)

    assert deployment.wait_ended(job_id, timeout_seconds=30).status == JobStatus.SUCCEEDED


def test_a_broker_that_goes_away_stops_neither_a_running_nor_a_queued_job(
    deployment: Deployment, broker: Broker
) -> None:
    running = deployment.submit(max_steps=150)
    deployment.wait_for_step(running, 3)
    broker.stop()
    waiting = deployment.submit(max_steps=3)
    deployment.wait(running, lambda job: job.status == JobStatus.SUCCEEDED)
    broker.start()

    assert deployment.wait_ended(waiting, timeout_seconds=30).status == JobStatus.SUCCEEDED


def test_a_paused_job_whose_last_checkpoint_is_damaged_goes_on_from_the_one_before(
    deployment: Deployment,
) -> None:
    job_id = deployment.submit(max_steps=600, checkpoint_every_steps=10)
    deployment.wait(job_id, lambda _job: len(deployment.checkpoint_steps(job_id)) == 2)
    deployment.pause(job_id)
    job = deployment.wait(job_id, lambda job: job.status == JobStatus.PAUSED)
    assert job.charged_attempts == 0
    good, damaged = deployment.checkpoint_steps(job_id)
    (key,) = [
        stored.key
        for stored in deployment.objects.list(f"jobs/{job_id}/a1/step-{damaged}/")
        if stored.key.endswith("adapter.safetensors")
    ]
    deployment.objects.put_bytes(key, b"damaged")
    deployment.resume(job_id)
    job = deployment.wait_ended(job_id)

    assert job.status == JobStatus.SUCCEEDED
    events = deployment.events(job_id)
    warned = [event.payload for event in events if event.type == "warned"]
    assert any(payload["code"] == "checkpoint_unusable" for payload in warned)
    started = [event for event in events if event.type == "training_started"]
    assert started[1].payload["start_step"] == good


def test_a_model_whose_layers_are_not_the_planned_ones_is_refused(deployment: Deployment) -> None:
    job_id = deployment.submit(max_steps=3, plan_changes={"inventory_hash": "0" * 64})
    job = deployment.wait_ended(job_id)

    assert job.status == JobStatus.FAILED
    assert job.attempt == 1
    assert job.error is not None
    assert job.error["code"] == "plan_changed"


def test_a_frozen_process_is_ended_as_stalled(deployment: Deployment) -> None:
    deployment.worker().stop()
    deployment.start_worker(stall_seconds="8").wait_warm()
    job_id = deployment.submit(max_steps=100_000, max_attempts=1)
    deployment.wait_for_step(job_id, 3)
    child = deployment.worker().trainer()
    child.suspend()
    job = deployment.wait_ended(job_id, timeout_seconds=30)

    assert job.error is not None
    assert job.error["code"] == "stalled"
    assert not child.is_running()


def freeze_between_writes(worker: WorkerProcess, deployment: Deployment) -> None:
    """Stop a worker at a moment when it does not hold the lock of SQLite's one writer.

    A process that is frozen inside a transaction stops everybody else's writes as well; that is
    another fault than the one examined here.
    """
    path = deployment.settings.database_url.removeprefix("sqlite:///")
    for _ in range(100):
        worker.signal(signal.SIGSTOP)
        time.sleep(0.02)
        with closing(sqlite3.connect(path, timeout=0.1)) as connection:
            try:
                connection.execute("BEGIN IMMEDIATE").connection.rollback()
            except sqlite3.OperationalError:
                worker.signal(signal.SIGCONT)
                time.sleep(0.01)
                continue
        return
    raise AssertionError("the worker was always in the middle of a write")


def test_a_worker_that_was_frozen_for_longer_than_its_lease_publishes_nothing(
    deployment: Deployment, reference: Path, tmp_path: Path
) -> None:
    frozen = deployment.worker()
    job_id = deployment.submit(max_steps=STEPS, checkpoint_every_steps=EVERY)
    deployment.wait_for_step(job_id, EVERY + 5)
    children = frozen.children()
    children[0].suspend()  # else a quick one has ended before its worker stands still
    freeze_between_writes(frozen, deployment)
    children[0].resume()
    deployment.start_worker(home=tmp_path / "elsewhere")
    job = deployment.wait(job_id, lambda job: job.attempt == 2)
    frozen.signal(signal.SIGCONT)
    job = deployment.wait_ended(job_id)

    adapter = deployment.adapter_folder(job, tmp_path)
    assert file_sha256(adapter / WEIGHTS) == file_sha256(reference / WEIGHTS)
    assert deployment.outcomes(job_id) == [("lost", "worker_lost"), ("succeeded", None)]
    assert deployment.metric_steps(job_id) == list(range(1, STEPS + 1))
    assert not children[0].is_running()
    frozen.stop()


def test_on_postgresql_and_s3_another_worker_takes_an_image_job_over(
    tmp_path: Path, broker: Broker
) -> None:
    rows = write_jsonl(tmp_path / "rows.jsonl", tiny_chat_rows(16))
    with running_postgres() as postgres, running_s3() as s3:
        values = {
            "home": tmp_path / "home",
            "broker_url": broker.url,
            "queue_prefix": "production:",
            "database_url": postgres.create("grit"),
            "objects_url": f"s3://{s3.bucket}/deployment",
            "s3_endpoint": s3.endpoint,
            "s3_access_key_id": s3.access_key_id,
            "s3_secret_access_key": s3.secret_access_key,
        }
        with deployed(**values) as deployment:
            deployment.prepare(model=tiny_vlm_folder(tmp_path), rows=rows)
            worker = deployment.start_worker()
            job_id = deployment.submit(max_steps=60, checkpoint_every_steps=10)
            deployment.wait(job_id, lambda _job: deployment.checkpoint_steps(job_id) != [])
            worker.signal(signal.SIGKILL)
            worker.wait()
            deployment.start_worker()
            job = deployment.wait_ended(job_id)

            adapter = deployment.adapter_folder(job, tmp_path)
            assert (adapter / WEIGHTS).stat().st_size > 0
            assert deployment.outcomes(job_id) == [("lost", "worker_lost"), ("succeeded", None)]
            assert deployment.metric_steps(job_id) == list(range(1, 61))
