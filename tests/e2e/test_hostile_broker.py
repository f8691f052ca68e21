"""A broker in the wrong hands, and a model that carries code: nothing runs but our own tasks."""

import base64
import json
import os
import pickle
import random
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import redis
from sqlalchemy import update

from store.database import transaction
from store.models import BaseModelRow, JobStatus
from store.queue import CLAIM_TASK, INFER_TASK, REGISTER_MODELS_TASK
from tests.e2e.deployment import Broker, Deployment, deployed
from tests.tiny_models import tiny_causal_folder, tiny_chat_rows, write_jsonl

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

MESSAGES = int(os.environ.get("HOSTILE_MESSAGES", "300"))
SEED = int(os.environ.get("HOSTILE_SEED", "1"))
OURS = (CLAIM_TASK, INFER_TASK, REGISTER_MODELS_TASK)
FOREIGN = (
    *("os.system", "subprocess.call", "builtins.eval", "worker.app.create", "celery.ping"),
    *("celery.map", "celery.starmap", "celery.chunks", "celery.group", "celery.chain"),
    *("celery.chord", "celery.chord_unlock", "celery.backend_cleanup", "celery.accumulate"),
    *("", " ", "grit.claim\n", "grit.CLAIM", "__import__('os').system"),
)


class Touch:
    """Unpickling it makes a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.system, (f"touch {self.marker}",)


def message(body: bytes, *, task: object, **changes: Any) -> dict[str, Any]:
    """A message as kombu writes it."""
    headers = {
        "lang": "py", "task": task, "id": "x", "root_id": "x", "parent_id": None, "group": None,
        "retries": 0, "eta": None, "expires": None, "timelimit": [None, None],
        "argsrepr": "()", "kwargsrepr": "{}", "origin": "nobody",
    }  # fmt: skip
    made: dict[str, Any] = {
        "body": base64.b64encode(body).decode(),
        "content-encoding": "utf-8",
        "content-type": "application/json",
        "headers": headers,
        "properties": {
            "correlation_id": "x", "reply_to": "x", "delivery_mode": 2, "priority": 0,
            "delivery_info": {"exchange": "", "routing_key": "cpu"},
            "body_encoding": "base64", "delivery_tag": "x",
        },
    }  # fmt: skip
    for name, value in changes.items():
        made[name.replace("_", "-")] = value
    return made


def hostile(draw: random.Random, marker: Path) -> bytes:
    """Return one message that no part of ours would send."""
    command = f"touch {marker}"
    arguments = draw.choice([
        [command], [], ["cpu"], [["cpu"]], [None], [{"x": 1}], [command] * 9, "cpu", 7, None,
    ])  # fmt: skip
    embedded = {
        "callbacks": [{"task": "os.system", "args": [command], "options": {}, "type": "celery"}],
        "chain": [{"task": "celery.map", "args": [command], "options": {"queue": "cpu"}}],
    }
    body = draw.choice([
        json.dumps([arguments, {}, draw.choice([{}, None, embedded, []])]).encode(),
        json.dumps([arguments, {"queue": command}, {}]).encode(),
        pickle.dumps(Touch(marker)),
        draw.randbytes(draw.randrange(40)),
        b"[" * 5000,
        b"null",
    ])
    made = message(
        body, task=draw.choice([*FOREIGN, *FOREIGN, *OURS, None, 5, ["grit.claim"], {"a": 1}])
    )
    made["properties"]["delivery_tag"] = draw.randbytes(8).hex()
    kind = draw.choice(["application/json", "application/x-python-serialize", "application/x-yaml",
                        "pickle", "text/plain", "", None, 3])  # fmt: skip
    made["content-type"] = kind
    fault = draw.randrange(9)
    if fault == 0:
        del made[draw.choice([*made])]
    elif fault == 1:
        made["headers"][draw.choice([*made["headers"]])] = draw.choice([None, [], {}, "x", 10**30])
    elif fault == 2:
        made["properties"][draw.choice([*made["properties"]])] = draw.choice([None, [], {}, 10**30])
    elif fault == 3:
        made["headers"]["compression"] = draw.choice(["zlib", "application/x-gzip", "none", 4])
    elif fault == 4:
        return draw.choice([b"", b"null", b"[]", b"7", b'"x"', b"\xff\xfe", b"{", b"[" * 5000,
                            draw.randbytes(30), pickle.dumps(Touch(marker))])  # fmt: skip
    elif fault == 5:
        made["content-encoding"] = draw.choice(["utf-7", "rot13", "binary", "x" * 999, None, 8])
    return json.dumps(made).encode()


@pytest.fixture(scope="module")
def deployment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    folder = tmp_path_factory.mktemp("hostile")
    broker = Broker(tmp_path_factory.mktemp("broker"))
    broker.start()
    rows = write_jsonl(folder / "rows.jsonl", tiny_chat_rows(16, images=False))
    with deployed(home=folder / "home", broker_url=broker.url) as made:
        made.prepare(model=tiny_causal_folder(folder / "model"), rows=rows)
        yield made
    broker.stop()


def test_a_worker_survives_a_hostile_broker_and_runs_its_own_tasks_alone(
    deployment: Deployment, tmp_path: Path
) -> None:
    marker = tmp_path / "marker"
    draw = random.Random(SEED)  # noqa: S311 - draws that a seed repeats
    worker = deployment.start_worker()
    worker.wait_warm()
    client = redis.Redis.from_url(deployment.settings.broker_url)
    queue = f"{deployment.settings.queue_prefix}cpu"
    for number in range(MESSAGES):
        text = hostile(draw, marker)
        client.lpush(queue, text)
        assert worker.running, (number, text, worker.text()[-3000:])
    deadline = time.monotonic() + 60 + MESSAGES / 20
    while client.llen(queue):
        assert worker.running, worker.text()[-3000:]
        assert time.monotonic() < deadline, (client.llen(queue), worker.text()[-3000:])
        time.sleep(0.1)
    job = deployment.submit(max_steps=2)
    assert deployment.wait_ended(job).status == JobStatus.SUCCEEDED
    assert worker.running
    assert not marker.exists()
    # None is kept to come back: it would meet the next worker. What the worker has in hand is
    # acknowledged when it is done with it.
    unacked = f"{deployment.settings.queue_prefix}unacked"
    deadline = time.monotonic() + 60
    while client.hlen(unacked) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert client.hgetall(unacked) == {}
    client.close()
    assert "message_refused" in worker.text()
    assert "message_unreadable" in worker.text()
    ran = [line for line in worker.text().splitlines() if " succeeded in " in line]
    assert not [line for line in ran if not any(f"Task {task}[" in line for task in OURS)]


def test_a_model_that_carries_code_is_refused_by_training_and_its_code_never_runs(
    deployment: Deployment, tmp_path: Path
) -> None:
    marker = tmp_path / "marker"
    folder = carrier(deployment.model, tmp_path / "evil", marker)
    deployment.register("evil", deployment.model)
    job = submit_from(deployment, str(folder))
    done = deployment.wait_ended(job)
    assert done.status == JobStatus.FAILED
    assert done.error is not None
    assert done.error["code"] == "model_unavailable", done.error
    assert not marker.exists()


def carrier(model: Path, folder: Path, marker: Path) -> Path:
    """A copy of a model whose every file offers code."""
    shutil.copytree(model, folder)
    (folder / "evil.py").write_text(
        f"open({str(marker)!r}, 'w').close()\n"
        "from transformers import LlamaConfig as Evil, LlamaForCausalLM as EvilModel\n"
    )
    auto = {
        name: f"evil.{kind}"
        for name, kind in {
            "AutoConfig": "Evil",
            "AutoModel": "EvilModel",
            "AutoModelForCausalLM": "EvilModel",
            "AutoModelForImageTextToText": "EvilModel",
            "AutoProcessor": "Evil",
            "AutoTokenizer": "Evil",
        }.items()
    }
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "evil", "architectures": ["EvilModel"], "auto_map": auto}
    (folder / "config.json").write_text(json.dumps(config))
    for file in folder.glob("*.safetensors"):
        file.unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Touch(marker)))
    return folder


def submit_from(deployment: Deployment, source: str) -> str:
    """Submit a job whose model came to be another after its registration."""
    with transaction(deployment.engine) as session:
        session.execute(update(BaseModelRow).where(BaseModelRow.id == "evil").values(source=source))
    return deployment.submit(model="evil", max_steps=2, max_attempts=1)
