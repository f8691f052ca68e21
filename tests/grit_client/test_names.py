"""Names as well as ids, wherever a command takes an id."""

import json
from collections.abc import Callable
from typing import Any

import pytest

from store import attempts
from store.database import transaction
from store.ids import new_id
from tests.api.conftest import job_body
from tests.grit_client.conftest import Ran, Service

Cli = Callable[..., Ran]


@pytest.fixture(scope="module")
def ids(shared_service: Service) -> dict[str, Any]:
    """Make one thing of each kind that has a name of its own, and two that share one."""
    found: dict[str, Any] = {"adapter": new_id("adp")}
    with shared_service.client() as client:
        rows = shared_service.rows_file
        found["dataset"] = client.upload_dataset(rows(), name="digits")["id"]
        found["twins"] = [
            client.upload_dataset(rows(count), name="twins")["id"] for count in (11, 12)
        ]
        found["job"] = client.create_job(job_body(found["dataset"], name="digits"))["id"]
        with transaction(shared_service.services.engine) as session:
            claim = attempts.claim_next(session, queue="cpu", worker_id="w", lease_seconds=60)
            assert claim is not None
            adapter = attempts.NewAdapter(
                id=found["adapter"], prefix=f"adapters/{found['adapter']}", name="digits"
            )
            attempts.complete(
                session, job_id=found["job"], attempt=claim.attempt, adapter=adapter, result={}
            )
        found["key"] = client.create_key("laptop", scopes=["read"])["id"]
    return found


def test_a_name_does_what_its_id_does(cli: Cli, ids: dict[str, Any]) -> None:
    assert cli("job", "digits", "--json").json["id"] == ids["job"]
    assert cli("watch", "digits", "--json").json["id"] == ids["job"]
    assert cli("logs", "digits").code == 0
    assert cli("datasets", "show", "digits", "--json").json["id"] == ids["dataset"]
    assert cli("adapters", "show", "digits", "--json").json["id"] == ids["adapter"]
    assert [each["id"] for each in cli("adapters", "list", "--job", "digits", "--json").json] == [
        ids["adapter"]
    ]
    assert cli("keys", "revoke", "laptop", "--json").json == {"revoked": ids["key"]}
    assert cli("keys", "revoke", "laptop").code == 5


def test_a_job_file_names_a_dataset_by_its_name(
    cli: Cli, ids: dict[str, Any], shared_service: Service
) -> None:
    path = shared_service.folder / "named.json"
    path.write_text(json.dumps(job_body("digits", retention_dataset="twins")))
    assert "`twins` is a name: send the id" in cli("plan", path).err
    path.write_text(json.dumps(job_body("digits", eval_dataset="digits")))
    assert cli("plan", path, "--json").code == 0
    job = cli("submit", path, "--dataset", "digits", "--json").json
    assert job["dataset"] == ids["dataset"]


def test_a_name_of_several_is_answered_with_their_ids_newest_first(
    cli: Cli, ids: dict[str, Any]
) -> None:
    done = cli("datasets", "show", "twins")
    assert done.code == 5
    older, newer = ids["twins"]
    assert f"Newest first: {newer}, {older}." in done.err
    assert [each["id"] for each in cli("datasets", "list", "--name", "twins", "--json").json] == [
        newer,
        older,
    ]


def test_a_name_that_nothing_has_is_answered_with_the_nearest(
    cli: Cli, ids: dict[str, Any]
) -> None:
    done = cli("infer", "--adapter", "digist", "what?")
    assert done.code == 5
    assert "Did you mean digits?" in done.err
    wrong = cli("job", ids["dataset"])
    assert wrong.code == 5
    assert f"{ids['dataset']} is the id of a dataset; give the id or name of a job" in wrong.err
    adapter = cli("adapters", "show", ids["job"])
    assert f"{ids['job']} is the id of a job; give the id or name of an adapter." in adapter.err


def test_a_name_is_its_teams_own(cli: Cli, ids: dict[str, Any], shared_service: Service) -> None:
    from store import keys  # noqa: PLC0415 - needed here only
    from store.keys import Scope  # noqa: PLC0415 - as above

    assert ids
    with transaction(shared_service.services.engine) as session:
        _, key = keys.create_key(session, team="other", name="x", scopes={Scope.READ})
    for command in (("job", "digits"), ("datasets", "show", "digits")):
        done = cli(*command, "--key", key)
        assert done.code == 5
        assert "Did you mean" not in done.err
