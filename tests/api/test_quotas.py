"""Uploads beyond a team's bytes: refused early, told why, and nothing of them stays."""

from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import update

from api.intake import upload as uploading
from api.services import Services
from store.database import transaction
from store.errors import QuotaExceeded
from store.models import Team as TeamRow
from tests.api.conftest import Team, job_body, rows

DATASET = {"files": {"file": ("rows.jsonl", rows(3))}}
FILE = {**DATASET, "data": {"purpose": "fine-tune"}}


def bound(services: Services, size: int | None) -> None:
    with transaction(services.engine) as session:
        session.execute(update(TeamRow).values(max_stored_bytes=size))


def objects(services: Services) -> list[Path]:
    folder = Path(services.settings.objects_url.removeprefix("file://"))
    return [path for path in folder.rglob("*") if path.is_file()]


@pytest.mark.parametrize(
    ("path", "options"),
    [("/datasets", DATASET), ("/v1/files", FILE), ("/adapters", DATASET)],
    ids=["datasets", "files", "adapters"],
)
def test_an_upload_beyond_the_bytes_is_refused_by_its_length_alone(
    team: Team, services: Services, path: str, options: dict[str, Any]
) -> None:
    bound(services, 1000)

    def body() -> Any:
        yield b"not read"

    # The declared length is enough: the body is never asked for.
    headers = {"Content-Type": "multipart/form-data; boundary=x", "Content-Length": "5000000"}
    answer = team.post(path, content=body(), headers=headers)
    assert answer.status_code == 429
    assert answer.headers["Connection"] == "close"
    # Patience does not help, and clients are told so.
    assert answer.headers["X-Should-Retry"] == "false"
    assert int(answer.headers["Retry-After"]) >= 3600
    told = answer.json()
    problem = told["error"] if path.startswith("/v1/") else told
    assert problem["code"] == "quota_exceeded"
    words = problem.get("message") or problem["detail"]
    assert "0 of at most 1000 stored bytes" in words
    assert "would add" in words
    assert options
    assert objects(services) == []


@pytest.mark.parametrize(("path", "options"), [("/datasets", DATASET), ("/v1/files", FILE)])
def test_an_upload_that_grows_beyond_the_bytes_is_refused_before_it_is_stored(
    team: Team, services: Services, path: str, options: dict[str, Any]
) -> None:
    bound(services, 100)  # the form's own size is not counted, so the length alone does not tell
    answer = team.post(path, **options)
    assert answer.status_code == 429, answer.text
    assert objects(services) == []
    bound(services, 100_000)
    assert team.post(path, **options).status_code in {200, 201}
    assert len(objects(services)) == 1


def test_a_full_team_is_told_what_to_delete_and_has_room_afterwards(
    team: Team, services: Services
) -> None:
    dataset = team.dataset(3)
    size = team.get(f"/datasets/{dataset}").json()["size_bytes"]
    bound(services, size)
    for answer in (team.upload(rows(1)), team.post("/jobs", json=job_body(dataset))):
        assert (answer.status_code, answer.json()["code"]) == (429, "quota_exceeded")
        assert f"{dataset} ({size} bytes)" in answer.json()["detail"]
    assert team.delete(f"/datasets/{dataset}").status_code == 204
    assert team.upload(rows(1)).status_code == 201


def test_an_upload_that_loses_the_race_for_the_last_bytes_leaves_no_object(
    team: Team, services: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = team.dataset(2)
    # Another upload is recorded between this one's look and its row.
    monkeypatch.setattr(uploading, "refuse_upload", lambda *_, **__: bound(services, 1))
    assert team.upload(rows(5)).status_code == 429
    assert len(objects(services)) == 1
    # What a dataset has stays, also if an equal upload is refused.
    assert team.upload(rows(2)).status_code == 429
    assert len(objects(services)) == 1
    assert team.get(f"/v1/files/{kept}/content").status_code == 200


def test_the_deployments_bound_holds_for_teams_without_one(
    team: Team, services: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(services.settings.__dict__, "max_stored_bytes", 50)
    answer = team.upload(rows(3))
    assert (answer.status_code, answer.json()["code"]) == (429, "quota_exceeded")
    assert str(QuotaExceeded("alpha", quota="stored bytes", value=0, bound=50))[:30] in answer.text
