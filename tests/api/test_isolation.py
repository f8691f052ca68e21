"""A team sees its own rows alone; every route has a rule, and every id a case here."""

import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast
from urllib.parse import quote

import pytest
from fastapi import APIRouter, FastAPI
from fastapi.routing import APIRoute
from starlette.testclient import TestClient

from api.app import ROUTES
from api.auth import PUBLIC, access_of
from api.openapi import snapshot
from api.routing import ServiceRoute, ServiceRouter
from api.services import Services
from store import adapters
from store.database import transaction
from store.keys import Scope
from store.models import AdapterOrigin
from store.pages import encode_cursor
from tests.api.conftest import MODEL, Team, app_settings, job_body, new_team, opened

ALL_ROUTES = [route for module in ROUTES for route in module.router.routes]
SHARED = {"model_id", "name"}
"""Ids that belong to no team: base models and presets."""
DOCUMENT = snapshot()
SCHEMAS = DOCUMENT["components"]["schemas"]
NAMING: dict[str, tuple[str, ...]] = {
    "model": ("model",),  # an adapter's id, where a model may be an adapter, and everywhere else
    "dataset": ("dataset_id",),
    "eval_dataset": ("dataset_id",),
    "retention_dataset": ("dataset_id",),
    "training_file": ("file_id",),
    "validation_file": ("file_id",),
    "adapter": ("adapter_id",),
    "job": ("job_id",),
    "cursor": ("job_id", "dataset_id", "adapter_id"),
    "after": ("job_id", "dataset_id"),
}
"""Fields of bodies and of queries that name a team's rows, and what they name."""
WORDS = {
    *("name", "suffix", "team", "user", "metadata", "plan_hash", "device", "preset", "purpose"),
    *("model_name", "model_type", "layer_patterns", "text_layers", "vision_layers"),
    *(
        "cross_modal_layers",
        "prompt",
        "content",
        "refusal",
        "text",
        "url",
        "images",
        "stop",
        "file",
    ),
    *("created_after", "created_before", "expires_at", "id", "since", "source"),
    *("tool_call_id", "arguments", "description"),  # of calls of tools
}
"""Those that name no row of a team: words, times, patterns, and what administrators register."""
RIVALS = {"adapter": ("model",), "job": ("model",)}
"""Fields that may not stand beside another."""
UPLOADS = {"/adapters", "/datasets", "/v1/files"}
LISTS = ["/jobs", "/datasets", "/adapters", "/v1/files", "/v1/fine_tuning/jobs", "/v1/models"]
ALIKE = {"/models", "/presets", "/devices", "/schema/job"}
"""What reads the same for every team."""
OWN = {"/team"}
"""What a team reads of itself."""
BODIES: dict[str, dict[str, Any]] = {"/adapters/{adapter_id}/compress": {}}
"""What the routes that want a body are sent."""


def cases() -> list[Any]:
    found = []
    for route in ALL_ROUTES:
        if not isinstance(route, APIRoute):
            continue
        if access_of(route.endpoint) in {Scope.ADMIN, PUBLIC}:
            # Administrators see every team's keys and quotas; what needs no key is no team's.
            continue
        names = {field.name for field in route.dependant.path_params}
        shared = SHARED if route.path.startswith(("/models/", "/presets/")) else set()
        for name in names - shared:
            found += [
                pytest.param(method, route.path, name, id=f"{method} {route.path}")
                for method in route.methods
            ]
    return found


@pytest.fixture(scope="module")
def client(sqlite_template: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    """One app for all: strangers change nothing."""
    folder = tmp_path_factory.mktemp("isolation")
    shutil.copy(sqlite_template, folder / "grit.db")
    with (
        opened(app_settings(folder / "home", f"sqlite:///{folder}/grit.db")) as app,
        TestClient(app, raise_server_exceptions=False) as made,
    ):
        yield made


@pytest.fixture(scope="module")
def services(client: TestClient) -> Services:
    found: Services = cast("FastAPI", client.app).state.services
    return found


@pytest.fixture(scope="module")
def join(client: TestClient) -> Callable[..., Team]:
    return lambda name, *scopes: new_team(client, name, *scopes)


@pytest.fixture(scope="module")
def owned(join: Callable[..., Team], services: Services) -> dict[str, str]:
    """One row of each kind, of another team."""
    owner = join("owner")
    job = owner.job()
    with transaction(services.engine) as session:
        adapter = adapters.create_adapter(
            session, team="owner", origin=AdapterOrigin.IMPORT, model=MODEL, prefix="adapters/x/"
        )
    return {
        "job_id": job["id"],
        "dataset_id": job["dataset"],
        "adapter_id": adapter.id,
        "fine_tuning_job_id": job["id"],
        "file_id": job["dataset"],
        "model": adapter.id,
    }


@pytest.mark.parametrize(("method", "path", "name"), cases())
def test_another_teams_row_is_not_found(
    join: Callable[..., Team], owned: dict[str, str], method: str, path: str, name: str
) -> None:
    assert name in owned, f"a new kind of id {name!r}: make one of it in `owned`"
    stranger = join("stranger", *Scope)
    body = BODIES.get(path)
    plain = path.replace(":path}", "}")
    real = stranger.request(method, plain.replace(f"{{{name}}}", owned[name]), json=body)
    unknown = owned[name][:-4] + "0000"
    other = stranger.request(method, plain.replace(f"{{{name}}}", unknown), json=body)
    assert real.status_code == other.status_code == 404
    code, detail = code_and_words(real)
    assert code == ("model_not_found" if name == "model" else "not_found")
    assert detail.replace(owned[name], unknown) == code_and_words(other)[1]


def code_and_words(answer: Any) -> tuple[str, str]:
    """Of a problem, in either form."""
    found = answer.json()
    if answer.request.url.path.startswith("/v1/"):
        return found["error"]["code"], found["error"]["message"]
    return found["code"], found["detail"]


@pytest.mark.parametrize("path", LISTS)
def test_a_list_holds_the_teams_own_rows(
    join: Callable[..., Team], owned: dict[str, str], path: str
) -> None:
    assert owned
    stranger = join("lister", *Scope)
    seen = stranger.get(path)
    assert seen.status_code == 200
    assert not [value for value in owned.values() if value in seen.text]
    assert "owner" not in seen.text
    own = join("owner", *Scope).get(path)
    assert [value for value in owned.values() if value in own.text]


@pytest.mark.parametrize("accept", ["text/event-stream", "text/csv", "*/*"])
@pytest.mark.parametrize(
    "path",
    [
        *("/jobs/{}/events", "/jobs/{}/metrics", "/jobs/{}?wait=1", "/jobs/{}/manifest"),
        *("/jobs/{}/logs", "/jobs/{}/logs?attempt=1&tail_bytes=10"),
    ],
)
def test_no_form_of_an_answer_shows_another_teams_job(
    join: Callable[..., Team], owned: dict[str, str], path: str, accept: str
) -> None:
    answer = join("stranger", *Scope).get(
        path.format(owned["job_id"]), headers={"Accept": accept, "If-None-Match": "*"}
    )
    assert (answer.status_code, answer.json()["code"]) == (404, "not_found")


@pytest.mark.parametrize("query", ["layout=vllm", "layout=vllm&language_only=true", "layout=peft"])
def test_no_layout_of_a_download_shows_another_teams_adapter(
    join: Callable[..., Team], owned: dict[str, str], query: str
) -> None:
    answer = join("stranger").get(f"/adapters/{owned['adapter_id']}/download?{query}")
    assert (answer.status_code, answer.json()["code"]) == (404, "not_found")


# --- ids inside of bodies and queries


def texts_of(schema: Any, place: str = "") -> Iterator[str]:
    """Places of all free texts that a schema allows: any of them might name a row."""
    if "$ref" in schema:
        yield from texts_of(SCHEMAS[schema["$ref"].rpartition("/")[2]], place)
    for kind in ("anyOf", "oneOf", "allOf"):
        for each in schema.get(kind, []):
            yield from texts_of(each, place)
    if schema.get("type") == "string" and not {"enum", "const"} & schema.keys():
        yield place
    for name, each in schema.get("properties", {}).items():
        yield from texts_of(each, f"{place}/{name}")
    for kind in ("items", "additionalProperties"):
        if isinstance(schema.get(kind), dict):
            yield from texts_of(schema[kind], f"{place}/*")


def texts() -> dict[str, set[str]]:
    """By operation: the free texts of its body (as pointers) and of its query (as `?name`)."""
    found: dict[str, set[str]] = {}
    for path, methods in DOCUMENT["paths"].items():
        for method, operation in methods.items():
            places = found.setdefault(f"{method.upper()} {path}", set())
            for media in operation.get("requestBody", {}).get("content", {}).values():
                places.update(texts_of(media["schema"]))
            for each in operation.get("parameters", []):
                if each["in"] == "query" and list(texts_of(each["schema"])):
                    places.add(f"?{each['name']}")
    return found


def route_of(operation: str) -> APIRoute:
    method, path = operation.split(" ")
    return next(
        route
        for route in ALL_ROUTES
        if isinstance(route, APIRoute)
        and route.path.replace(":path}", "}") == path
        and method in route.methods
    )


def naming_cases() -> list[tuple[str, str, str]]:
    """Every place of a body or a query that names rows of a team, with the kind of the row."""
    return [
        (operation, place, kind)
        for operation, places in texts().items()
        for place in sorted(places)
        for kind in NAMING.get(place.rpartition("/")[2].lstrip("?"), ())
        if access_of(route_of(operation).endpoint) != Scope.ADMIN
    ]


def test_every_text_of_a_request_either_names_rows_or_does_not() -> None:
    """A new field has to be looked at: it goes to `NAMING`, and has its cases, or to `WORDS`."""
    last = {
        place.rpartition("/")[2].lstrip("?") if not place.endswith("/*") else place.split("/")[-2]
        for places in texts().values()
        for place in places
    }
    assert last <= NAMING.keys() | WORDS, "say in NAMING or in WORDS what this names"


@pytest.mark.parametrize(
    ("operation", "place", "kind"),
    naming_cases(),
    ids=[" ".join(each) for each in naming_cases()],
)
def test_naming_another_teams_row_says_what_an_unknown_one_says(
    join: Callable[..., Team], owned: dict[str, str], operation: str, place: str, kind: str
) -> None:
    stranger = join("namer", *Scope)
    known = owned[kind]
    unknown = known[:-4] + "0000"
    real, other = (ask(stranger, operation, place, value) for value in (known, unknown))
    assert real.status_code == other.status_code
    assert without_ids(real.text).replace(known, unknown) == without_ids(other.text)
    if place.startswith("?"):
        assert real.status_code in {200, 400, 422}
        assert not [value for value in owned.values() if value in without_ids(real.text, known)]
    else:
        assert real.status_code in {400, 404, 422}


def ask(team: Team, operation: str, place: str, value: str) -> Any:
    """Send a request that is good but for one place."""
    method, path = operation.split(" ")
    if place.startswith("?"):
        sent = encode_cursor(value) if place == "?cursor" else value
        return team.request(method, path.format(**own_ids(team)), params={place[1:]: sent})
    body = good_body(team, path)
    steps = place.split("/")[1:]
    inner = body
    for step in steps[:-1]:
        inner = inner.setdefault(step, {})
    for rival in RIVALS.get(steps[-1], ()):
        inner.pop(rival, None)
    inner[steps[-1]] = value
    path = path.format(**own_ids(team))
    if path in UPLOADS:
        files = {"file": ("adapter.zip", b"PK\x05\x06" + bytes(18))}
        return team.request(method, path, files=files, data=body)
    return team.request(method, path, json=body)


_own: dict[str, dict[str, str]] = {}


def own_ids(team: Team) -> dict[str, str]:
    """Rows of the caller's own, for the places that are not the case's."""
    if team.name not in _own:
        job = team.job()
        services = cast("FastAPI", team.client.app).state.services
        with transaction(services.engine) as session:
            adapter = adapters.create_adapter(
                session, team=team.name, origin=AdapterOrigin.IMPORT, model=MODEL, prefix="a/y/"
            )
        team.delete(f"/jobs/{job['id']}")
        _own[team.name] = {
            "job_id": job["id"],
            "fine_tuning_job_id": job["id"],
            "adapter_id": adapter.id,
            "dataset": job["dataset"],
        }
    return _own[team.name]


def good_body(team: Team, path: str) -> dict[str, Any]:
    dataset = own_ids(team)["dataset"]
    bodies: dict[str, dict[str, Any]] = {
        "/jobs": job_body(dataset),
        "/jobs/plan": job_body(dataset),
        "/infer": {"model": MODEL, "prompt": "x"},
        "/adapters": {"model": MODEL},
        "/adapters/{adapter_id}/compress": {},
        "/v1/chat/completions": {"messages": [{"role": "user", "content": "x"}]},
        "/v1/fine_tuning/jobs": {"model": MODEL, "training_file": dataset},
    }
    assert path in bodies, f"a new route {path!r} names rows in its body: give it a good body"
    return bodies[path]


def without_ids(text: str, *sent: str) -> str:
    """What an answer says beside the id of the request, and what its caller said."""
    for each in sent:
        text = text.replace(each, "")
    return re.sub(r"req_[0-9a-f]{24}", "", text)


def elsewhere() -> list[str]:
    """Names that lead out of a folder, in the spellings that have worked somewhere."""
    up = [
        "../",
        "..\\",
        "%2e%2e%2f",
        "%252e%252e%252f",
        "..%c0%af",
        "....//",
        "..;/",
        "\uff0e\uff0e/",
    ]
    ends = ["etc/passwd", "grit.db", "objects/x", "key"]
    found = [step * depth + end for step in up for depth in (1, 3, 9) for end in ends]
    found += [
        f"{head}/{end}" for head in ("", "/", "//x", "file://", "C:", "~", ".") for end in ends
    ]
    found += [f"{kind}_{'0' * 26}{tail}" for kind in ("ds", "job", "adp") for tail in TAILS]
    return found


TAILS = [
    "",
    "/..",
    "/../../grit.db",
    ".jsonl",
    "\x00",
    "%00",
    "\n",
    "' OR '1'='1",
    "*",
    "?x",
    "#",
    " ",
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("operation", "place"),
    sorted({(operation, place) for operation, place, _ in naming_cases()}),
    ids=lambda text: text,
)
def test_no_name_leads_elsewhere(join: Callable[..., Team], operation: str, place: str) -> None:
    namer = join("namer", *Scope)
    for name in elsewhere()[len(operation + place) % 4 :: 4]:
        answer = ask(namer, operation, place, name)
        assert answer.status_code in {200, 400, 404, 422}, (name, answer.text)
        assert answer.status_code != 200 or (place.startswith("?") and "root:" not in answer.text)


@pytest.mark.slow
@pytest.mark.parametrize(("method", "path", "name"), cases())
def test_no_id_in_a_path_leads_elsewhere(
    join: Callable[..., Team], method: str, path: str, name: str
) -> None:
    namer = join("namer", *Scope)
    plain = path.replace(":path}", "}")
    for text in elsewhere()[len(method + path) % 4 :: 4]:
        answer = namer.request(
            method, plain.replace(f"{{{name}}}", quote(text, safe="")), json=BODIES.get(path)
        )
        assert answer.status_code in {400, 404, 405, 422}, (text, answer.text)


def test_an_idempotency_key_of_another_team_reveals_nothing(
    join: Callable[..., Team], owned: dict[str, str]
) -> None:
    owner, stranger = join("owner"), join("repeater")
    headers = {"Idempotency-Key": "the owner's"}
    body = job_body(owned["dataset_id"])
    first = owner.post("/jobs", json=body, headers=headers)
    assert first.status_code == 201
    same = stranger.post("/jobs", json=body, headers=headers)
    fresh = stranger.post("/jobs", json=body, headers={"Idempotency-Key": "nobody's"})
    assert same.status_code == fresh.status_code == 422
    assert without_ids(same.text) == without_ids(fresh.text)
    own = {"model": MODEL, "training_file": stranger.dataset()}
    for path in ("/v1/fine_tuning/jobs", "/jobs"):
        mine = own if path.startswith("/v1") else job_body(own["training_file"])
        made = stranger.post(path, json=mine, headers=headers)
        assert made.status_code in {200, 201}
        assert "Idempotent-Replayed" not in made.headers
        assert made.json()["id"] != first.json()["id"]
    again = owner.post("/jobs", json=body, headers=headers)
    assert again.json()["id"] == first.json()["id"]


def test_every_reading_without_an_id_is_a_list_of_the_teams_own_rows_or_alike_for_all() -> None:
    found = {
        route.path
        for route in ALL_ROUTES
        if isinstance(route, APIRoute)
        and "GET" in route.methods
        and not route.dependant.path_params
        and access_of(route.endpoint) not in {PUBLIC, Scope.ADMIN}
    }
    assert found == ALIKE | OWN | set(LISTS)


def test_every_route_is_ours_and_has_a_rule() -> None:
    assert all(isinstance(route, ServiceRoute) for route in ALL_ROUTES)
    public = {
        route.path
        for route in ALL_ROUTES
        if isinstance(route, APIRoute) and access_of(route.endpoint) == PUBLIC
    }
    assert public == {
        "/healthz",
        "/readyz",
        "/metrics",
        "/version",
        "/docs",
        "/docs/{name}",
    }


def test_a_new_route_without_a_rule_is_refused_at_its_making() -> None:
    router = ServiceRouter("test")
    with pytest.raises(LookupError, match="no access rule"):

        @router.get("/forgotten")
        def forgotten() -> None: ...


def test_the_app_has_no_routes_but_these(client: TestClient) -> None:
    app = cast("FastAPI", client.app)
    plain = APIRouter()
    assert not plain.routes
    own = {getattr(route, "path", None) for route in app.routes} - {None}
    assert own <= {"/openapi.json", *(getattr(route, "path", "") for route in ALL_ROUTES)}


@pytest.mark.parametrize(
    ("method", "path"),
    [
        pytest.param(method, route.path, id=f"{method} {route.path}")
        for route in ALL_ROUTES
        if isinstance(route, APIRoute) and access_of(route.endpoint) != PUBLIC
        for method in route.methods
    ],
)
def test_no_route_answers_without_a_key_or_with_the_wrong_scope(
    join: Callable[..., Team], method: str, path: str
) -> None:
    team = join("alpha", Scope.READ)
    assert team.client.request(method, path).status_code == 401
    route = next(
        each
        for each in ALL_ROUTES
        if isinstance(each, APIRoute) and each.path == path and method in each.methods
    )
    lacking = {Scope.READ, Scope.WRITE, Scope.INFER} - {access_of(route.endpoint)}
    weak = join("weak", *(Scope(scope) for scope in lacking))
    assert weak.request(method, path).status_code == 403
