"""What people mistype, and what `grit` says then: every output is on record and was read.

`WRITE_MISTAKES=1 pytest tests/grit_client/mistakes` writes the record again; read the
difference before it is committed.
"""

import json
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from store import attempts, lifecycle
from store.database import transaction
from store.ids import new_id
from store.keys import Scope, create_key
from store.models import JobStatus
from tests.api.conftest import job_body, png, rows
from tests.grit_client.conftest import Service, running_service
from tests.grit_client.mistakes.transcript import (
    Case,
    faults_said_twice,
    read_cases,
    run_case,
    write_cases,
)

WRITES = bool(os.environ.get("WRITE_MISTAKES"))
MAX_LINES = 6
CASES = read_cases()


@dataclass(frozen=True, kw_only=True)
class World:
    """A service with a few datasets, jobs and keys, and a folder with a newcomer's files."""

    folder: Path
    environment: dict[str, str]
    shown: dict[str, str]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("newcomer")
    with running_service(folder, allowed_models=["HuggingFaceTB/*"]) as service:
        named = {**_populate(service), "URL": service.url}
        _write_files(folder, named["DATASET"])
        folders = f"{Path(sys.executable).parent}:/usr/bin:/bin"
        environment = {"PATH": folders, "HOME": str(folder), "LANG": "C.UTF-8", **named}
        shown = {service.url.removeprefix("http://"): "127.0.0.1:8000"}
        shown |= {text: f"${name}" for name, text in named.items() if name != "URL"}
        shown[str(folder)] = "~"
        yield World(folder=folder, environment=environment, shown=shown)


def _populate(service: Service) -> dict[str, str]:
    """Fill a service; return the ids that the transcript names by variables."""
    services = service.services
    with service.client() as client:
        ids = {"DATASET": client.upload_dataset(service.rows_file(), name="grey")["id"]}
        for number in (1, 2):
            file = service.rows_file(10 + number)
            ids[f"TWIN_{number}"] = client.upload_dataset(file, name="twins")["id"]
        first = client.create_job(job_body(ids["DATASET"], name="first"))["id"]
        with transaction(services.engine) as session:
            claim = attempts.claim_next(session, queue="cpu", worker_id="w", lease_seconds=60)
            assert claim is not None
            ids["ADAPTER"] = new_id("adp")
            adapter = attempts.NewAdapter(
                id=ids["ADAPTER"], prefix=f"adapters/{ids['ADAPTER']}", name="first"
            )
            attempts.complete(
                session, job_id=first, attempt=claim.attempt, adapter=adapter, result={}
            )
        ids["JOB"] = first
        ids["CANCELLED"] = client.create_job(job_body(ids["DATASET"], name="second"))["id"]
        ids["QUEUED"] = client.create_job(job_body(ids["DATASET"], name="third"))["id"]
    ids["READER"] = service.key_with(Scope.READ)
    with transaction(services.engine) as session:
        lifecycle.transition(session, ids["CANCELLED"], to=JobStatus.CANCELLED)
        ids["STRANGER"] = create_key(
            session, team="other", name="other", scopes={Scope.READ, Scope.WRITE, Scope.INFER}
        )[1]
        ids["EXPIRED"] = create_key(
            session,
            team="default",
            name="old",
            scopes={Scope.READ},
            expires_at=datetime.now(UTC) - timedelta(days=1),
        )[1]
    return ids


def _write_files(folder: Path, dataset: str) -> None:
    body = job_body(dataset)
    (folder / "job.json").write_text(json.dumps(body, indent=2) + "\n")
    (folder / "digit.png").write_bytes(png())
    (folder / "photo.heic").write_bytes(b"\0\0\0\x18ftypheic" + b"\0" * 64)
    (folder / "huge.png").write_bytes(png() + b"\0" * 21 * 1024**2)
    lines = rows(3).decode().splitlines()
    (folder / "comma.jsonl").write_text("\n".join([f"{lines[0]},", *lines[1:]]))
    (folder / "role.jsonl").write_text("\n".join(lines).replace('"assistant"', '"bot"', 1))


@pytest.mark.skipif(WRITES, reason="the record is written, not compared")
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.title)
def test_a_mistake_is_answered_as_on_record(world: World, case: Case) -> None:
    ran = run_case(case, folder=world.folder, environment=world.environment, shown=world.shown)
    assert str(ran) == str(case)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.title)
def test_an_answer_to_a_mistake_is_short_and_says_each_fault_once(case: Case) -> None:
    assert len(case.output.splitlines()) <= MAX_LINES
    assert case.code != 0
    assert "Traceback" not in case.output
    assert not list(faults_said_twice(case.output))


def test_the_record_holds_thirty_mistakes_or_more() -> None:
    assert len(CASES) >= 30
    assert len({case.title for case in CASES}) == len(CASES)


@pytest.mark.skipif(not WRITES, reason="only with WRITE_MISTAKES=1")
def test_the_record_is_written_again(world: World) -> None:
    write_cases([
        run_case(case, folder=world.folder, environment=world.environment, shown=world.shown)
        for case in CASES
    ])
