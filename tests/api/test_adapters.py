"""Adapters over HTTP, and inference through a real broker."""

import io
import json
import tarfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load, save_file
from starlette.testclient import TestClient

from api.app import create_app
from api.services import Services
from grit_core.images import data_url
from store import adapters, base_models, workers
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


@pytest.fixture
def store_adapter(team: Team, services: Services, tmp_path: Path) -> Callable[..., str]:
    """Store an adapter of some of the base model's layers, of rank 3 and scale 2."""

    def store(*layers: str) -> str:
        with transaction(services.engine) as session:
            known = base_models.get(session, MODEL).inventory
        sizes = {record["name"]: record for record in known["layers"]}
        tensors = {}
        for name in layers:
            shape_a, shape_b = (3, sizes[name]["in_features"]), (sizes[name]["out_features"], 3)
            tensors[f"base_model.model.{name}.lora_A.weight"] = np.ones(shape_a, np.float32)
            tensors[f"base_model.model.{name}.lora_B.weight"] = np.ones(shape_b, np.float32)
        folder = tmp_path / "real"
        folder.mkdir()
        save_file(tensors, folder / "adapter_model.safetensors")
        config = {"peft_type": "LORA", "r": 3, "lora_alpha": 6, "target_modules": list(layers)}
        (folder / "adapter_config.json").write_text(json.dumps(config))
        services.objects.put_folder("adapters/real/", folder)
        with transaction(services.engine) as session:
            made = adapters.create_adapter(
                session,
                team=team.name,
                origin=AdapterOrigin.IMPORT,
                model=MODEL,
                prefix="adapters/real/",
                name="real",
            )
        return made.id

    return store


TEXT_LAYER = "model.text_model.layers.0.self_attn.q_proj"
VISION_LAYER = "model.vision_model.encoder.layers.0.self_attn.q_proj"


def test_the_layout_for_vllm_has_one_rank_and_the_scale_in_b(
    team: Team, store_adapter: Callable[..., str]
) -> None:
    adapter = store_adapter(TEXT_LAYER)
    answer = team.get(f"/adapters/{adapter}/download?layout=vllm")
    assert answer.status_code == 200, answer.text
    with tarfile.open(fileobj=io.BytesIO(answer.content)) as archive:
        files = {
            member.name.removeprefix(f"{adapter}/"): archive.extractfile(member).read()  # type: ignore[union-attr]
            for member in archive
        }
    assert set(files) == {"adapter_config.json", "adapter_model.safetensors"}
    config = json.loads(files["adapter_config.json"])
    assert (config["r"], config["lora_alpha"]) == (8, 8)
    tensors = load(files["adapter_model.safetensors"])
    b = tensors[f"base_model.model.{TEXT_LAYER}.lora_B.weight"]
    assert b.shape[1] == 8
    assert (b[:, :3] == 2).all()
    assert not b[:, 3:].any()


def test_layers_that_vllm_does_not_serve_are_left_out_only_on_request(
    team: Team, store_adapter: Callable[..., str]
) -> None:
    adapter = store_adapter(TEXT_LAYER, VISION_LAYER)
    refused = team.get(f"/adapters/{adapter}/download?layout=vllm")
    assert (refused.status_code, refused.json()["code"]) == (422, "adapter_invalid")
    assert VISION_LAYER in refused.json()["detail"]
    taken = team.get(f"/adapters/{adapter}/download?layout=vllm&language_only=true")
    assert taken.status_code == 200
    assert VISION_LAYER.encode() not in taken.content
    every = team.get(f"/adapters/{adapter}/download?layout=vllm&tower_connector=true")
    assert VISION_LAYER.encode() in every.content
    both = team.get(f"/adapters/{adapter}/download?language_only=true&tower_connector=true")
    assert (both.status_code, both.json()["errors"][0]["parameter"]) == (422, "language_only")
    assert team.get(f"/adapters/{adapter}/download?layout=gguf").status_code == 422


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
            for _ in range(200):
                found = mailbox.take_next("cpu")
                if found is not None:
                    taken.append(found)
                    mailbox.answer(found["id"], reply)
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
