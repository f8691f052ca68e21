"""Generated requests: never a 5xx, never an error that is no problem document."""

import json
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from api.schemas.jobs import JobCreate
from tests.api.conftest import MODEL, Team, job_body, row

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=True)
    | st.text(max_size=20)
    | st.sampled_from(["auto", "cpu", MODEL, "ds_", "\x00", "\ud800", "9" * 40]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["text", "vision", "rank", "n_layers", "strategy", "type", "x"])
            | st.text(max_size=5),
            inner,
            max_size=3,
        )
    ),
    max_leaves=8,
)
JOB = st.dictionaries(st.sampled_from([*JobCreate.model_fields, "unknown"]), JSON, max_size=4)
INFER = st.dictionaries(
    st.sampled_from(["model", "adapter", "job", "prompt", "messages", "images", "stop", "seed"]),
    JSON | st.just(MODEL),
    max_size=6,
)
FUZZ = settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@pytest.fixture
def api_database_url(postgres_url: str) -> str:
    """PostgreSQL refuses what SQLite stores, such as NUL in text."""
    return postgres_url


def check(answer: Any) -> None:
    assert answer.status_code < 500 or answer.json()["code"] == "no_inference_worker", answer.text
    if answer.status_code >= 400:
        assert answer.headers["Content-Type"] == "application/problem+json"
        assert answer.json()["code"]


def send(team: Team, path: str, body: Any) -> Any:
    return team.send(path, json.dumps(body).encode("utf-8", "surrogatepass"))


@pytest.mark.slow
@FUZZ
@given(fields=JOB)
def test_any_job_is_created_or_refused_with_a_problem(team: Team, fields: dict[str, Any]) -> None:
    check(send(team, "/jobs", {**job_body("ds_none"), **fields}))
    check(send(team, "/jobs/plan", fields))


@pytest.mark.slow
@FUZZ
@given(fields=INFER)
def test_any_inference_is_answered_or_refused_with_a_problem(
    team: Team, fields: dict[str, Any]
) -> None:
    check(send(team, "/infer", {"model": MODEL, **fields}))


@pytest.mark.slow
@FUZZ
@given(
    path=st.sampled_from(["/jobs", "/datasets", "/adapters", "/models", "/jobs/x/metrics"]),
    name=st.sampled_from(["limit", "cursor", "status", "created_after", "metadata[a]", "wait"]),
    value=st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
    | st.integers().map(str)
    | st.datetimes().map(str),
)
def test_any_query_is_answered_or_refused_with_a_problem(
    team: Team, path: str, name: str, value: str
) -> None:
    check(team.get(path, params={name: value}))


@pytest.mark.slow
@settings(FUZZ, max_examples=15)
@given(body=st.binary(max_size=200))
def test_any_upload_is_taken_or_refused_with_a_problem(team: Team, body: bytes) -> None:
    check(team.upload(body))
    check(team.send("/datasets", body, "multipart/form-data; boundary=x"))


NUL = [
    b'{"messages": [{"role": "user", "content": "x", "a\\u0000b": 1}]}\n',
    b'{"messages": [], "a\\u0000b": 1}\n',
    b'{"messages": [{"role": "a\\u0000b", "content": "x"}]}\n',
]


@pytest.mark.parametrize("body", NUL, ids=["key", "column", "value"])
@pytest.mark.parametrize("policy", ["reject", "skip"])
def test_a_report_takes_names_that_postgresql_does_not(
    team: Team, body: bytes, policy: str
) -> None:
    good = json.dumps({**row(), "a\x00b": 1}).encode() + b"\n"
    answer = team.upload(body + good, on_bad_rows=policy)
    check(answer)
    dataset = answer.json().get("dataset") or answer.json()["id"]
    assert team.get(f"/datasets/{dataset}/report").json()["errors"]
