"""A finished adapter is cut by real workers, whatever dies meanwhile; forgetting is measured."""

import signal
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from store.manifests import file_sha256
from store.models import Job, JobStatus
from tests.e2e.deployment import Broker, Deployment, deployed
from tests.tiny_models import tiny_causal_folder, tiny_chat_rows, write_jsonl

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

MAX_KL = 0.01
WEIGHTS = "adapter_model.safetensors"
MANY_ROWS = 1000
"""So many that a compression of them can be met at work."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_causal_folder(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def deployment(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Iterator[Deployment]:
    broker = Broker(tmp_path_factory.mktemp("broker"))
    broker.start()
    home = tmp_path_factory.mktemp("home")
    rows = write_jsonl(home / "rows.jsonl", tiny_chat_rows(32, images=False))
    with deployed(home=home, broker_url=broker.url) as deployment:
        deployment.prepare(model=model, rows=rows)
        deployment.start_worker().wait_warm()
        yield deployment
    broker.stop()


@pytest.fixture(autouse=True)
def no_work_left_behind(deployment: Deployment) -> Iterator[None]:
    yield
    deployment.cancel_open_jobs()


@pytest.fixture(scope="module")
def trained(deployment: Deployment) -> Job:
    """A job that also measured what it forgot, on other rows."""
    rows = write_jsonl(
        deployment.settings.home / "kept.jsonl", tiny_chat_rows(40, images=False)[32:]
    )
    kept = deployment.upload(rows)
    return deployment.wait_ended(
        deployment.submit(max_steps=30, learning_rate=0.01, retention_dataset_id=kept)
    )


@pytest.fixture(scope="module")
def many_rows(deployment: Deployment) -> str:
    rows = tiny_chat_rows(32, images=False) * (MANY_ROWS // 32)
    return deployment.upload(write_jsonl(deployment.settings.home / "many.jsonl", rows))


def adapter_of(job: Job) -> str:
    assert job.status == JobStatus.SUCCEEDED, (job.status, job.status_reason, job.error)
    assert job.result is not None
    return str(job.result["adapter"])


def cut_from(deployment: Deployment, source: str) -> list[str]:
    return [adapter.id for adapter in deployment.adapters() if adapter.parent_id == source]


def test_what_a_job_forgot_is_in_its_result_and_in_its_events(
    deployment: Deployment, trained: Job
) -> None:
    assert trained.result is not None, trained.error
    retention = trained.result["retention"]
    assert retention["dataset"] == trained.retention_dataset_id
    told = [
        event.payload
        for event in deployment.events(trained.id)
        if event.type == "retention_evaluated"
    ]
    assert [(each["when"], each["loss"]) for each in told] == [
        ("before", retention["loss_before"]),
        ("after", retention["loss_after"]),
    ]
    assert retention["loss_before"] != retention["loss_after"]
    assert trained.result["compaction"] is None


def test_a_job_ends_by_cutting_its_adapter_within_its_bound(
    deployment: Deployment, tmp_path: Path
) -> None:
    job_id = deployment.submit(max_steps=30, learning_rate=0.01, compaction_max_kl=MAX_KL)
    job = deployment.wait_ended(job_id)
    folder = deployment.adapter_folder(job, tmp_path)
    assert job.result is not None
    cut = job.result["compaction"]
    assert cut["predicted_kl"] <= cut["max_kl"] == MAX_KL
    assert cut["parameters_after"] < cut["parameters_before"] == job.plan["trainable_parameters"]
    assert job.result["trainable_parameters"] == cut["parameters_after"]
    weights = load_file(folder / WEIGHTS)
    assert sum(tensor.numel() for tensor in weights.values()) == cut["parameters_after"]
    [made] = [adapter for adapter in deployment.adapters() if adapter.job_id == job_id]
    assert made.details is not None
    assert made.details["ranks"] == cut["ranks"]
    assert (made.origin, made.parent_id) == ("job", None)
    [told] = [event for event in deployment.events(job_id) if event.type == "compacted"]
    assert told.payload == {"step": 30, **cut}


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # PEFT asks for it
def test_a_compressed_adapter_is_smaller_and_plain_peft_loads_it(
    deployment: Deployment, trained: Job, model: Path, tmp_path: Path
) -> None:
    source = adapter_of(trained)
    job = deployment.wait_ended(deployment.compress(source, max_kl=MAX_KL))
    assert job.result is not None, job.error
    folder = deployment.adapter_folder(job, tmp_path)
    cut = job.result["compaction"]
    assert cut["parameters_after"] < cut["parameters_before"]
    assert cut["predicted_kl"] <= cut["max_kl"] == MAX_KL
    weights = load_file(folder / WEIGHTS)
    assert sum(tensor.numel() for tensor in weights.values()) == cut["parameters_after"]
    [made] = [adapter for adapter in deployment.adapters() if adapter.job_id == job.id]
    assert (made.parent_id, made.trainable_parameters) == (source, cut["parameters_after"])
    assert made.details is not None
    assert made.details["ranks"] == cut["ranks"]
    phases = {event.type for event in deployment.events(job.id)}
    assert {"training_started", "compacted", "training_finished"} <= phases
    base = AutoModelForCausalLM.from_pretrained(model)
    tokens = torch.arange(10)[None]
    before = base(tokens).logits.detach().clone()
    adapted = PeftModel.from_pretrained(base, folder)
    assert (adapted(tokens).logits - before).abs().max() > 0


def test_a_compression_whose_process_is_killed_begins_anew_and_makes_one_adapter(
    deployment: Deployment, trained: Job, many_rows: str, tmp_path: Path
) -> None:
    source = adapter_of(trained)
    before = cut_from(deployment, source)
    reference = deployment.wait_ended(
        deployment.compress(source, max_kl=MAX_KL, dataset=many_rows, num_rows=MANY_ROWS)
    )
    job_id = deployment.compress(source, max_kl=MAX_KL, dataset=many_rows, num_rows=MANY_ROWS)
    deployment.wait(job_id, lambda job: job.phase == "compressing")
    deployment.worker().trainer().kill()
    job = deployment.wait_ended(job_id)

    assert deployment.outcomes(job_id) == [("failed", "killed"), ("succeeded", None)]
    assert len(cut_from(deployment, source)) == len(before) + 2
    uninterrupted = deployment.adapter_folder(reference, tmp_path)
    again = deployment.adapter_folder(job, tmp_path)
    assert file_sha256(again / WEIGHTS) == file_sha256(uninterrupted / WEIGHTS)


def test_a_killed_worker_leaves_a_compression_to_another(
    deployment: Deployment, trained: Job, many_rows: str
) -> None:
    source = adapter_of(trained)
    before = cut_from(deployment, source)
    job_id = deployment.compress(source, max_kl=MAX_KL, dataset=many_rows, num_rows=MANY_ROWS)
    deployment.wait(job_id, lambda job: job.phase == "compressing")
    worker = deployment.worker()
    children = worker.children()
    worker.signal(signal.SIGKILL)
    worker.wait()
    _, alive = psutil.wait_procs(children, timeout=60)
    assert not alive
    deployment.worker()
    job = deployment.wait_ended(job_id)

    assert deployment.outcomes(job_id) == [("lost", "worker_lost"), ("succeeded", None)]
    assert cut_from(deployment, source) == [adapter_of(job), *before]


def test_a_paused_compression_begins_anew_and_a_cancelled_one_ends(
    deployment: Deployment, trained: Job, many_rows: str
) -> None:
    source = adapter_of(trained)
    before = cut_from(deployment, source)
    job_id = deployment.compress(source, max_kl=MAX_KL, dataset=many_rows, num_rows=MANY_ROWS)
    deployment.wait(job_id, lambda job: job.phase == "compressing")
    deployment.pause(job_id)
    paused = deployment.wait(job_id, lambda job: job.status == JobStatus.PAUSED)
    assert (paused.charged_attempts, deployment.checkpoint_steps(job_id)) == (0, [])
    deployment.resume(job_id)
    deployment.wait(job_id, lambda job: job.phase == "compressing")
    child = deployment.worker().trainer()
    deployment.cancel(job_id)
    assert deployment.wait_ended(job_id, timeout_seconds=20).status == JobStatus.CANCELLED
    assert not child.is_running()
    assert deployment.outcomes(job_id) == [("paused", None), ("cancelled", None)]
    assert cut_from(deployment, source) == before


def test_a_damaged_source_ends_a_compression_with_its_reason(
    deployment: Deployment, trained: Job
) -> None:
    source = adapter_of(trained)
    copied = deployment.wait_ended(deployment.compress(source, max_kl=MAX_KL))
    victim = adapter_of(copied)
    job_id = deployment.compress(victim, ring=False)
    deployment.objects.put_bytes(f"adapters/{victim}/{WEIGHTS}", b"damaged")
    job = deployment.wait_ended(job_id)

    assert job.status == JobStatus.FAILED
    assert job.error is not None
    assert job.error["code"] == "storage_failed"
    assert "corrupt" in job.error["message"]
    assert cut_from(deployment, victim) == []
