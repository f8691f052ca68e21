"""Generated requests under `/v1`: never a 5xx, never an error of another form."""

import json
from collections.abc import Iterator
from typing import Any
from urllib.parse import quote

import pytest
from fastapi import FastAPI
from hypothesis import given
from hypothesis import strategies as st
from starlette.testclient import TestClient

from api.openai.schemas.chat import ChatCompletionRequest
from api.openai.schemas.fine_tuning import FineTuningJobCreate, GritOptions
from tests.api.conftest import MODEL, Team, new_team
from tests.api.test_fuzz import FUZZ, JSON

pytestmark = pytest.mark.slow

HELLO = [{"role": "user", "content": "Hello?"}]
CHAT = st.dictionaries(
    st.sampled_from([*ChatCompletionRequest.model_fields, "x"]), JSON, max_size=4
)
OWN = st.dictionaries(st.sampled_from([*GritOptions.model_fields, "x"]), JSON, max_size=3)
JOB = st.dictionaries(
    st.sampled_from([*FineTuningJobCreate.model_fields, "x"]), JSON | OWN, max_size=4
)
PATHS = ("models", "files", "fine_tuning/jobs", "fine_tuning/jobs/x/events", "files/x/content")


@pytest.fixture
def api_database_url(postgres_url: str) -> str:
    """PostgreSQL refuses what SQLite stores, such as NUL in text."""
    return postgres_url


@pytest.fixture
def caller(app: FastAPI) -> Iterator[Team]:
    with TestClient(app, raise_server_exceptions=False) as made:
        yield new_team(made, "alpha")


def check(answer: Any) -> None:
    if answer.status_code < 400:
        return
    error = answer.json()["error"]
    assert answer.headers["Content-Type"] == "application/json"
    assert error.keys() == {"message", "type", "param", "code"}
    assert isinstance(error["message"], str)
    assert error["param"] is None or isinstance(error["param"], str)
    assert answer.status_code < 500 or error["code"] == "no_inference_worker", answer.text
    assert answer.status_code != 422


def send(caller: Team, path: str, body: Any) -> Any:
    return caller.send(path, json.dumps(body).encode("utf-8", "surrogatepass"))


@FUZZ
@given(fields=CHAT)
def test_any_chat_is_answered_or_refused(caller: Team, fields: dict[str, Any]) -> None:
    check(send(caller, "/v1/chat/completions", {"model": MODEL, "messages": HELLO, **fields}))


@FUZZ
@given(fields=JOB)
def test_any_job_is_created_or_refused(caller: Team, fields: dict[str, Any]) -> None:
    body = {"model": MODEL, "training_file": "ds_none", **fields}
    check(send(caller, "/v1/fine_tuning/jobs", body))


@FUZZ
@given(
    path=st.sampled_from(PATHS),
    name=st.sampled_from(["limit", "after", "order", "purpose", "metadata[a]", "metadata"]),
    value=st.text(st.characters(exclude_categories=["Cs"]), max_size=20) | st.integers().map(str),
)
def test_any_query_is_answered_or_refused(caller: Team, path: str, name: str, value: str) -> None:
    check(caller.get(f"/v1/{path}", params={name: value}))


@FUZZ
@given(name=st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20))
def test_any_name_is_found_or_refused(caller: Team, name: str) -> None:

    for kind in ("models", "files", "fine_tuning/jobs"):
        check(caller.get(f"/v1/{kind}/{quote(name, safe='')}"))


@FUZZ
@given(body=st.binary(max_size=200), purpose=st.text(max_size=10) | st.just("fine-tune"))
def test_any_upload_is_taken_or_refused(caller: Team, body: bytes, purpose: str) -> None:
    files, data = {"file": ("x.jsonl", body)}, {"purpose": purpose}
    check(caller.post("/v1/files", files=files, data=data))
    check(caller.send("/v1/files", body, "multipart/form-data; boundary=x"))
