"""The bad-input matrix (reliability.md, section 3), as far as this slice goes: never a 5xx."""

import json
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, cast

import pytest
from starlette.testclient import TestClient

from api.app import create_app
from store.keys import Scope
from store.settings import Settings
from tests.api.conftest import MODEL, Team, app_settings, job_body, new_team, opened
from tests.services import Postgres

if TYPE_CHECKING:
    from fastapi import FastAPI

PROBLEM = "application/problem+json"


@pytest.fixture(scope="module")
def client(postgres: Postgres, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    """One app for all: what is refused leaves nothing behind. PostgreSQL is the stricter one."""
    folder = tmp_path_factory.mktemp("bad-input")
    url = postgres.create("bad_input", template="grit_template")
    with (
        opened(app_settings(folder / "home", url)) as app,
        TestClient(app, raise_server_exceptions=False) as made,
    ):
        yield made
    postgres.drop("bad_input")


@pytest.fixture(scope="module")
def join(client: TestClient) -> Callable[..., Team]:
    return lambda name, *scopes: new_team(client, name, *scopes)


@pytest.fixture(scope="module")
def team(join: Callable[..., Team]) -> Team:
    return join("alpha")


@pytest.fixture(scope="module")
def dataset(team: Team) -> str:
    return team.dataset()


def check(answer: Any, status: int, code: str) -> dict[str, Any]:
    """Check a problem document: status, media type, code of the whole or of one fault."""
    assert answer.headers["Content-Type"] == PROBLEM, answer.text
    problem = dict(answer.json())
    codes = {problem["code"], *(fault["code"] for fault in problem["errors"])}
    assert (answer.status_code, code in codes) == (status, True), problem
    assert problem["status"] == status
    assert problem["request_id"] == answer.headers["X-Request-Id"]
    assert "Traceback" not in answer.text
    return problem


BODIES = [
    pytest.param(b"", 400, "body_missing", id="B9 empty"),
    pytest.param(b"{", 400, "json_invalid", id="B10 broken"),
    pytest.param(b'{"model": "x",}', 400, "json_invalid", id="B10 trailing comma"),
    pytest.param(b"[" * 33 + b"]" * 33, 400, "json_too_deep", id="B11 depth 33"),
    pytest.param(b"[" * 50_000, 400, "json_too_deep", id="B11 depth 50000"),
    pytest.param('{"model": "é"}'.encode("latin-1"), 400, "encoding_invalid", id="B12 latin-1"),
    pytest.param('{"model": "x"}'.encode("utf-16"), 400, "encoding_invalid", id="B12 utf-16"),
    pytest.param('{"model": "x"}'.encode("utf-16-le"), 400, "encoding_invalid", id="B12 le"),
    pytest.param('{"model": "x"}'.encode("utf-32"), 400, "encoding_invalid", id="B12 utf-32"),
    pytest.param(b'\xef\xbb\xbf{"model": "x"}', 400, "encoding_invalid", id="B12 BOM"),
    pytest.param(b'{"eval_fraction": NaN}', 400, "number_not_finite", id="B13 NaN"),
    pytest.param(b'{"eval_fraction": -Infinity}', 400, "number_not_finite", id="B13 Infinity"),
    pytest.param(b'{"eval_fraction": 1e400}', 400, "number_not_finite", id="B13 1e400"),
    pytest.param(b'{"priority": 9223372036854775808}', 422, "out_of_range", id="B14 64 bit"),
    pytest.param(b'{"priority": ' + b"9" * 5000 + b"}", 400, "json_invalid", id="B14 digits"),
    pytest.param(b'{"model": "a", "model": "b"}', 400, "json_duplicate_key", id="B15"),
    pytest.param(b'{"model": "\\ud800"}', 400, "encoding_invalid", id="B16 value"),
    pytest.param(b'{"\\udfff": 1}', 400, "encoding_invalid", id="B16 key"),
    pytest.param(b'{"\\ud800": {"\\ud800": "\\ud800"}}', 400, "encoding_invalid", id="B16 deep"),
    pytest.param(b"null", 422, "type_invalid", id="B20 null"),
    pytest.param(b"[]", 422, "type_invalid", id="B20 list"),
    pytest.param(b'"text"', 422, "type_invalid", id="B20 text"),
    pytest.param(b"\x00\x00\x00\x00", 400, "encoding_invalid", id="NULs"),
    pytest.param(b"\x80\x04\x95", 400, "encoding_invalid", id="a pickle"),
]


@pytest.mark.parametrize("path", ["/jobs", "/jobs/plan", "/infer", "/models"])
@pytest.mark.parametrize(("body", "status", "code"), BODIES)
def test_a_body_that_is_not_strict_json_is_refused(
    team: Team, path: str, body: bytes, status: int, code: str
) -> None:
    check(team.send(path, body), status, code)


FIELDS: list[Any] = [
    pytest.param({"name": "a\x00b"}, "value_invalid", "/name", id="B17 NUL"),
    pytest.param({"metadata": {"a": "b\x1b"}}, "value_invalid", "/metadata/a", id="B17 control"),
    pytest.param(
        {"config": {"model_name": "a\x00b"}}, "value_invalid", "/config/model_name", id="B17 config"
    ),
    pytest.param(
        {"config": {"text": {"layer_patterns": ["a\x00"]}}},
        "value_invalid",
        "/config/text/layer_patterns/0",
        id="B17 pattern",
    ),
    pytest.param({"trust_remote_code": True}, "field_unknown", "/trust_remote_code", id="B18"),
    pytest.param(
        {"config": {"text": {"n_layer": 2}}}, "field_unknown", "/config/text/n_layer", id="B18 deep"
    ),
    pytest.param({"a~/b": 1}, "field_unknown", "/a~0~1b", id="B18 escaped"),
    pytest.param({"priority": "8"}, "type_invalid", "/priority", id="B19 text"),
    pytest.param({"priority": True}, "type_invalid", "/priority", id="B19 true"),
    pytest.param({"priority": 8.0}, "type_invalid", "/priority", id="B19 float"),
    pytest.param({"auto_start": 1}, "type_invalid", "/auto_start", id="B19 one for true"),
    pytest.param({"model": 7}, "type_invalid", "/model", id="B19 number"),
    pytest.param({"training": []}, "type_invalid", "/training", id="B20"),
    pytest.param({"training": None}, "type_invalid", "/training", id="B20 null"),
    pytest.param({"model": "not/allowed"}, "model_not_allowed", "/model", id="B28 hub"),
    pytest.param({"model": "/etc"}, "model_not_allowed", "/model", id="B28 path"),
    pytest.param({"model": "allowed/x@main"}, "model_not_allowed", "/model", id="B28 revision"),
    pytest.param({"model": "https://x/y"}, "model_not_allowed", "/model", id="B28 URL"),
    pytest.param({"config": {"text": {"rank": 0}}}, "out_of_range", "/config/text/rank", id="B29"),
    pytest.param(
        {"config": {"text": {"rank": -1}}}, "out_of_range", "/config/text/rank", id="B29 negative"
    ),
    pytest.param(
        {"config": {"text": {"rank": 129}}}, "rank_too_large", "/config/text/rank", id="B29 layer"
    ),
    pytest.param(
        {"config": {"global_dropout": 1}}, "out_of_range", "/config/global_dropout", id="B31"
    ),
    pytest.param(
        {"training": {"learning_rate": 0}}, "out_of_range", "/training/learning_rate", id="B31 lr"
    ),
    pytest.param(
        {"training": {"warmup_ratio": 1.5}}, "out_of_range", "/training/warmup_ratio", id="B31 warm"
    ),
    pytest.param(
        {"config": {"text": {"layer_patterns": ["no.such.*"]}}},
        "no_layers_matched",
        "/config/text/layer_patterns/0",
        id="B33",
    ),
    pytest.param(
        {"training": {"max_steps": 10**12}}, "out_of_range", "/training/max_steps", id="B34"
    ),
    pytest.param(
        {"training": {"batch_size": "aut"}}, "type_invalid", "/training/batch_size", id="auto"
    ),
    pytest.param({"device": "tpu"}, "value_unknown", "/device", id="B36 unknown"),
    pytest.param({"device": "cuda"}, "device_unavailable", "/device", id="B36 not here"),
    pytest.param({"training": {"seed": -1}}, "out_of_range", "/training/seed", id="B37"),
    pytest.param({"dataset": "ds_unknown"}, "dataset_not_found", "/dataset", id="B39"),
    pytest.param({"eval_dataset": "ds_x"}, "dataset_not_found", "/eval_dataset", id="B39 eval"),
    pytest.param(
        {"retention_dataset": "ds_x"}, "dataset_not_found", "/retention_dataset", id="retention"
    ),
    pytest.param({"preset": "smolvlm_slow"}, "unknown_preset", "/preset", id="preset"),
    pytest.param({"metadata": {"a": 1}}, "type_invalid", "/metadata/a", id="metadata"),
    pytest.param(
        {"metadata": {str(n): "" for n in range(33)}}, "out_of_range", "/metadata", id="metadata 33"
    ),
    pytest.param({"vision_layers": []}, "out_of_range", "/vision_layers", id="no layers"),
    *(
        pytest.param(
            {"config": {"text": {"layer_patterns": [pattern]}}},
            code,
            "/config/text/layer_patterns/0",
            id=f"B32 {pattern[:12]}",
        )
        for pattern, code in (
            ("model.**.q_proj", "invalid_pattern"),
            ("(a+)+$", "invalid_pattern"),
            ("layers.[0-9].q", "invalid_pattern"),
            ("a..b", "invalid_pattern"),
            ("*a" * 200, "out_of_range"),
        )
    ),
    *(
        pytest.param({part: {field: value}}, None, f"/{part}/{field}", id=f"{row} {field} {value}")
        for row, part, field, value in (
            ("B29", "config", "global_rank", 10**6),
            ("B31", "config", "global_dropout", -0.1),
            ("B31", "config", "global_alpha", 0),
            ("B31", "training", "learning_rate", 1e6),
            ("B31", "training", "weight_decay", -1),
            ("B34", "training", "epochs", 10**9),
            ("B34", "training", "batch_size", 10**9),
            ("B34", "training", "gradient_accumulation_steps", 10**9),
            ("B34", "training", "max_length", 10**9),
            ("B37", "training", "seed", 2**63 - 1),
            ("B38", "config", "step_rule", "adamw?"),
        )
    ),
    pytest.param({"config": {"model_name": "x" * 600}}, None, "/config/model_name", id="long text"),
]


@pytest.mark.parametrize(("fields", "code", "pointer"), FIELDS)
def test_a_bad_field_is_named_with_its_pointer(
    team: Team, dataset: str, fields: dict[str, Any], code: str | None, pointer: str
) -> None:
    body = {**job_body(dataset), **fields}
    answer = team.post("/jobs", json=body)
    problem = check(answer, 422, code or problem_codes(answer)[0])
    faults = {fault["pointer"]: fault for fault in problem["errors"]}
    assert pointer in faults, problem["errors"]
    assert code in {None, faults[pointer]["code"]}
    assert faults[pointer]["detail"]
    assert team.get("/jobs").json()["data"] == []


def problem_codes(answer: Any) -> list[str]:
    return [fault["code"] for fault in answer.json()["errors"]]


def test_every_fault_of_a_schema_comes_in_one_answer(team: Team) -> None:
    body = {"model": 3, "config": {"text": {"rank": 0, "x": 1}}, "training": {"seed": "1"}}
    problem = check(team.post("/jobs", json=body), 422, "request_invalid")
    pointers = {fault["pointer"] for fault in problem["errors"]}
    assert pointers == {
        "/model",
        "/dataset",
        "/config/text/rank",
        "/config/text/x",
        "/training/seed",
    }


def test_every_fault_of_what_is_named_comes_in_one_answer(team: Team) -> None:
    body = {
        "model": MODEL,
        "dataset": "ds_x",
        "eval_dataset": "ds_y",
        "device": "mps",
        "config": {"text": {"layer_patterns": ["no.*"]}, "vision": {"strategy": "first_n"}},
    }
    problem = check(team.post("/jobs", json=body), 422, "request_invalid")
    codes = {(fault["pointer"], fault["code"]) for fault in problem["errors"]}
    assert ("/dataset", "dataset_not_found") in codes
    assert ("/eval_dataset", "dataset_not_found") in codes
    assert ("/device", "device_unavailable") in codes
    assert ("/config/text/layer_patterns/0", "no_layers_matched") in codes
    assert any(pointer.startswith("/config/vision") for pointer, _ in codes)


def test_what_is_echoed_is_short_and_no_secret(team: Team) -> None:
    secret = "hf_" + "a" * 30
    body = job_body(team.dataset(), device=secret[:32], preset="y" * 90, training={"seed": -5})
    problem = check(team.post("/jobs", json=body), 422, "request_invalid")
    shown = {fault["pointer"]: fault.get("input") for fault in problem["errors"]}
    assert shown["/training/seed"] == -5
    text = json.dumps([fault.get("input") for fault in problem["errors"]])
    assert secret[:32] not in text
    assert "y" * 90 not in text


@pytest.mark.parametrize(
    ("content_type", "status", "code"),
    [
        ("text/plain", 415, "unsupported_media_type"),
        ("", 415, "unsupported_media_type"),
        ("application/x-www-form-urlencoded", 415, "unsupported_media_type"),
        ("multipart/form-data; boundary=x", 415, "unsupported_media_type"),
        ("application/json; charset=utf-16", 400, "encoding_invalid"),
        ("application/jsonp", 415, "unsupported_media_type"),
    ],
)
def test_another_media_type_is_refused(
    team: Team, content_type: str, status: int, code: str
) -> None:
    check(team.send("/jobs", b"{}", content_type), status, code)


def test_a_body_beyond_its_bound_is_refused_by_its_length(team: Team) -> None:
    check(team.send("/jobs", b" " * 200_001), 413, "body_too_large")


def test_a_streamed_body_beyond_its_bound_is_refused_while_it_comes(team: Team) -> None:
    def chunks() -> Iterator[bytes]:
        for _ in range(30):
            yield b" " * 10_000

    headers = {"Content-Type": "application/json"}
    answer = team.post("/jobs", content=chunks(), headers=headers)
    check(answer, 413, "body_too_large")


@pytest.mark.parametrize(
    ("header", "status", "code"),
    [
        (None, 401, "auth_missing"),
        ("", 401, "auth_missing"),
        ("Basic YTpi", 401, "auth_missing"),
        ("Bearer", 401, "auth_missing"),
        ("Bearer nonsense", 401, "auth_invalid"),
        ("Bearer grit_0123456789ab_" + "x" * 43, 401, "auth_invalid"),
        ("Bearer " + "x" * 5000, 401, "auth_invalid"),
        (b"Bearer grit_\xff\xfe", 401, "auth_invalid"),
    ],
)
def test_a_missing_or_wrong_key_is_refused_before_the_body(
    team: Team, header: Any, status: int, code: str
) -> None:
    headers = {} if header is None else {"Authorization": header}
    answer = team.client.post("/jobs", content=b"{", headers=headers)
    check(answer, status, code)
    assert answer.headers["WWW-Authenticate"].startswith("Bearer")


def test_a_key_without_the_scope_is_refused(join: Callable[..., Team]) -> None:
    reader = join("alpha", Scope.READ)
    problem = check(reader.send("/jobs", b"{"), 403, "scope_missing")
    assert "write" in problem["detail"]
    assert reader.get("/jobs").status_code == 200


@pytest.mark.parametrize(
    "path",
    [
        "/nothing",
        "/jobs/unknown",
        "/jobs/" + "x" * 10_000,
        "/jobs/..%2f..%2fetc",
        "/jobs/%00",
        "/jobs/%ff",
        "/jobs/x/events",
        "/datasets/x",
        "/datasets/x/report",
        "/adapters/x",
        "/adapters/x/download",
        "/models/no/such/model",
        "/models/x/layers",
        "/presets/none",
        "/jobs/",
    ],
)
def test_what_is_not_there_is_not_found(team: Team, path: str) -> None:
    check(team.get(path), 404, "not_found")


def test_a_wrong_method_names_the_right_ones(team: Team) -> None:
    answer = team.request("PUT", "/jobs")
    check(answer, 405, "method_not_allowed")
    assert "POST" in answer.headers["Allow"]
    assert "GET" in answer.headers["Allow"]


@pytest.mark.parametrize("key", ["", "x" * 256, "\x01", "é"])
def test_a_bad_idempotency_key_is_refused(team: Team, key: str) -> None:
    headers = {"Idempotency-Key": key.encode("latin-1"), "Content-Type": "application/json"}
    answer = team.post("/jobs", content=json.dumps(job_body("ds_x")), headers=headers)
    check(answer, 400, "idempotency_key_invalid")


def test_a_dataset_that_was_rejected_cannot_be_trained_on(team: Team) -> None:
    dataset = team.upload(b'{"messages": []}\n').json()["dataset"]
    answer = team.post("/jobs", json=job_body(dataset))
    problem = check(answer, 409, "dataset_not_ready")
    assert problem["errors"][0]["pointer"] == "/dataset"


def test_a_folder_that_is_not_there_is_refused_at_once(team: Team) -> None:
    allowed = cast("FastAPI", team.client.app).state.services.settings.allowed_models[0]
    model = allowed.replace("*", "gone")
    answer = team.post("/jobs", json={**job_body(team.dataset()), "model": model})
    problem = check(answer, 422, "model_not_found")
    assert problem["errors"][0]["pointer"] == "/model"


def test_a_model_whose_layers_are_not_read_in_time_is_a_conflict(team: Team) -> None:
    answer = team.post("/jobs", json={**job_body(team.dataset()), "model": "allowed/new"})
    check(answer, 409, "model_not_ready")
    assert int(answer.headers["Retry-After"]) > 0
    models = {model["id"]: model["status"] for model in team.get("/models").json()["data"]}
    assert models["allowed/new"] == "registering"


def test_too_many_headers_are_refused(team: Team) -> None:
    many = {f"X-{index}": "x" for index in range(80)}
    check(team.get("/jobs", headers=many), 431, "headers_too_large")
    check(team.get("/jobs", headers={"X-Big": "x" * 20_000}), 431, "headers_too_large")


INFER: list[Any] = [
    ({"max_new_tokens": 0}, "out_of_range", "/max_new_tokens"),
    ({"max_new_tokens": 2049}, "out_of_range", "/max_new_tokens"),
    ({"temperature": 2.5}, "out_of_range", "/temperature"),
    ({"top_p": -0.1}, "out_of_range", "/top_p"),
    ({"n": 5}, "field_unknown", "/n"),
    ({"chat_template": "{{ x }}"}, "field_unknown", "/chat_template"),
    ({"images": ["http://127.0.0.1/x.png"]}, "image_url_not_allowed", "/images/0"),
    ({"images": ["file:///etc/passwd"]}, "image_url_not_allowed", "/images/0"),
    ({"images": ["data:image/png;base64,AAAA"]}, "image_format_not_allowed", "/images/0"),
    ({"images": ["data:image/png;base64,!"]}, "image_corrupt", "/images/0"),
    ({"images": ["data:image/svg+xml;base64,AAAA"]}, "image_format_not_allowed", "/images/0"),
    ({"images": ["x"] * 9}, "out_of_range", "/images"),
    ({"messages": []}, "out_of_range", "/messages"),
    ({"stream": 1}, "type_invalid", "/stream"),
    ({"model": "none/such"}, "model_not_found", "/model"),
    ({"seed": 2**63}, "out_of_range", "/seed"),
    ({"max_new_tokens": -1}, "out_of_range", "/max_new_tokens"),
    ({"temperature": -0.1}, "out_of_range", "/temperature"),
    ({"top_p": 1.5}, "out_of_range", "/top_p"),
    ({"stop": ["x"] * 9}, "out_of_range", "/stop"),
    *(
        ({name: value}, "field_unknown", f"/{name}")
        for name, value in (
            ("num_beams", 4),
            ("best_of", 2),
            ("chat_template_kwargs", {}),
            ("mm_processor_kwargs", {"size": 9}),
            ("guided_regex", "(a+)+$"),
            ("prompt_embeds", "AAAA"),
            ("logits_processors", ["os.system"]),
            ("trust_remote_code", True),
        )
    ),
]


@pytest.mark.parametrize(("fields", "code", "pointer"), INFER)
def test_a_bad_inference_request_is_refused(
    team: Team, fields: dict[str, Any], code: str, pointer: str
) -> None:
    body = {"model": MODEL, "prompt": "Is it grey?", **fields}
    problem = check(team.post("/infer", json=body), 422, code)
    assert pointer in {fault.get("pointer") for fault in problem["errors"]}


@pytest.mark.parametrize("moment", ["0", 0, 1e9, "1700000000", "2027-01-31", "tomorrow"], ids=repr)
def test_a_moment_is_written_out(join: Callable[..., Team], moment: Any) -> None:
    """A number would be seconds since 1970: an `expires_at` of "0" made a key that had ended."""
    admin = join("ops", Scope.ADMIN)
    body = {"name": "x", "scopes": ["read"], "expires_at": moment}
    problem = check(admin.post("/keys", json=body), 422, "value_invalid")
    assert problem["errors"][0]["pointer"] == "/expires_at"
    check(admin.get("/jobs", params={"created_after": moment}), 422, "value_invalid")


def test_an_inference_without_any_worker_is_told_at_once(team: Team) -> None:
    answer = team.post("/infer", json={"model": MODEL, "prompt": "Hello"})
    check(answer, 503, "no_inference_worker")
    assert answer.headers["Retry-After"]


def test_another_host_is_refused_when_hosts_are_named(tmp_path: Any) -> None:
    app = create_app(Settings(home=tmp_path, allowed_hosts=["grit.example"]))
    with TestClient(app, base_url="http://evil.example") as client:
        check(client.get("/healthz"), 400, "bad_request")
    with TestClient(app, base_url="http://grit.example:8000") as client:
        assert client.get("/healthz").status_code == 200
