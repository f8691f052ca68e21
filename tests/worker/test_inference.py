"""The inference worker against a real broker, database and object store."""

import json
import shutil
import threading
import time

import pytest
import torch
from peft import LoraConfig, get_peft_model

from grit_core.artifacts import write_adapter
from grit_core.errors import DeviceUnavailable
from grit_core.models.pretrained import load_base_model
from store.inference import Mailbox
from store.objects import Objects
from tests.tiny_models import png_data_url, tiny_vlm_folder
from worker.inference import EXTRA_PLACES, InferenceWorker, _describe_error

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_vlm_folder(tmp_path_factory.mktemp("models"))


@pytest.fixture
def start(embedded_settings, sqlite_engine):  # noqa: ARG001  # makes the tables
    """Start a worker whose settings are changed as given."""
    made = []

    def start_one(**changes):
        made.append(InferenceWorker(embedded_settings.model_copy(update=changes), device="cpu"))
        made[-1].start()
        return made[-1]

    yield start_one
    for worker in made:
        worker.close()


@pytest.fixture
def worker(start):
    return start(stop_grace_seconds=5)


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
    assert [fault["pointer"] for fault in reply["error"]["faults"]] == ["/messages/0/content"]


def test_an_empty_question_is_refused_by_its_place_and_names_no_line(
    embedded_settings, worker, model
):
    error = ask(
        embedded_settings,
        worker,
        model={"id": "tiny", "source": str(model)},
        messages=[
            {"role": "system", "content": [{"type": "text", "text": ""}]},
            {"role": "user", "content": [{"type": "text", "text": "Hello"}]},
            {"role": "assistant", "content": [{"type": "text", "text": ""}]},
            {"role": "user", "content": [{"type": "text", "text": " "}]},
        ],
    )["error"]
    assert [fault["pointer"] for fault in error["faults"]] == ["/messages/3/content"]
    assert error["message"] == "The message is empty; write text or an image."


def test_an_answer_without_a_bound_has_the_room_that_its_prompt_leaves(
    embedded_settings, worker, model
):
    long = [{"role": "user", "content": "x" * 960}]
    fields = {"model": {"id": "tiny", "source": str(model)}, "messages": long}
    fields["max_new_tokens"] = 2048
    found = ask(embedded_settings, worker, **fields, shorten_to_fit=True)
    assert found["usage"]["prompt_tokens"] + found["usage"]["completion_tokens"] <= 1024
    refused = ask(embedded_settings, worker, **fields)["error"]
    assert refused["code"] == "request_too_large"
    assert [fault["pointer"] for fault in refused["faults"]] == ["/max_new_tokens"]


def test_a_model_that_went_away_is_named_in_the_answer(embedded_settings, worker, tmp_path):
    gone = tmp_path / "gone"
    reply = ask(embedded_settings, worker, model={"id": "gone", "source": str(gone)})
    assert reply["error"]["code"] == "model_unavailable"
    assert str(gone) in reply["error"]["message"]


def without_image_in_its_template(folder):
    template = folder / "chat_template.jinja"
    template.write_text(template.read_text().replace("{{ '<image>' }}", ""))


def with_another_image_token(folder):
    config = folder / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "image_token_id": 8}))


@pytest.mark.parametrize("change", [without_image_in_its_template, with_another_image_token])
def test_what_a_processor_or_model_refuses_is_the_users_fault_and_the_next_is_answered(
    embedded_settings, worker, model, tmp_path, change
):
    folder = shutil.copytree(model, tmp_path / "changed")
    change(folder)
    named = {"id": "changed", "source": str(folder)}
    error = ask(embedded_settings, worker, model=named)["error"]
    assert (error["code"], error["category"]) == ("chat_invalid", "user")
    assert "refuses the chat: ValueError" in error["message"]
    words = [{"role": "user", "content": "Hello?"}]
    assert "output" in ask(embedded_settings, worker, model=named, messages=words)


def test_a_bell_without_a_request_is_no_work(worker):
    worker.serve()


# --- many at once, streams, ends


def payload_of(model, **changes):
    return {
        "model": {"id": "tiny", "source": str(model)},
        "adapter": None,
        "messages": [{"role": "user", "content": "Hello?"}],
        "max_new_tokens": 4,
        "temperature": 0,
        "top_p": 1,
        "seed": None,
        "stop": [],
        "submitted_at": time.time(),
        **changes,
    }


@pytest.fixture
def mailbox(embedded_settings):
    made = Mailbox(embedded_settings)
    yield made
    made.close_sync()


@pytest.fixture
def bell(worker):
    """Ring: each bell is heard by a thread of its own, as Celery does it."""
    threads = []

    def ring():
        threads.append(threading.Thread(target=worker.serve))
        threads[-1].start()

    yield ring
    for thread in threads:
        thread.join(30)


def messages_of(mailbox, request_id):
    """All messages of an answer, up to the last one."""
    found = [mailbox.wait(request_id, timeout_seconds=60)]
    while "delta" in found[-1]:
        found.append(mailbox.wait(request_id, timeout_seconds=60))
    return found


def test_the_pieces_of_a_stream_joined_are_its_output_and_are_fewer_than_its_tokens(
    mailbox, bell, model
):
    payload = payload_of(model, stream=True, max_new_tokens=600)
    mailbox.submit("one", device="cpu", team="a", payload=payload)
    bell()
    *pieces, last = messages_of(mailbox, "one")
    text = "".join(piece["delta"] for piece in pieces)
    assert len(text) > 0
    assert last["output"].startswith(text)
    assert [piece["at"] for piece in pieces] == [
        sum(len(one["delta"]) for one in pieces[:index]) for index in range(len(pieces))
    ]
    assert 2 < len(pieces) < last["usage"]["completion_tokens"] / 2


def test_an_answer_that_is_no_stream_is_one_message(mailbox, bell, model):
    mailbox.submit("one", device="cpu", team="a", payload=payload_of(model))
    bell()
    [only] = messages_of(mailbox, "one")
    assert "output" in only


def test_the_same_image_is_read_once(mailbox, bell, model):
    content = [
        {"type": "image_url", "image_url": {"url": png_data_url(3)}},
        {"type": "text", "text": "Which digit?"},
    ]
    payload = payload_of(model, messages=[{"role": "user", "content": content}])
    found = []
    for name in ("one", "two"):
        mailbox.submit(name, device="cpu", team="a", payload=payload)
        bell()
        found += messages_of(mailbox, name)
    first, second = (one["usage"] for one in found)
    assert (first["image_cached"], first["cached_prompt_tokens"]) == (False, 0)
    # Its features were there, or even the keys and values that came of them.
    assert second["image_cached"] or second["cached_prompt_tokens"] >= second["image_tokens"]
    assert found[0]["output"] == found[1]["output"]


def test_a_cancelled_request_leaves_the_engine_and_the_others_go_on(mailbox, bell, worker, model):
    for name in ("one", "two"):
        payload = payload_of(model, stream=True, max_new_tokens=900)
        mailbox.submit(name, device="cpu", team="a", payload=payload)
        bell()
    for name in ("one", "two"):
        assert "delta" in mailbox.wait(name, timeout_seconds=20)
    mailbox.cancel("one")
    assert "output" in messages_of(mailbox, "two")[-1]
    deadline = time.monotonic() + 60
    while worker.engine.stats().num_active and time.monotonic() < deadline:
        time.sleep(0.01)
    assert worker.engine.stats().num_active == 0
    left = []
    while (message := mailbox.wait("one", timeout_seconds=0.05)) is not None:
        left.append(message)
    assert all("delta" in message for message in left)
    assert mailbox.is_lost("one")


def test_requests_whose_bells_were_lost_are_answered(mailbox, worker, model):  # noqa: ARG001
    mailbox.submit("one", device="cpu", team="a", payload=payload_of(model))
    assert "output" in messages_of(mailbox, "one")[-1]


@pytest.mark.parametrize(("grace", "code"), [(0.2, "inference_worker_lost"), (20, None)])
def test_a_draining_worker_finishes_what_it_can_and_takes_nothing_new(
    start, mailbox, model, grace, code
):
    worker = start(stop_grace_seconds=grace)
    payload = payload_of(model, stream=True, max_new_tokens=900)
    mailbox.submit("running", device="cpu", team="a", payload=payload)
    assert "delta" in mailbox.wait("running", timeout_seconds=20)
    worker.drain()
    mailbox.submit("waiting", device="cpu", team="a", payload=payload)
    worker.serve()
    worker.look()
    last = messages_of(mailbox, "running")[-1]
    assert last.get("error", {}).get("code") == code
    assert mailbox.num_waiting("cpu") == 1


def test_no_more_requests_run_than_there_are_places_and_all_are_answered(start, mailbox, model):
    worker = start(infer_max_batch=2)
    names = [f"inf_{number}" for number in range(12)]
    for name in names:
        payload = payload_of(model, max_new_tokens=100)
        mailbox.submit(name, device="cpu", team=name, payload=payload)
    threads = [threading.Thread(target=worker.serve) for _ in names]
    for thread in threads:
        thread.start()
    most = 0
    while mailbox.num_waiting("cpu"):
        most = max(most, len(worker._running))
        time.sleep(0.001)
    assert 1 < most <= 2 + EXTRA_PLACES
    for name in names:
        assert "output" in messages_of(mailbox, name)[-1]


def test_a_missing_device_is_named_to_the_caller():
    error = DeviceUnavailable("This machine has no cuda:7: 2 cuda devices can be seen.")
    assert _describe_error(error) == {
        "code": "device_unavailable",
        "category": "system",
        "message": str(error),
    }


def test_requests_whose_keys_would_be_too_many_do_not_share_a_step(start, mailbox, model):
    worker = start(infer_key_bytes=1)
    for name in ("one", "two"):
        payload = payload_of(model, stream=True, max_new_tokens=300)
        mailbox.submit(name, device="cpu", team=name, payload=payload)
    ended, most = set(), 0
    while ended != {"one", "two"}:
        most = max(most, worker.engine.stats().num_active)
        for name in {"one", "two"} - ended:
            message = mailbox.wait(name, timeout_seconds=0.01)
            if message is not None and "delta" not in message:
                assert "output" in message
                ended.add(name)
    assert most == 1
