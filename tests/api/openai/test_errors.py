"""Every error under `/v1` is OpenAI's, whoever raises it; the root paths keep problem documents."""

import httpx
import openai
import pytest

from api.errors import KINDS, Item, Problem
from api.openai.errors import dotted, error_of, status_of
from store.keys import Scope
from tests.api.openai.conftest import Server


def test_a_wrong_key_is_an_authentication_error(server: Server) -> None:
    with pytest.raises(openai.AuthenticationError) as refused:
        server.client("any", api_key="grit_none").models.list()
    assert refused.value.code == "invalid_api_key"
    assert refused.value.type == "invalid_request_error"
    assert refused.value.param is None
    assert refused.value.response.headers["WWW-Authenticate"]
    assert refused.value.request_id == refused.value.response.headers["X-Request-Id"]


def test_a_key_without_the_scope_is_a_permission_error(server: Server) -> None:
    with pytest.raises(openai.PermissionDeniedError) as refused:
        server.client("any", Scope.INFER).models.list()
    assert (refused.value.code, refused.value.type) == ("scope_missing", "permission_error")


@pytest.mark.parametrize(
    ("method", "path", "content", "status", "code"),
    [
        ("GET", "/v1", None, 404, "not_found"),
        ("GET", "/v1/embeddings", None, 404, "not_found"),
        ("PUT", "/v1/files", None, 405, "method_not_allowed"),
        ("POST", "/v1/fine_tuning/jobs", b"{", 400, "json_invalid"),
        ("POST", "/v1/fine_tuning/jobs", b"", 400, "body_missing"),
        ("POST", "/v1/fine_tuning/jobs", b'{"a":1,"a":2}', 400, "json_duplicate_key"),
        ("POST", "/v1/fine_tuning/jobs", b"{}", 400, "missing_required_parameter"),
        ("POST", "/v1/fine_tuning/jobs", b" " * 200_001, 413, "body_too_large"),
        ("GET", "/v1/files?limit=0", None, 400, "invalid_value"),
        ("POST", "/v1/files", b"{}", 415, "unsupported_media_type"),
    ],
)
def test_what_is_refused_before_a_route_is_reached_has_the_form(
    server: Server, method: str, path: str, content: bytes | None, status: int, code: str
) -> None:
    headers = {
        "Authorization": f"Bearer {server.key('any')}",
        "Content-Type": "application/json",
    }
    answer = httpx.request(method, server.url + path, content=content, headers=headers)
    assert answer.status_code == status
    assert answer.headers["Content-Type"] == "application/json"
    assert answer.json().keys() == {"error"}
    assert answer.json()["error"].keys() == {"message", "type", "param", "code"}
    assert answer.json()["error"]["code"] == code
    if status == 405:
        assert answer.headers["Allow"] == "GET, HEAD, POST"


def test_headers_beyond_the_bound_have_the_form(server: Server) -> None:
    answer = httpx.get(f"{server.url}/v1/models", headers={"X-Much": "x" * 20_000})
    assert (answer.status_code, answer.json()["error"]["code"]) == (431, "headers_too_large")


@pytest.mark.parametrize("path", ["/v1x", "/jobs", "/nothing"])
def test_the_root_paths_keep_problem_documents(server: Server, path: str) -> None:
    answer = httpx.get(server.url + path)
    assert answer.headers["Content-Type"] == "application/problem+json"


def test_every_kind_of_problem_has_a_status_that_the_clients_know() -> None:
    for code, kind in KINDS.items():
        assert status_of(code) == (400 if kind.status == 422 else kind.status)


def test_all_faults_are_told_and_the_first_is_named() -> None:
    faults = [
        Item(code="out_of_range", detail="Too hot.", pointer="/temperature"),
        Item(code="field_unknown", detail="No such field.", pointer="/x"),
    ]
    problem = Problem("request_invalid", "The request has 2 faults.", errors=faults)
    assert error_of(problem) == {
        "message": "The request has 2 faults. Too hot. No such field.",
        "type": "invalid_request_error",
        "param": "temperature",
        "code": "invalid_value",
    }


def test_a_long_list_of_faults_is_cut_and_counted() -> None:
    faults = [Item(code="row_invalid", detail="Bad.", line=line) for line in range(1, 13)]
    found = error_of(Problem("dataset_rejected", "12 rows cannot be used.", errors=faults))
    assert found["message"].startswith("12 rows cannot be used. Line 1: Bad. Line 2: Bad.")
    assert found["message"].endswith("Line 10: Bad. And 2 more.")


@pytest.mark.parametrize(
    ("pointer", "place"),
    [
        ("/messages/0/content/1", "messages[0].content[1]"),
        ("/grit/config/text/rank", "grit.config.text.rank"),
        ("/a~1b", "a/b"),
        ("", ""),
    ],
)
def test_pointers_are_written_as_openai_does(pointer: str, place: str) -> None:
    assert dotted(pointer) == place
