"""Adapters over HTTP, and inference through a real broker."""

import io
import tarfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from api.app import create_app
from api.services import Services
from grit_core.images import data_url
from store import adapters, workers
from store.database import transaction
from store.inference import Mailbox
from store.models import AdapterOrigin
from store.settings import Settings
from tests.api.conftest import MODEL, Team, png

FILES = {"adapter_config.json": b"{}", "adapter_model.safetensors": bytes(1000), "grit.json": b"1"}


@pytest.fixture
def adapter(team: Team, services: Services, tmp_path: Path) -> str:
    folder = tmp_path / "adapter"
    folder.mkdir()
    for name, data in FILES.items():
        (folder / name).write_bytes(data)
    services.objects.put_folder("adapters/one/", folder)
    with transaction(services.engine) as session:
        made = adapters.create_adapter(
            session,
            team=team.name,
            origin=AdapterOrigin.IMPORT,
            model=MODEL,
            prefix="adapters/one/",
            name="grey",
        )
    return made.id


def test_an_adapter_is_listed_read_and_deleted(
    team: Team, adapter: str, services: Services
) -> None:
    assert [each["id"] for each in team.get("/adapters").json()["data"]] == [adapter]
    assert team.get("/adapters?model=other").json()["data"] == []
    assert team.get(f"/adapters/{adapter}").json()["model"] == MODEL
    assert team.delete(f"/adapters/{adapter}").status_code == 204
    assert team.get(f"/adapters/{adapter}").status_code == 404
    assert list(services.objects.list("adapters/one/")) == []


def test_a_download_is_a_tar_of_the_folder(team: Team, adapter: str) -> None:
    answer = team.get(f"/adapters/{adapter}/download")
    assert answer.status_code == 200
    assert answer.headers["Content-Type"] == "application/x-tar"
    assert adapter in answer.headers["Content-Disposition"]
    with tarfile.open(fileobj=io.BytesIO(answer.content)) as archive:
        found = {
            member.name.removeprefix(f"{adapter}/"): archive.extractfile(member).read()  # type: ignore[union-attr]
            for member in archive
        }
    assert found == FILES


def test_an_adapter_whose_files_are_gone_says_so(
    team: Team, adapter: str, services: Services
) -> None:
    services.objects.delete_prefix("adapters/one/")
    answer = team.get(f"/adapters/{adapter}/download")
    assert (answer.status_code, answer.json()["code"]) == (410, "object_missing")


@pytest.fixture
def settings(embedded_settings: Settings) -> Settings:
    return embedded_settings.model_copy(update={"infer_timeout_seconds": 3.0})


@pytest.fixture
def answering(settings: Settings, services: Services) -> Iterator[Callable[..., list[Any]]]:
    """Play the inference worker: take the one request that comes, and answer it."""
    with transaction(services.engine) as session:
        workers.register_worker(
            session, hostname="here", process_id=2, queues=["infer.cpu"], device="cpu"
        )
    threads: list[threading.Thread] = []

    def play(reply: dict[str, Any]) -> list[Any]:
        taken: list[Any] = []
        mailbox = Mailbox(settings)

        def work() -> None:
            names = mailbox._sync
            for _ in range(200):
                waiting = names.keys(f"{settings.queue_prefix}infer:request:*")
                if waiting:
                    request_id = waiting[0].decode().rpartition(":")[2]
                    taken.append(mailbox.take(request_id))
                    mailbox.answer(request_id, reply)
                    break
                threading.Event().wait(0.02)
            mailbox.close_sync()

        thread = threading.Thread(target=work)
        thread.start()
        threads.append(thread)
        return taken

    yield play
    for thread in threads:
        thread.join(timeout=10)


REPLY = {
    "output": "grey",
    "finish_reason": "stop",
    "usage": {"prompt_tokens": 9, "image_tokens": 4, "completion_tokens": 1},
    "timing": {"queue_seconds": 0.1},
}


def test_an_inference_request_reaches_the_worker_and_comes_back(
    team: Team, adapter: str, answering: Callable[..., list[Any]]
) -> None:
    taken = answering(REPLY)
    body = {"adapter": adapter, "prompt": "Is it grey?", "images": [data_url(png())]}
    answer = team.post("/infer", json=body)
    assert answer.status_code == 200, answer.text
    found = answer.json()
    assert (found["output"], found["adapter"], found["model"]) == ("grey", adapter, MODEL)
    assert found["usage"]["image_tokens"] == 4
    [payload] = taken
    assert payload["adapter"]["prefix"] == "adapters/one/"
    kinds = [part["type"] for part in payload["messages"][0]["content"]]
    assert kinds == ["image_url", "text"]


def test_image_parts_take_the_images_in_order(
    team: Team, answering: Callable[..., list[Any]]
) -> None:
    taken = answering(REPLY)
    first, second = data_url(png(color=1)), data_url(png(color=2))
    content = [
        {"type": "image"},
        {"type": "text", "text": "or"},
        {"type": "image_url", "image_url": {"url": second}},
    ]
    body = {"model": MODEL, "messages": [{"role": "user", "content": content}], "images": [first]}
    assert team.post("/infer", json=body).status_code == 200
    parts = taken[0]["messages"][0]["content"]
    assert [part.get("image_url", {}).get("url") for part in parts] == [first, None, second]


@pytest.mark.parametrize(
    ("category", "status", "code"),
    [("user", 422, "inference_failed"), ("system", 500, "inference_broken")],
)
def test_a_request_that_cannot_be_answered_says_why(
    team: Team, answering: Callable[..., list[Any]], category: str, status: int, code: str
) -> None:
    answering({"error": {"code": "chat_invalid", "category": category, "message": "Too long."}})
    answer = team.post("/infer", json={"model": MODEL, "prompt": "x"})
    assert (answer.status_code, answer.json()["code"]) == (status, code)
    assert answer.json()["errors"][0]["code"] == "chat_invalid"


def test_a_request_that_nobody_answers_times_out(
    settings: Settings, team: Team, services: Services
) -> None:
    with transaction(services.engine) as session:
        workers.register_worker(
            session, hostname="here", process_id=2, queues=["infer.cpu"], device="cpu"
        )
    hasty = create_app(settings.model_copy(update={"infer_timeout_seconds": 0.3}))
    with TestClient(hasty) as client:
        quick = Team(client, team.name, team.token)
        answer = quick.post("/infer", json={"model": MODEL, "prompt": "x"})
    assert (answer.status_code, answer.json()["code"]) == (503, "inference_timeout")
    assert answer.headers["Retry-After"]


def test_a_job_without_an_adapter_is_not_ready(team: Team) -> None:
    job = team.job()["id"]
    answer = team.post("/infer", json={"job": job, "prompt": "x"})
    assert (answer.status_code, answer.json()["code"]) == (409, "adapter_not_ready")


def test_an_adapter_of_another_model_is_refused(team: Team, adapter: str) -> None:
    answer = team.post("/infer", json={"adapter": adapter, "model": "other", "prompt": "x"})
    assert answer.status_code == 422
    assert answer.json()["errors"][0]["code"] == "adapter_mismatch"
