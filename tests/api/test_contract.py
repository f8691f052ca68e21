"""Generated requests over the whole OpenAPI document: every answer is one that it describes.

Both kinds of requests are made of every operation: such as the document allows, and such as it
forbids. Ids of rows that are there are put into most of them, so that they reach what lies behind
"not found". `make fuzz` makes many more of them, with another seed each time.
"""

import json
import os
import random
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import pytest
import schemathesis
from fastapi import FastAPI
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode
from schemathesis.python import asgi
from schemathesis.specs.openapi import checks
from starlette.testclient import TestClient

from api.openapi import snapshot
from store import workers
from store.database import transaction
from store.inference import Mailbox
from store.keys import Scope
from store.settings import Settings
from tests.api.conftest import MODEL, app_settings, new_team, opened, rows
from tests.api.test_inference import ENDED
from tests.api.world import World

NUM_EXAMPLES: Final = int(os.environ.get("FUZZ_EXAMPLES", "15"))
"""Of each operation, in each mode."""
OTHER_TEAM: Final = "beta"
"""May be given any bounds: nobody asks in its name."""
OUT: Final = os.environ.get("FUZZ_OUT")
"""Where figures go."""
SEED: Final = int(os.environ.get("FUZZ_SEED", "5"))
CHECKS: Final = [
    schemathesis.checks.not_a_server_error,
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_headers_conformance,
    checks.response_schema_conformance,
    checks.negative_data_rejection,
]
SCHEMA = schemathesis.openapi.from_dict(
    snapshot(),
    # Unknown parameters of the query are passed over, and the key is this test's own.
    config=schemathesis.Config.from_dict({
        "generation": {"allow-extra-parameters": False, "with-security-parameters": False},
        # A body may break its schema by its size as well.
        "checks": {
            "negative_data_rejection": {"expected-statuses": [400, 404, 409, 413, 415, 422]}
        },
    }),
)
OPERATIONS = {found.ok().label: found.ok() for found in SCHEMA.get_all_operations()}


class Caller:
    """A client of the app, with rows to name."""

    def __init__(self, app: FastAPI, session: asgi.ASGIClient, world: World) -> None:
        self.app, self.session, self.world = app, session, world
        self.statuses: dict[str, set[int]] = {}
        self.num_requests = self.num_rejections = 0

    def send(self, case: schemathesis.Case, chance: random.Random) -> None:
        name = case.operation.label
        body_is_ours = self._name_rows(case, chance)
        if case.operation.method == "get" and chance.random() < 0.3:
            case.headers["Accept"] = chance.choice(["text/event-stream", "text/csv", "text/html"])
        if case.query.get("wait") is not None:
            case.query["wait"] = 0  # nothing will happen in that time
        answer = case.call(session=self.session, app=self.app, headers=self.world.team.headers)
        self.num_requests += 1
        self.num_rejections += answer.status_code >= 400
        self.statuses.setdefault(name, set()).add(answer.status_code)
        # Numbers in a query are read as leniently as text is: "+0.0" is 0 there.
        lenient = body_is_ours or not case.operation.body
        left_out = [checks.negative_data_rejection] if lenient else []
        if answer.headers.get("content-type", [""])[0].startswith("text/event-stream"):
            # The document describes the stream as the text that it is; this check takes the
            # schema for that of each event.
            left_out.append(checks.response_schema_conformance)
            assert answer.text.count("data: ") >= 1
        case.validate_response(answer, checks=CHECKS, excluded_checks=left_out)

    def figures(self) -> dict[str, Any]:
        """What came of all requests."""
        return {
            "requests": self.num_requests,
            "rejections": self.num_rejections,
            "server_errors": sum(max(each) >= 500 for each in self.statuses.values()),
            "statuses": {name: sorted(each) for name, each in self.statuses.items()},
        }

    def _name_rows(self, case: schemathesis.Case, chance: random.Random) -> bool:
        """Put rows that are there in place of most of what was made up."""
        is_write = case.operation.method.upper() != "GET"
        path = case.path_parameters
        for name in path or ():
            if chance.random() < 0.8:
                team = case.operation.path.startswith("/teams/")
                path[name] = OTHER_TEAM if team else self._row(name, chance, fresh=is_write)
        body = case.body
        # What is drawn changes with any text of our code, so that success is not left to chance.
        is_first = case.operation.label not in self.statuses
        if not isinstance(body, dict) or (not is_first and chance.random() < 0.3):
            return False
        num_kept = 0 if is_first else chance.randrange(3)
        kept = chance.sample(sorted(body), min(len(body), num_kept))
        case.body = self._good_body(case.operation.path) | {
            name: self._row(name, chance, fresh=False) if name in FIELDS else body[name]
            for name in kept
        }
        return True

    def _good_body(self, path: str) -> dict[str, Any]:
        """Return a body that is taken."""
        turns = [{"role": "user", "content": "Is it grey?"}]
        dataset = self.world.dataset
        job = {"model": MODEL, "dataset": dataset, "preset": "smolvlm_fast"}
        return {
            "/adapters": {"file": [self.world.adapter_archive], "model": MODEL},
            "/datasets": {"file": rows(1)},
            "/v1/files": {"file": rows(1), "purpose": "fine-tune"},
            "/infer": {"model": MODEL, "prompt": "Is it grey?"},
            "/v1/chat/completions": {"model": MODEL, "messages": turns},
            "/v1/fine_tuning/jobs": {"model": MODEL, "training_file": dataset},
            "/jobs": job,
            "/jobs/plan": job,
            "/adapters/{adapter_id}/compress": {"dataset": dataset},
            "/models": {"id": "allowed/one"},
            "/keys": {"name": "x", "scopes": ["read"]},
        }.get(path, {})

    def _row(self, name: str, chance: random.Random, *, fresh: bool) -> str:
        world = self.world
        kind = FIELDS[name]
        if kind == "job":
            if fresh and chance.random() < 0.5:
                return world.new_job(auto_start=chance.random() < 0.5)
            return chance.choice(world.jobs if fresh else world.ended_jobs)
        if kind == "dataset":
            return world.new_dataset() if fresh else chance.choice(world.datasets)
        if kind == "adapter":
            return world.new_adapter() if fresh else world.adapter
        if kind == "deletable":
            return world.new_adapter() if fresh else chance.choice([MODEL, world.adapter])
        base = world.new_model() if fresh and kind == "base" else MODEL
        return {"base": base, "preset": "smolvlm_fast", "key": world.new_key()}[kind]


FIELDS: Final = {
    "job_id": "job",
    "fine_tuning_job_id": "job",
    "job": "job",
    "adapter": "adapter",
    "adapter_id": "adapter",
    "dataset_id": "dataset",
    "file_id": "dataset",
    "dataset": "dataset",
    "eval_dataset": "dataset",
    "retention_dataset": "dataset",
    "training_file": "dataset",
    "validation_file": "dataset",
    "model": "deletable",
    "model_id": "base",
    "preset": "preset",
    "name": "preset",
    "key_id": "key",
}
"""What the parameters and the fields name."""


@contextmanager
def answering(wired: Settings, app: FastAPI) -> Iterator[None]:
    """Play an inference worker that has one answer for all."""
    with transaction(app.state.services.engine) as session:
        workers.register_worker(
            session, hostname="here", process_id=2, queues=["infer.cpu"], device="cpu"
        )
    ended = threading.Event()

    def work() -> None:
        mailbox = Mailbox(wired)
        while not ended.is_set():
            if (taken := mailbox.take_next("cpu")) is None:
                ended.wait(0.002)
                continue
            mailbox.answer(taken["id"], {"delta": "one", "at": 0})
            mailbox.answer(taken["id"], ENDED)
        mailbox.close_sync()

    thread = threading.Thread(target=work)
    thread.start()
    yield
    ended.set()
    thread.join(10)


@pytest.fixture(scope="module")
def caller(
    sqlite_template: Path, tmp_path_factory: pytest.TempPathFactory, valkey: str
) -> Iterator[Caller]:
    folder = tmp_path_factory.mktemp("contract")
    shutil.copy(sqlite_template, folder / "grit.db")
    wired = app_settings(folder / "home", f"sqlite:///{folder}/grit.db")
    wired = wired.model_copy(
        update={
            "broker_url": valkey,
            "queue_prefix": "contract:",
            "inventory_wait_seconds": 0.05,
            "max_open_jobs": 10**6,
            "rate_requests_per_minute": 0,
            "rate_submissions_per_minute": 0,
            "rate_team_requests_per_minute": 0,
            "rate_team_submissions_per_minute": 0,
        }
    )
    with opened(wired) as app, TestClient(app) as client, answering(wired, app):
        team = new_team(client, "alpha", *Scope)
        new_team(client, OTHER_TEAM)
        world = World(team, app.state.services, folder)
        with asgi.get_client(app) as session:
            made = Caller(app, session, world)
            yield made
    if OUT:
        Path(OUT).write_text(json.dumps({"seed": SEED, **made.figures()}, indent=1) + "\n")


def can_be_wrong(name: str) -> bool:
    """Whether a request can break the schema of an operation: a path of any text cannot."""
    operation = OPERATIONS[name]
    return bool(operation.body or operation.query or operation.headers)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "mode"),
    [
        pytest.param(name, mode, id=f"{name} {mode.value}")
        for name in OPERATIONS
        for mode in GenerationMode
        if mode is GenerationMode.POSITIVE or can_be_wrong(name)
    ],
)
def test_every_answer_is_one_that_the_document_describes(
    caller: Caller, name: str, mode: GenerationMode
) -> None:
    @seed(SEED)
    @settings(
        max_examples=NUM_EXAMPLES,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=OPERATIONS[name].as_strategy(generation_mode=mode), chance=st.randoms())
    def check(case: schemathesis.Case, chance: random.Random) -> None:
        caller.send(case, chance)

    check()


def test_every_operation_came_to_its_success(caller: Caller) -> None:
    missed = {name: found for name, found in caller.statuses.items() if min(found) >= 300}
    assert missed == {}
