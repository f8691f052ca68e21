"""The end of an inference worker whose device fails, on the simulated accelerator."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from sqlalchemy import Engine

from store.inference import Mailbox
from store.settings import Settings
from tests.accelerator import NAME, Accelerator
from tests.tiny_models import png_data_url, tiny_causal_folder, tiny_vlm_folder
from tests.worker.test_inference import messages_of, payload_of
from worker.device_loss import EXIT_DEVICE_LOST
from worker.inference import InferenceWorker

ECC = "CUDA error: uncorrectable ECC error encountered"
ROOT = Path(__file__).parents[2]

Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_causal_folder(tmp_path_factory.mktemp("models"))


@pytest.fixture
def mailbox(embedded_settings: Settings) -> Iterator[Mailbox]:
    made = Mailbox(embedded_settings)
    yield made
    made.close_sync()


@pytest.fixture
def start(embedded_settings: Settings, sqlite_engine: Engine) -> Iterator[Start]:  # noqa: ARG001 - makes the tables
    settings = embedded_settings
    environment = {
        "GRIT_HOME": str(settings.home),
        "GRIT_DATABASE_URL": settings.database_url,
        "GRIT_OBJECTS_URL": settings.objects_url,
        "GRIT_BROKER_URL": settings.broker_url,
        "GRIT_QUEUE_PREFIX": settings.queue_prefix,
        "OMP_NUM_THREADS": "1",
    }
    made: list[subprocess.Popen[str]] = []

    def start_one(*fault: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "tests.worker.worker_of_a_card", *fault]
        made.append(
            subprocess.Popen(
                command,
                cwd=ROOT,
                env={**os.environ, **environment},
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                text=True,
            )
        )
        return made[-1]

    yield start_one
    for process in made:
        process.kill()
        process.communicate()


def tell(process: subprocess.Popen[str], fault: str) -> None:
    assert process.stdin is not None
    process.stdin.write(f"{fault}\n")
    process.stdin.flush()


def test_a_device_that_fails_during_an_answer_ends_the_worker_and_the_next_one_answers(
    start: Start, mailbox: Mailbox, model: Path
) -> None:
    worker = start()
    long = payload_of(model, stream=True, max_new_tokens=900)
    mailbox.submit("running", device=NAME, team="a", payload=long)
    first = mailbox.wait("running", timeout_seconds=180)
    assert first is not None
    assert "delta" in first
    tell(worker, ECC)
    last = messages_of(mailbox, "running")[-1]
    assert last["error"]["code"] == "inference_worker_lost"
    assert "device of the worker" in last["error"]["message"]
    mailbox.submit("waiting", device=NAME, team="a", payload=payload_of(model))
    assert worker.wait(60) == EXIT_DEVICE_LOST
    assert mailbox.num_waiting(NAME) == 1
    start()
    message = mailbox.wait("waiting", timeout_seconds=180)
    assert message is not None
    assert "output" in message, message


def test_a_request_that_meets_a_lost_device_is_not_blamed_for_its_assertion(
    start: Start, mailbox: Mailbox, tmp_path: Path
) -> None:
    model = tiny_vlm_folder(tmp_path)
    worker = start()
    long = payload_of(model, stream=True, max_new_tokens=400)
    mailbox.submit("running", device=NAME, team="a", payload=long)
    first = mailbox.wait("running", timeout_seconds=180)
    assert first is not None
    assert "delta" in first
    # Its image is still being read when the other one has its answer.
    image = {"type": "image_url", "image_url": {"url": png_data_url(1, side_pixels=4000)}}
    late = payload_of(model, messages=[{"role": "user", "content": [image]}])
    mailbox.submit("reading", device=NAME, team="b", payload=late)
    deadline = time.monotonic() + 60
    while mailbox.num_waiting(NAME) and time.monotonic() < deadline:
        time.sleep(0.001)
    tell(worker, "CUDA error: device-side assert triggered")
    assert "error" in messages_of(mailbox, "running")[-1]
    assert messages_of(mailbox, "reading")[-1]["error"]["code"] == "inference_worker_lost"
    assert worker.wait(60) == EXIT_DEVICE_LOST


def test_a_worker_whose_device_fails_its_examination_takes_no_request(
    start: Start, mailbox: Mailbox, model: Path
) -> None:
    mailbox.submit("waiting", device=NAME, team="a", payload=payload_of(model))
    assert start(ECC).wait(180) == EXIT_DEVICE_LOST
    assert mailbox.num_waiting(NAME) == 1
    assert not mailbox.is_lost("waiting")


def test_a_worker_whose_device_hangs_in_its_examination_ends(
    start: Start, mailbox: Mailbox, model: Path
) -> None:
    mailbox.submit("waiting", device=NAME, team="a", payload=payload_of(model))
    assert start("hang").wait(180) == EXIT_DEVICE_LOST
    assert mailbox.num_waiting(NAME) == 1


def test_a_model_beyond_the_workers_share_of_the_device_is_refused_by_the_settings_name(
    accelerator: Accelerator,
    embedded_settings: Settings,
    sqlite_engine: Engine,  # noqa: ARG001 - makes the tables
    mailbox: Mailbox,
    model: Path,
) -> None:
    accelerator.capacity_bytes = 2**20
    settings = embedded_settings.model_copy(update={"infer_device_memory_share": 0.01})
    worker = InferenceWorker(settings, device=NAME)
    worker.start()
    mailbox.submit("large", device=NAME, team="a", payload=payload_of(model))
    error = messages_of(mailbox, "large")[-1]["error"]
    worker.close()
    assert accelerator.capacity_bytes == int(0.01 * 2**20)
    assert error["code"] == "out_of_memory_device"
    assert "0.01 of the device's memory (GRIT_INFER_DEVICE_MEMORY_SHARE)" in error["message"]
