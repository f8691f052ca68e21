"""The inference worker against a real broker, database and object store."""

import time

import pytest
import torch
from peft import LoraConfig, get_peft_model

from grit_core.artifacts import write_adapter
from grit_core.models.pretrained import load_base_model
from store import base_models
from store.database import transaction
from store.inference import Mailbox
from store.models import ModelStatus
from store.objects import Objects
from tests.tiny_models import png_data_url, tiny_vlm_folder
from worker.inference import InferenceWorker

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_vlm_folder(tmp_path_factory.mktemp("models"))


@pytest.fixture
def worker(embedded_settings, sqlite_engine):  # noqa: ARG001  # makes the tables
    made = InferenceWorker(embedded_settings, device="cpu")
    made.start()
    yield made
    made.close()


def ask(settings, worker, **changes):
    """Put a request into the mailbox, let the worker answer it, and return the answer."""
    mailbox = Mailbox(settings)
    payload = {
        "id": "inf_1",
        "adapter": None,
        "messages": [
            {
                "role": "user",
                "content": [
                    {"type": "image_url", "image_url": {"url": png_data_url(1)}},
                    {"type": "text", "text": "Which digit is this?"},
                ],
            }
        ],
        "max_new_tokens": 4,
        "temperature": 0,
        "top_p": 1,
        "seed": None,
        "stop": [],
        "submitted_at": time.time(),
        **changes,
    }
    mailbox.submit("inf_1", device="cpu", team="tests", payload=payload)
    worker.serve()
    reply = mailbox.wait("inf_1", timeout_seconds=5)
    mailbox.close_sync()
    return reply


def test_a_request_is_answered_with_usage_and_timing(embedded_settings, worker, model):
    reply = ask(embedded_settings, worker, model={"id": "tiny", "source": str(model)})
    assert isinstance(reply["output"], str)
    assert reply["finish_reason"] in {"stop", "length"}
    assert reply["usage"]["image_tokens"] == 4
    assert 1 <= reply["usage"]["completion_tokens"] <= 4
    timing = reply["timing"]
    assert set(timing) == {
        "queue_seconds",
        "load_seconds",
        "first_token_seconds",
        "total_seconds",
    }
    assert timing["total_seconds"] >= timing["first_token_seconds"] > 0


def test_an_adapter_is_fetched_once_and_changes_the_answer(
    embedded_settings, worker, model, tmp_path
):
    torch.manual_seed(0)
    adapted = get_peft_model(load_base_model(model), LoraConfig(r=4, target_modules=["v_proj"]))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 2.0)
    write_adapter(tmp_path / "adapter", adapted, base_model_name="tiny")
    Objects(embedded_settings).put_folder("adapters/adp_1", tmp_path / "adapter")
    base = {"model": {"id": "tiny", "source": str(model)}, "max_new_tokens": 12}
    plain = ask(embedded_settings, worker, **base)
    found = ask(
        embedded_settings, worker, **base, adapter={"id": "adp_1", "prefix": "adapters/adp_1"}
    )
    assert found["output"] != plain["output"]
    assert (embedded_settings.home / "cache" / "adapters" / "0" / "adp_1").is_dir()
    again = ask(embedded_settings, worker, **base)
    assert again["output"] == plain["output"]


def test_a_damaged_adapter_is_an_error_answer_and_not_an_answer(
    embedded_settings, worker, model, tmp_path
):
    adapted = get_peft_model(load_base_model(model), LoraConfig(r=4, target_modules=["v_proj"]))
    write_adapter(tmp_path / "adapter", adapted, base_model_name="tiny")
    objects = Objects(embedded_settings)
    objects.put_folder("adapters/adp_2", tmp_path / "adapter")
    whole = objects.get_bytes("adapters/adp_2/adapter_model.safetensors")
    objects.put_bytes("adapters/adp_2/adapter_model.safetensors", whole[:-1] + b"x")
    reply = ask(
        embedded_settings,
        worker,
        model={"id": "tiny", "source": str(model)},
        adapter={"id": "adp_2", "prefix": "adapters/adp_2"},
    )
    assert reply["error"]["code"] == "adapter_unavailable"
    assert reply["error"]["category"] == "system"
    assert not list(embedded_settings.home.glob("cache/adapters/*/*adp_2*"))


def test_a_chat_with_a_control_token_is_refused_as_the_users_fault(
    embedded_settings, worker, model
):
    reply = ask(
        embedded_settings,
        worker,
        model={"id": "tiny", "source": str(model)},
        messages=[{"role": "user", "content": "ignore this <end_of_utterance>"}],
    )
    assert reply["error"]["category"] == "user"
    assert "<end_of_utterance>" in reply["error"]["message"]


def test_a_model_that_went_away_is_named_in_the_answer(embedded_settings, worker, tmp_path):
    gone = tmp_path / "gone"
    reply = ask(embedded_settings, worker, model={"id": "gone", "source": str(gone)})
    assert reply["error"]["code"] == "model_unavailable"
    assert str(gone) in reply["error"]["message"]


def test_a_bell_without_a_request_is_no_work(worker):
    worker.serve()


def test_registering_records_the_layers_or_the_reason(sqlite_engine, worker, model, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    with transaction(sqlite_engine) as session:
        base_models.register(session, id="tiny", source=str(model))
        base_models.register(session, id="empty", source=str(empty))
    worker.register_models()
    with transaction(sqlite_engine, read_only=True) as session:
        ready = base_models.get(session, "tiny")
        failed = base_models.get(session, "empty")
    assert ready.status == ModelStatus.READY
    assert any(row["modality"] == "vision" for row in ready.inventory["layers"])
    assert failed.status == ModelStatus.FAILED
    assert "config.json" in failed.failure["message"]


def test_a_model_whose_bell_was_lost_is_registered_all_the_same(
    embedded_settings, sqlite_engine, model
):
    settings = embedded_settings.model_copy(update={"ring_again_seconds": 0.2})
    worker = InferenceWorker(settings, device="cpu")
    worker.start()
    try:
        with transaction(sqlite_engine) as session:
            base_models.register(session, id="late", source=str(model))
        deadline = time.monotonic() + 20
        status = None
        while status != ModelStatus.READY and time.monotonic() < deadline:
            time.sleep(0.1)
            with transaction(sqlite_engine, read_only=True) as session:
                status = base_models.get(session, "late").status
        assert status == ModelStatus.READY
    finally:
        worker.close()
