"""Jobs that are looked up together: each caller gets its own, and nobody another team's."""

import asyncio
import json
from collections.abc import Sequence

import pytest
from fastapi import FastAPI
from starlette.testclient import TestClient

from store.errors import NotFound
from tests.api.conftest import new_team


@pytest.fixture(params=["sqlite", "postgresql"])
def api_database_url(request: pytest.FixtureRequest) -> str:
    name = "postgres_url" if request.param == "postgresql" else "sqlite_url"
    return str(request.getfixturevalue(name))


def test_requests_of_one_moment_get_each_its_own_job(app: FastAPI, client: TestClient) -> None:
    team, other = new_team(client, "one"), new_team(client, "other")
    dataset = team.dataset()
    ids = [team.job(dataset=dataset)["id"] for _ in range(3)]
    foreign = other.job()["id"]
    reads = app.state.job_reads

    async def ask(wanted: Sequence[str]) -> list[object]:
        looks = (reads.read(job_id, team="one") for job_id in wanted)
        return list(await asyncio.gather(*looks, return_exceptions=True))

    found = asyncio.run(ask([*ids, foreign, "job_none", ids[0]] * 20))

    for place, seen in enumerate(found):
        if place % 6 in {3, 4}:
            assert isinstance(seen, NotFound)
        else:
            assert json.loads(seen.data)["id"] == ids[place % 6 % 5]  # type: ignore[attr-defined]


def test_a_job_reads_as_it_was_created(client: TestClient) -> None:
    team = new_team(client, "one")
    made = team.job(metadata={"b": "1", "a": "2"}, name="mine")

    assert team.get(f"/jobs/{made['id']}").json() == made
    assert team.get("/jobs").json()["data"][0] == {
        **made,
        "queue": {"name": "auto:cuda,mps,cpu", "position": None, "reason": None},
    }
