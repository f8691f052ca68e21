"""A queued job is trained, whatever dies meanwhile: real workers, a real broker, real kills."""

import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from grit_core.config.model_configs import config_to_dict
from store.models import JobStatus
from tests.e2e.deployment import Broker, Deployment, deployed, tiny_config
from tests.services import running_postgres, running_s3
from tests.tiny_models import tiny_causal_folder, tiny_chat_rows, tiny_vlm_folder, write_jsonl
from worker.scratch import file_sha256

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

STEPS = 150
EVERY = 15
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
        yield deployment


@pytest.fixture(scope="module")
def reference(deployment: Deployment, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The adapter of a run that nothing interrupted."""
    worker = deployment.start_worker()
    job_id = deployment.submit(max_steps=STEPS, checkpoint_every_steps=EVERY)
    job = deployment.wait_ended(job_id)
    worker.stop()
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
    worker = deployment.start_worker()
    job_id = deployment.submit(max_steps=STEPS, checkpoint_every_steps=EVERY)
    deployment.wait_for_step(job_id, EVERY + 5 + secrets.randbelow(STEPS - 3 * EVERY))
    worker.trainer().kill()
    job = deployment.wait_ended(job_id)
    worker.stop()

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
    worker = deployment.start_worker()
    job_id = deployment.submit(max_steps=STEPS, checkpoint_every_steps=EVERY)
    deployment.wait_for_step(job_id, EVERY + 5)
    children = worker.children()
    worker.signal(signal.SIGKILL)
    worker.wait()
    _, alive = psutil.wait_procs(children, timeout=5)
    assert not alive

    second = deployment.start_worker()
    job = deployment.wait_ended(job_id)
    second.stop()

    adapter = deployment.adapter_folder(job, tmp_path)
    assert deployment.outcomes(job_id) == [("lost", "worker_lost"), ("succeeded", None)]
    assert file_sha256(adapter / WEIGHTS) == file_sha256(reference / WEIGHTS)
    assert not list((deployment.settings.home / "scratch").iterdir())


def test_a_worker_that_is_told_to_stop_hands_its_job_back_uncharged(
    deployment: Deployment, reference: Path, tmp_path: Path
) -> None:
    worker = deployment.start_worker()
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

    second = deployment.start_worker()
    job = deployment.wait_ended(job_id)
    second.stop()
    adapter = deployment.adapter_folder(job, tmp_path)
    assert deployment.outcomes(job_id) == [("handed_back", None), ("succeeded", None)]
    assert file_sha256(adapter / WEIGHTS) == file_sha256(reference / WEIGHTS)


@pytest.fixture(scope="module")
def worked(deployment: Deployment, reference: Path) -> Iterator[Deployment]:  # noqa: ARG001 - it must be made before this worker takes the device
    """The deployment with one worker for all the tests that do not kill it."""
    worker = deployment.start_worker()
    yield deployment
    worker.stop()


def test_a_running_job_is_cancelled_within_two_heartbeats(worked: Deployment) -> None:
    job_id = worked.submit(max_steps=100_000)
    worked.wait_for_step(job_id, 3)
    child = worked.workers[-1].trainer()
    worked.cancel(job_id)
    job = worked.wait_ended(job_id, timeout_seconds=10)

    assert job.status == JobStatus.CANCELLED
    assert job.result is None
    assert not child.is_running()
    assert worked.outcomes(job_id) == [("cancelled", None)]


def test_a_queued_job_is_cancelled_and_never_runs(worked: Deployment) -> None:
    busy = worked.submit(max_steps=100_000)
    worked.wait_for_step(busy, 1)
    waiting = worked.submit(max_steps=3)
    worked.cancel(waiting)
    worked.cancel(busy)
    worked.wait_ended(busy)
    after = worked.submit(max_steps=3)
    worked.wait_ended(after)

    assert worked.job(waiting).status == JobStatus.CANCELLED
    assert worked.outcomes(waiting) == []


def test_a_paused_job_keeps_its_steps_and_goes_on_from_there(worked: Deployment) -> None:
    job_id = worked.submit(max_steps=120, checkpoint_every_steps=1000)
    worked.wait_for_step(job_id, 10)
    worked.pause(job_id)
    job = worked.wait(job_id, lambda job: job.status == JobStatus.PAUSED, timeout_seconds=20)
    (step,) = worked.checkpoint_steps(job_id)
    assert job.charged_attempts == 0

    worked.resume(job_id)
    job = worked.wait_ended(job_id)
    assert job.status == JobStatus.SUCCEEDED
    started = [event for event in worked.events(job_id) if event.type == "training_started"]
    assert [event.payload["start_step"] for event in started] == [0, step]


def test_a_job_that_kills_every_process_stops_after_its_attempts(worked: Deployment) -> None:
    job_id = worked.submit(max_steps=100_000, max_attempts=2)
    for attempt in (1, 2):
        worked.wait(job_id, lambda job, attempt=attempt: job.attempt == attempt)
        worked.wait(job_id, lambda job: job.phase == "training")
        os.kill(worked.workers[-1].trainer().pid, signal.SIGKILL)
        worked.wait(job_id, lambda job: job.status != JobStatus.RUNNING)
    job = worked.wait_ended(job_id, timeout_seconds=10)

    assert job.status == JobStatus.FAILED
    assert worked.outcomes(job_id) == [("failed", "killed")] * 2
    assert job.error is not None
    assert job.error["code"] == "killed"
    assert "SIGKILL" in job.error["message"]


def test_a_diverging_job_fails_at_once_and_keeps_its_log(
    worked: Deployment, model: Path, tmp_path: Path
) -> None:
    damaged = shutil.copytree(model, tmp_path / "damaged")
    weights = load_file(damaged / "model.safetensors")
    weights["model.norm.weight"] *= torch.inf
    save_file(weights, damaged / "model.safetensors", metadata={"format": "pt"})
    worked.register("damaged", damaged)
    job_id = worked.submit(model="damaged", max_steps=10)
    job = worked.wait_ended(job_id)

    assert job.status == JobStatus.FAILED
    assert job.attempt == 1
    assert job.error is not None
    assert (job.error["code"], job.error["category"]) == ("diverged", "user")
    assert job.error["retryable"] is False
    log = worked.objects.get_bytes(f"jobs/{job_id}/a1/log.txt").decode()
    assert "TrainingDiverged" in log
    assert "Traceback" not in str(job.error)


def test_a_lost_bell_is_rung_again(worked: Deployment) -> None:
    job_id = worked.submit(ring=False, max_steps=3)

    assert worked.wait_ended(job_id, timeout_seconds=30).status == JobStatus.SUCCEEDED


def test_a_broker_that_goes_away_stops_neither_a_running_nor_a_queued_job(
    worked: Deployment, broker: Broker
) -> None:
    running = worked.submit(max_steps=150)
    worked.wait_for_step(running, 3)
    broker.stop()
    waiting = worked.submit(max_steps=3)
    worked.wait(running, lambda job: job.status == JobStatus.SUCCEEDED)
    broker.start()

    assert worked.wait_ended(waiting, timeout_seconds=30).status == JobStatus.SUCCEEDED


def test_a_damaged_checkpoint_costs_its_steps_and_is_told(worked: Deployment) -> None:
    job_id = worked.submit(max_steps=120, checkpoint_every_steps=10)
    worked.wait(job_id, lambda _job: len(worked.checkpoint_steps(job_id)) == 2)
    worked.pause(job_id)
    worked.wait(job_id, lambda job: job.status == JobStatus.PAUSED)
    good, damaged = worked.checkpoint_steps(job_id)
    (key,) = [
        stored.key
        for stored in worked.objects.list(f"jobs/{job_id}/a1/step-{damaged}/")
        if stored.key.endswith("adapter.safetensors")
    ]
    worked.objects.put_bytes(key, b"damaged")
    worked.resume(job_id)
    job = worked.wait_ended(job_id)

    assert job.status == JobStatus.SUCCEEDED
    events = worked.events(job_id)
    warned = [event.payload for event in events if event.type == "warned"]
    assert any(payload["code"] == "checkpoint_unusable" for payload in warned)
    started = [event for event in events if event.type == "training_started"]
    assert started[1].payload["start_step"] == good


def test_a_model_whose_layers_are_not_the_planned_ones_is_refused(worked: Deployment) -> None:
    job_id = worked.submit(max_steps=3, plan_changes={"inventory_hash": "0" * 64})
    job = worked.wait_ended(job_id)

    assert job.status == JobStatus.FAILED
    assert job.attempt == 1
    assert job.error is not None
    assert job.error["code"] == "plan_changed"


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
