"""Secrets never leave: canaries in everything that a deployment is given, and a look everywhere."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self
from urllib.parse import quote

import httpx
import psutil
import pytest
import redis
from sqlalchemy import select

from store.database import create_engine_from, transaction
from store.keys import Scope, create_key
from store.models import Base, JobStatus
from store.objects import Objects
from tests.chaos.parts import Process
from tests.e2e.deployment import ROOT, TEAM, Deployment, deployed
from tests.ports import reserve_port
from tests.services import S3
from tests.tiny_models import tiny_causal_folder, tiny_chat_rows, write_jsonl

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

# With what cuts a URL in the wrong place.
DATABASE, BROKER = "c4nary/#?@%:database", "c4nary/#?@%:broker"
OTHER = "c4nary-of-another-program"
WRONG_KEY, HEADER, QUERY, BODY = "c4nary-wrong-key", "c4nary-header", "c4nary-query", "c4nary-body"
INJECTED = "injected-line"
HOSTILE = f"\r\n{INJECTED}\x1b[31m\x00\u2028{INJECTED}"


@dataclass
class Seen:
    """What came out of a deployment."""

    key: str
    secrets: list[str]
    logs: dict[str, str] = field(default_factory=dict)
    answers: list[str] = field(default_factory=list)
    rows: str = ""
    objects: dict[str, bytes] = field(default_factory=dict)
    broker: str = ""
    environments: list[dict[str, str]] = field(default_factory=list)


@pytest.fixture(scope="module")
def seen(
    postgres: Any, valkey: str, s3: S3, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Seen]:
    folder = tmp_path_factory.mktemp("secrets")
    name = f"secrets_{os.getpid()}"
    database_url = postgres.create(name)
    values: dict[str, str | Path] = {
        "home": folder / "home",
        "database_url": database_url.replace("grit@", f"grit:{quote(DATABASE, safe='')}@"),
        # Everybody may use this Valkey, with whatever password.
        "broker_url": valkey.replace("//", f"//default:{quote(BROKER, safe='')}@"),
        "queue_prefix": f"{name}:",
        "objects_url": f"s3://{s3.bucket}/{name}",
        "s3_endpoint": s3.endpoint,
        "s3_access_key_id": s3.access_key_id,
        "s3_secret_access_key": s3.secret_access_key,
    }
    with deployed(**values) as deployment:
        deployment.environment |= {
            "POSTGRES_PASSWORD": OTHER,
            "SOME_API_KEY": OTHER,
            "SENTRY_DSN": f"https://{OTHER}@errors",
            "ELSEWHERE": f"amqp://user:{OTHER}@queue",
            "ELSEWHERE_RAW": f"amqp://user:{OTHER}/#@queue",
        }
        yield gather(deployment, folder, secrets=[DATABASE, BROKER, OTHER, s3.secret_access_key])
    postgres.drop(name)


def gather(deployment: Deployment, folder: Path, *, secrets: list[str]) -> Seen:
    """Use the service well and badly, with parts missing, and collect all that it says."""
    rows = write_jsonl(folder / "rows.jsonl", tiny_chat_rows(16, images=False))
    deployment.prepare(model=tiny_causal_folder(folder / "model"), rows=rows)
    with transaction(deployment.engine) as session:
        _, key = create_key(session, team=TEAM, name="secrets", scopes=set(Scope))
    seen = Seen(key=key, secrets=[*secrets, key.rpartition("_")[2][:20], key])
    dead = {"GRIT_DATABASE_URL": f"postgresql://grit:{quote(DATABASE, safe='')}@127.0.0.1:1/x"}
    half = {
        "GRIT_S3_ENDPOINT": "http://127.0.0.1:1",
        "GRIT_OBJECTS_RETRY_SECONDS": "0.2",
        "GRIT_BROKER_URL": f"redis://:{quote(BROKER, safe='')}@127.0.0.1:1/0",
    }
    worker = deployment.start_worker()
    with Fronts(deployment) as fronts:
        for changes in ({}, dead, half):
            ask_all(fronts.start(**changes), seen)
        worker.wait_warm()
        seen.environments += [child.environ() for child in descendants(worker.pid)]
        for fate in (JobStatus.SUCCEEDED, JobStatus.FAILED):
            train(deployment, worker.pid, fate, seen)
        infer(deployment, fronts.start(), seen)
    worker.stop()
    seen.logs |= {file.name: file.read_text() for file in deployment.settings.home.glob("*.log")}
    collect(deployment, seen)
    return seen


class Fronts:
    """APIs, each a process."""

    def __init__(self, deployment: Deployment) -> None:
        self.deployment = deployment
        self.processes: list[Process] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            process.stop()

    def start(self, **changes: str) -> str:
        port = reserve_port()
        name = f"api-{len(self.processes)}"
        process = Process(
            name,
            [sys.executable, "-m", "api", "--port", str(port)],
            environment={**self.deployment.environment, **changes},
            log=self.deployment.settings.home / f"{name}.log",
        )
        process.start()
        self.processes.append(process)
        url = f"http://127.0.0.1:{port}"
        deadline = time.monotonic() + 60
        while True:
            try:
                httpx.get(f"{url}/healthz")
            except httpx.TransportError:
                assert time.monotonic() < deadline, process.text()[-3000:]
                time.sleep(0.1)
            else:
                return url


def descendants(process_id: int) -> list[psutil.Process]:
    return psutil.Process(process_id).children(recursive=True)


def ask_all(url: str, seen: Seen) -> None:
    """Send what works, what is refused, and what no honest caller sends."""
    good = {"Authorization": f"Bearer {seen.key}", "X-Other": HEADER, "Cookie": f"a={HEADER}"}
    row = json.dumps({"messages": [{"role": "user", "content": BODY}]}).encode()
    line = json.dumps({
        "messages": [{"role": "user", "content": BODY}, {"role": "assistant", "content": "x"}]
    })
    upload = {"file": ("rows.jsonl", "\n".join([line] * 4).encode())}
    refused = {"file": (f"r{HOSTILE}.jsonl", row)}
    job = {"model": "tiny", "dataset": "ds_none", "name": BODY, "metadata": {"note": BODY}}
    wicked = {**job, "name": HOSTILE, "metadata": {HOSTILE: HOSTILE}}
    # The body tells the caller what was wrong with it; nothing else may.
    with httpx.Client(base_url=url, headers=good, timeout=60) as client:
        answers = [
            client.get(f"/jobs?cursor={QUERY}&limit={QUERY}&metadata[{QUERY}]={QUERY}"),
            client.get(f"/nothing?key={seen.key}"),
            client.get(f"/jobs/{seen.key}"),
            client.get("/jobs", params={"model": HOSTILE, "cursor": HOSTILE}),
            client.get(f"/jobs/x%0d%0a{INJECTED}%1b%5b31m%00"),
            client.get("/jobs", headers={"X-Request-Id": f"x%0a{INJECTED}\t{INJECTED}"}),
            client.get("/jobs", headers={"Authorization": f"Bearer {WRONG_KEY}"}),
            client.get("/jobs", headers={"Authorization": f"Basic {WRONG_KEY}"}),
            client.get("/jobs", headers={"Authorization": f"Bearer {seen.key[:-4]}aaaa"}),
            client.post("/jobs", json=job, headers={"Idempotency-Key": QUERY}),
            client.post("/jobs", json=wicked),
            client.post("/jobs", content=f'{{"{BODY}": '.encode()),
            client.post("/jobs/plan", json={"model": BODY, BODY: BODY}),
            client.post("/datasets", files=upload, data={"name": BODY}),
            client.post("/datasets", files=refused, data={"name": HOSTILE}),
            client.post("/infer", json={"model": "tiny", "prompt": HOSTILE, "adapter": HOSTILE}),
            client.get("/readyz"),
            client.get("/metrics"),
            client.get("/openapi.json"),
        ]
    assert any(answer.is_success for answer in answers)
    seen.answers += [f"{answer.headers} {answer.text}" for answer in answers]


def train(deployment: Deployment, worker: int, fate: JobStatus, seen: Seen) -> None:
    broken = {"layers": [{"name": "no.such.layer"}]} if fate is JobStatus.FAILED else None
    job = deployment.submit(max_steps=3, plan_changes=broken, max_attempts=1)
    done = deployment.wait(job, lambda job: job.status in {JobStatus.SUCCEEDED, JobStatus.FAILED})
    assert done.status == fate
    seen.environments += [child.environ() for child in descendants(worker)]


def infer(deployment: Deployment, url: str, seen: Seen) -> None:
    command = [sys.executable, "-m", "celery", "-A", "worker.app", "worker", "-Q", "infer.cpu"]
    command += ["--pool=threads", "-c", "4", "--without-gossip", "--without-mingle"]
    worker = Process(
        "infer",
        command,
        environment=deployment.environment,
        log=deployment.settings.home / "infer.log",
    )
    worker.start()
    headers = {"Authorization": f"Bearer {seen.key}"}
    asked = {"model": "tiny", "prompt": BODY, "max_new_tokens": 2}
    try:
        deadline = time.monotonic() + 120
        answer = httpx.Response(503)
        while answer.status_code != 200:
            assert time.monotonic() < deadline, (answer.text, worker.text()[-3000:])
            time.sleep(0.5)
            answer = httpx.post(f"{url}/infer", json=asked, headers=headers, timeout=120)
        seen.answers.append(answer.text)
        failing = httpx.post(
            f"{url}/infer", json={**asked, "adapter": "none"}, headers=headers, timeout=60
        )
        assert failing.status_code >= 400
        seen.answers.append(failing.text)
    finally:
        worker.stop()


def collect(deployment: Deployment, seen: Seen) -> None:
    """Read every table, every object and every key of the broker."""
    engine = create_engine_from(deployment.settings)
    with transaction(engine, read_only=True) as session:
        for table in Base.metadata.sorted_tables:
            seen.rows += f"{table.name}: {session.execute(select(table)).all()!r}\n"
    engine.dispose()
    objects = Objects(deployment.settings)
    seen.objects = {found.key: objects.get_bytes(found.key) for found in objects.list()}
    client = redis.Redis.from_url(deployment.settings.broker_url)
    for key in client.scan_iter(f"{deployment.settings.queue_prefix}*"):
        seen.broker += f"{key!r} {read(client, key)!r}\n"
    client.close()


def read(client: Any, key: bytes) -> object:
    match client.type(key):
        case b"string":
            return client.get(key)
        case b"list":
            return client.lrange(key, 0, -1)
        case b"hash":
            return client.hgetall(key)
        case b"set":
            return client.smembers(key)
        case b"zset":
            return client.zrange(key, 0, -1)
        case _:
            return client.xrange(key)


def hits(texts: Iterable[str], canaries: Iterable[str]) -> list[tuple[str, str]]:
    wanted = list(canaries)
    return [(each, text[:2000]) for text in texts for each in wanted if each in text]


def test_no_log_holds_a_secret_a_header_a_query_or_a_body(seen: Seen) -> None:
    assert {"api-0.log", "api-1.log", "api-2.log", "worker-0.log", "infer.log"} <= seen.logs.keys()
    lines = [line for text in seen.logs.values() for line in text.splitlines()]
    assert any('"status": 503' in line for line in lines), "no failure was logged"
    assert not hits(lines, [*seen.secrets, WRONG_KEY, HEADER, QUERY, BODY])


def test_no_answer_holds_a_secret_or_a_header(seen: Seen) -> None:
    # The caller may be shown the path that it asked for, and with it its own key.
    secrets = [each for each in seen.secrets if each not in seen.key]
    assert not hits(seen.answers, [*secrets, WRONG_KEY, HEADER])


def test_no_row_object_or_message_holds_a_secret(seen: Seen) -> None:
    assert "status_changed" in seen.rows
    assert any(key.endswith("log.txt") for key in seen.objects)
    assert any(key.endswith(".safetensors") for key in seen.objects)
    stored = [data.decode("latin-1") for data in seen.objects.values()]
    canaries = [*seen.secrets, WRONG_KEY, HEADER]
    assert not hits([seen.rows, seen.broker, *stored], canaries)
    logs = [data.decode() for key, data in seen.objects.items() if key.endswith("log.txt")]
    assert not hits(logs, [BODY, QUERY])


def test_the_training_process_is_given_no_secret(seen: Seen) -> None:
    assert len(seen.environments) >= 2
    told = [f"{name}={value}" for each in seen.environments for name, value in each.items()]
    assert not hits(told, seen.secrets)
    assert not [each for each in told if each.startswith(("GRIT_", "AWS_"))]
    assert any(each.startswith("PATH=") for each in told)


def test_what_users_write_never_begins_a_line_of_a_log(seen: Seen) -> None:
    for name, text in seen.logs.items():
        # As any reader of the file may split it.
        for line in text.replace("\u2028", "\n").replace("\x85", "\n").splitlines():
            assert not line.lstrip().startswith(INJECTED), (name, line)
        assert "\x1b" not in text
        assert "\x00" not in text
    for name in ("api-0.log", "api-1.log", "api-2.log"):
        for line in seen.logs[name].splitlines():
            assert isinstance(json.loads(line), dict), line


BAD_SETTINGS = [
    ("store", {"GRIT_LEASE_SECONDS": "1"}),
    ("api", {"GRIT_OBJECTS_URL": f"http://user:{OTHER}@host/"}),
    ("store", {"GRIT_DATABASE_URL": f"mysql://user:{OTHER}@host/x"}),
    ("store", {"GRIT_DATABASE_URL": f"postgresql+psycopg://user:{OTHER}@127.0.0.1:1/x"}),
    ("api", {"GRIT_DATABASE_URL": f"postgresql+psycopg://user:{OTHER}@127.0.0.1:port/x"}),
    ("store", {"GRIT_DATABASE_URL": f"{OTHER}@host"}),
    ("api", {"GRIT_DATABASE_URL": f"postgresql://user:{OTHER}/#?@%:@127.0.0.1:1/x"}),
    ("store", {"GRIT_BROKER_URL": f"redis://:/{OTHER}@127.0.0.1:1/0"}),
]


@pytest.mark.parametrize(("module", "changes"), BAD_SETTINGS, ids=range(len(BAD_SETTINGS)))
def test_a_process_that_cannot_start_shows_no_secret(
    changes: dict[str, str], module: str, tmp_path: Path
) -> None:
    secrets = {
        "GRIT_HOME": str(tmp_path),
        "GRIT_DATABASE_URL": f"postgresql+psycopg://u:{OTHER}@127.0.0.1:1/x",
        "GRIT_BROKER_URL": f"redis://:{OTHER}@127.0.0.1:1/0",
        "GRIT_S3_ACCESS_KEY_ID": "id",
        "GRIT_S3_SECRET_ACCESS_KEY": OTHER,
    }
    code = "from api.app import create_app; app = create_app(); print(app.state.services)"
    command = ["-c", code] if module == "api" else ["-m", "store", "keys", "list"]
    done = subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        env={**os.environ, **secrets, **changes},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.stdout + done.stderr
    assert OTHER not in done.stdout + done.stderr
