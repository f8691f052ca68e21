"""The load benchmark: its rows, its requests and its reading of wrk are what they say."""

from collections import Counter

import psycopg
import pytest
from sqlalchemy import make_url

from benchmarks.load import rows, slopes, wrk
from benchmarks.load.ratios import read, submit
from benchmarks.load.rows import NUM_TEAMS, SHARES, Filled, fill, job_id, status_of
from grit_core.job_spec import resolve_job
from store.ids import is_id, new_id
from tests.services import Postgres


def database(num_jobs: int = 1000) -> Filled:
    names = tuple(f"token-{number}" for number in range(NUM_TEAMS))
    return Filled(url="", num_jobs=num_jobs, tokens=names, datasets=names)


def test_ids_are_well_formed_and_sort_by_number_before_all_that_are_made_now() -> None:
    made = [job_id(number) for number in (1, 2, 999, 1000, 1_000_000)]

    assert made == sorted(made)
    assert made[-1] < new_id("job")
    assert all(is_id(one, "job") for one in made)


def test_statuses_have_their_shares_in_every_team() -> None:
    found = Counter(status_of(number) for number in range(7, 50_000, NUM_TEAMS))

    assert found["queued"] == 15
    assert found["succeeded"] == 800
    assert set(found) == set(SHARES)


def test_the_request_of_the_benchmark_can_be_planned() -> None:
    resolved = resolve_job(
        rows.job_body("smolvlm-256m", "ds"), rows.inventory(), num_rows=100, device="cpu"
    )

    assert resolved is not None
    assert len(resolved.plan.layers) == 16


def test_jobs_are_asked_for_with_the_key_of_their_team() -> None:
    ours, bare = read(database())

    assert ours[6].path == f"/jobs/{job_id(7)}"
    assert ours[6].token == "token-7"
    assert [ask.path for ask in bare] == [ask.path for ask in ours]


def test_every_team_submits_with_its_own_key_and_dataset() -> None:
    asks, _ = submit(database())

    assert len({ask.token for ask in asks}) == NUM_TEAMS
    assert all(f'"dataset": "{ask.token}"' in ask.body for ask in asks)


def test_a_request_that_would_break_its_line_is_refused() -> None:
    assert wrk.Ask(path="/a", token="t", body="{}").line() == "GET\t/a\tt\t{}"
    with pytest.raises(ValueError, match="no tabs"):
        wrk.Ask(path="/a\nGET").line()


def test_what_wrk_told_is_read_and_silence_is_an_error() -> None:
    line = (
        '{"requests": 10, "seconds": 2.0, "bytes": 500, "refused": 1, "failed": 0, "timeouts": 0,'
        ' "p50_seconds": 0.1, "p99_seconds": 0.2, "mean_seconds": 0.1, "max_seconds": 0.3}'
    )

    told = wrk.read_told(f"Running 2s test\n{line}\n")

    assert (told.per_second, told.bytes_each, told.refused) == (5.0, 50.0, 1)
    with pytest.raises(RuntimeError, match="told nothing"):
        wrk.read_told("Running 2s test\n")


def test_the_paths_of_the_slopes_reach_deep_into_the_list() -> None:
    paths = slopes.requests_of(database(10_000))

    assert paths["list, from the middle"] != paths["list, the last page"]
    assert len(paths["GET /jobs/{id}"]) >= slopes.NUM_ASKED


@pytest.mark.slow
def test_a_filled_database_has_the_rows_that_the_benchmark_asks_for(postgres: Postgres) -> None:
    url = postgres.create("load")
    try:
        filled = fill(url, num_jobs=2000)
        address = make_url(url).set(drivername="postgresql").render_as_string()
        with psycopg.connect(address) as connection:
            found = connection.execute("SELECT id, team, status FROM jobs ORDER BY id").fetchall()
    finally:
        postgres.drop("load")

    assert [row[0] for row in found] == [job_id(number) for number in range(1, 2001)]
    assert [row[1] for row in found] == [f"team-{n % NUM_TEAMS}" for n in range(1, 2001)]
    assert [row[2] for row in found] == [status_of(number) for number in range(1, 2001)]
    assert len(filled.tokens) == NUM_TEAMS
