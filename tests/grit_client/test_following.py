"""Streams on the command line: each line is there when it happens, and an end has a code."""

import json
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from store import attempts, lifecycle
from store.attempt_logs import chunk_key, delete_chunks
from store.database import transaction
from store.models import JobStatus
from store.orphans import log_key
from store.retries import Failure, RetryPolicy
from tests.api.conftest import job_body
from tests.grit_client.conftest import GRIT, Ran, Service

Cli = Callable[..., Ran]


@contextmanager
def started(service: Service, *arguments: str) -> Iterator["subprocess.Popen[str]"]:
    process = subprocess.Popen(
        [GRIT, *arguments],
        cwd=service.folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def line_of(process: "subprocess.Popen[str]") -> str:
    assert process.stdout is not None
    return process.stdout.readline()


def new_job(service: Service) -> str:
    with service.client() as client:
        dataset = client.upload_dataset(service.rows_file())["id"]
        return client.create_job(job_body(dataset))["id"]


def claim(service: Service) -> attempts.Claim:
    with transaction(service.services.engine) as session:
        found = attempts.claim_next(session, queue="cpu", worker_id="w", lease_seconds=600)
    assert found is not None
    return found


def fail(service: Service, job: str, attempt: int, *, retryable: bool) -> None:
    failure = Failure(code="stalled", message="No step.", retryable=retryable)
    policy = RetryPolicy(backoff_first_seconds=1e-9)
    with transaction(service.services.engine) as session:
        attempts.fail(session, job_id=job, attempt=attempt, failure=failure, policy=policy)


def test_watch_as_json_is_a_line_for_each_state_while_it_happens(shared_service: Service) -> None:
    job = new_job(shared_service)
    with started(shared_service, "watch", job, "--json") as watch:
        states: list[dict[str, Any]] = [json.loads(line_of(watch))]
        with transaction(shared_service.services.engine) as session:
            lifecycle.transition(session, job, to=JobStatus.CANCELLED)
        out, err = watch.communicate(timeout=60)
    states += [json.loads(line) for line in out.splitlines()]
    assert [state["status"] for state in states] == ["queued", "cancelled"]
    assert watch.returncode == 1
    assert json.loads(err)["exit_code"] == 1


def test_a_log_is_followed_across_attempts_until_the_job_ends(shared_service: Service) -> None:
    job = new_job(shared_service)
    objects = shared_service.services.objects
    first = claim(shared_service)
    objects.put_bytes(chunk_key(job, first.attempt, 0), b"one\ntwo\nthr")
    with started(shared_service, "logs", job, "-f") as follow:
        assert [line_of(follow), line_of(follow)] == ["one\n", "two\n"]
        objects.put_bytes(chunk_key(job, first.attempt, 0), b"one\ntwo\nthree\n")
        assert line_of(follow) == "three\n"
        objects.put_bytes(log_key(job, first.attempt), b"one\ntwo\nthree\nfour")
        delete_chunks(objects, job, first.attempt)
        fail(shared_service, job, first.attempt, retryable=True)
        second = claim(shared_service)
        assert second.attempt == 2
        objects.put_bytes(chunk_key(job, second.attempt, 0), b"again\n")
        assert line_of(follow) == "fouragain\n"
        objects.put_bytes(log_key(job, second.attempt), b"again\nend\n")
        fail(shared_service, job, second.attempt, retryable=False)
        out, err = follow.communicate(timeout=60)
    assert out == "end\n"
    assert err == "Attempt 2:\n"
    assert follow.returncode == 0


def test_a_followed_log_as_json_is_an_object_for_each_line(
    cli: Cli, shared_service: Service
) -> None:
    job = new_job(shared_service)
    attempt = claim(shared_service).attempt
    shared_service.services.objects.put_bytes(log_key(job, attempt), b"one\ntwo\n")
    fail(shared_service, job, attempt, retryable=False)
    lines = [json.loads(line) for line in cli("logs", job, "-f", "--json").out.splitlines()]
    assert lines == [
        {"job": job, "attempt": attempt, "line": "one"},
        {"job": job, "attempt": attempt, "line": "two"},
    ]
    assert cli("logs", job, "-f", "--attempt", "1").code == 2
