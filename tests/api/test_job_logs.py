"""The log of an attempt: its end, of the team's own jobs, and honest where there is none."""

from typing import Any

import pytest

from api.services import Services
from store import attempts
from store.attempt_logs import CHUNK_BYTES, chunk_key
from store.database import transaction
from store.ids import new_id
from store.orphans import log_key
from store.retries import Failure, RetryPolicy
from tests.api.conftest import Team


@pytest.fixture
def job(team: Team) -> str:
    return str(team.job()["id"])


def claim(services: Services) -> int:
    with transaction(services.engine) as session:
        found = attempts.claim_next(
            session, queue="cpu", worker_id=new_id("wrk"), lease_seconds=600
        )
    assert found is not None
    return found.attempt


def fail(services: Services, job: str, attempt: int) -> None:
    with transaction(services.engine) as session:
        attempts.fail(
            session,
            job_id=job,
            attempt=attempt,
            failure=Failure(code="stalled", message="No step.", retryable=True),
            policy=RetryPolicy(backoff_first_seconds=1e-9),
        )


def state(answer: Any) -> tuple[int, str, str, str]:
    headers = answer.headers
    return (
        answer.status_code,
        headers["X-Log-Attempt"],
        headers["X-Log-State"],
        headers["X-Log-Bytes"],
    )


def test_a_log_is_empty_until_its_attempt_ends_and_says_so(
    team: Team, services: Services, job: str
) -> None:
    answer = team.get(f"/jobs/{job}/logs")
    assert (state(answer), answer.text) == ((200, "0", "none", "0"), "")
    attempt = claim(services)
    answer = team.get(f"/jobs/{job}/logs")
    assert (state(answer), answer.text) == ((200, "1", "running", "0"), "")
    services.objects.put_bytes(log_key(job, attempt), b"one\ntwo\n")
    fail(services, job, attempt)
    answer = team.get(f"/jobs/{job}/logs")
    assert (state(answer), answer.text) == ((200, "1", "complete", "8"), "one\ntwo\n")
    assert answer.headers["Content-Type"] == "text/plain; charset=utf-8"


def test_each_attempt_has_its_log_and_the_newest_is_shown(
    team: Team, services: Services, job: str
) -> None:
    for text in (b"first\n", b"second\n"):
        attempt = claim(services)
        services.objects.put_bytes(log_key(job, attempt), text)
        fail(services, job, attempt)
    lost = claim(services)
    fail(services, job, lost)
    assert state(team.get(f"/jobs/{job}/logs"))[1:3] == ("3", "none")
    assert team.get(f"/jobs/{job}/logs?attempt=1").text == "first\n"
    assert team.get(f"/jobs/{job}/logs?attempt=2").text == "second\n"
    missing = team.get(f"/jobs/{job}/logs?attempt=4")
    assert (missing.status_code, missing.json()["code"]) == (404, "not_found")


@pytest.mark.parametrize(
    ("tail_bytes", "shown"),
    [(100, "eins\nzwölf\ndrei\n"), (17, "eins\nzwölf\ndrei\n"), (16, "zwölf\ndrei\n"),
     (9, "drei\n"), (3, "ei\n"), (1, "\n")],
)  # fmt: skip
def test_the_end_of_a_log_is_shown_in_whole_lines(
    team: Team, services: Services, job: str, tail_bytes: int, shown: str
) -> None:
    services.objects.put_bytes(log_key(job, claim(services)), "eins\nzwölf\ndrei\n".encode())
    assert team.get(f"/jobs/{job}/logs?tail_bytes={tail_bytes}").text == shown


def test_bytes_that_are_no_text_do_not_break_the_answer(
    team: Team, services: Services, job: str
) -> None:
    services.objects.put_bytes(log_key(job, claim(services)), b"\xff\xfe\x1b[31m\x00")
    answer = team.get(f"/jobs/{job}/logs")
    assert answer.status_code == 200
    assert answer.text == "\ufffd\ufffd\x1b[31m\x00"
    assert answer.headers["X-Content-Type-Options"] == "nosniff"


@pytest.mark.parametrize(
    "query", ["attempt=0", "attempt=-1", "attempt=x", "tail_bytes=0", "tail_bytes=4194305"]
)
def test_a_bad_query_is_refused(team: Team, job: str, query: str) -> None:
    assert team.get(f"/jobs/{job}/logs?{query}").status_code == 422


def test_a_log_is_its_teams_own(services: Services, job: str, join: Any) -> None:
    services.objects.put_bytes(log_key(job, claim(services)), b"ours\n")
    other = join("other").get(f"/jobs/{job}/logs?attempt=1")
    assert (other.status_code, other.json()["code"]) == (404, "not_found")
    assert "ours" not in other.text


def test_a_log_that_grows_is_read_from_an_offset_on(
    team: Team, services: Services, job: str
) -> None:
    attempt = claim(services)
    services.objects.put_bytes(chunk_key(job, attempt, 0), b"one\ntw")
    first = team.get(f"/jobs/{job}/logs?offset=0")
    assert (state(first), first.text) == ((200, "1", "running", "6"), "one\n")
    services.objects.put_bytes(chunk_key(job, attempt, 0), b"one\ntwo\n")
    second = team.get(f"/jobs/{job}/logs?offset={first.headers['X-Log-Next']}")
    assert (second.text, second.headers["X-Log-Next"]) == ("two\n", "8")
    last = team.get(f"/jobs/{job}/logs?offset=8")
    assert (last.text, last.headers["X-Log-Next"]) == ("", "8")
    assert team.get(f"/jobs/{job}/logs").text == "one\ntwo\n"
    assert team.get(f"/jobs/{job}/logs?offset=8&tail_bytes=3").status_code == 422


def test_what_was_stored_of_an_attempt_that_was_lost_is_kept(
    team: Team, services: Services, job: str
) -> None:
    attempt = claim(services)
    services.objects.put_bytes(chunk_key(job, attempt, 0), b"one\ntw")
    fail(services, job, attempt)
    answer = team.get(f"/jobs/{job}/logs")
    assert (state(answer), answer.text) == ((200, "1", "partial", "6"), "one\ntw")


def test_a_long_log_that_grows_is_one_text(team: Team, services: Services, job: str) -> None:
    attempt = claim(services)
    line = b"a line of thirty-two characters\n"
    text = line * (CHUNK_BYTES // len(line) * 2 + 10)
    for index in range(3):
        part = text[index * CHUNK_BYTES : (index + 1) * CHUNK_BYTES]
        services.objects.put_bytes(chunk_key(job, attempt, index), part)
    read, offset = "", 0
    while True:
        answer = team.get(f"/jobs/{job}/logs?offset={offset}")
        if not answer.text:
            break
        read, offset = read + answer.text, int(answer.headers["X-Log-Next"])
    assert read.encode() == text
    assert team.get(f"/jobs/{job}/logs?tail_bytes=40").text.encode() == line
