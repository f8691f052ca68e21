"""Adapters, and what compressions take from them and add to them, on both databases."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
from sqlalchemy import Engine

from store import adapters, attempts, jobs
from store.attempts import Failure
from store.database import run_in_transaction, transaction
from store.errors import IllegalTransition, NotFound, StillReferenced, StoreError
from store.lifecycle import OPEN
from store.models import Adapter, AdapterOrigin, Job, JobKind, JobStatus
from tests.builders import MODEL, TEAM, claim, finish, job_in, new_job, prepare, queued_job

ENDED = (JobStatus.CANCELLED, JobStatus.SUCCEEDED, JobStatus.FAILED)


def trained_adapter(engine: Engine) -> Adapter:
    """Make the adapter of a job that has succeeded."""
    queued_job(engine)
    with transaction(engine) as session:
        job = finish(session, claim(engine))
    with transaction(engine) as session:
        found = adapters.adapter_of_job(session, job.id, team=TEAM)
    assert found is not None
    return found


def compression_in(engine: Engine, status: JobStatus, source: Adapter) -> Job:
    """Make a compression of an adapter, in any status."""
    return job_in(
        engine,
        status,
        kind=JobKind.COMPRESSION,
        source_adapter_id=source.id,
        request={"adapter": source.id},
    )


def delete(engine: Engine, adapter_id: str) -> str:
    return run_in_transaction(
        engine, lambda session: adapters.delete_adapter(session, adapter_id, team=TEAM)
    )


def test_a_compression_adds_an_adapter_that_names_the_one_it_was_cut_from(engine: Engine) -> None:
    source = trained_adapter(engine)
    job = compression_in(engine, JobStatus.SUCCEEDED, source)
    with transaction(engine) as session:
        made = adapters.adapter_of_job(session, job.id, team=TEAM)
    assert made is not None
    assert (made.origin, made.parent_id) == (AdapterOrigin.COMPRESSION, source.id)
    assert (source.origin, source.parent_id) == (AdapterOrigin.JOB, None)


@pytest.mark.parametrize("status", sorted(OPEN))
def test_a_job_that_has_not_ended_keeps_its_source(engine: Engine, status: JobStatus) -> None:
    source = trained_adapter(engine)
    job = compression_in(engine, JobStatus(status), source)
    with pytest.raises(StillReferenced, match=job.id):
        delete(engine, source.id)
    with transaction(engine) as session:
        assert jobs.get_job(session, job.id, team=TEAM).source_adapter_id == source.id


@pytest.mark.parametrize("status", ENDED)
def test_an_ended_compression_lets_its_source_go_and_keeps_its_own_adapter(
    engine: Engine, status: JobStatus
) -> None:
    source = trained_adapter(engine)
    job = compression_in(engine, status, source)
    assert delete(engine, source.id) == source.prefix
    with transaction(engine) as session:
        assert jobs.get_job(session, job.id, team=TEAM).source_adapter_id is None
        made = adapters.adapter_of_job(session, job.id, team=TEAM)
    assert (made is not None) == (status is JobStatus.SUCCEEDED)
    assert made is None or made.parent_id is None


def test_a_compression_is_not_tried_again_without_its_source(engine: Engine) -> None:
    source = trained_adapter(engine)
    job = compression_in(engine, JobStatus.FAILED, source)
    with transaction(engine) as session:
        assert jobs.retry_job(session, job.id, team=TEAM).status == JobStatus.QUEUED
    with pytest.raises(StillReferenced):
        delete(engine, source.id)
    with transaction(engine) as session:
        jobs.request_cancel(session, job.id, team=TEAM)
    delete(engine, source.id)
    with pytest.raises(NotFound, match=source.id), transaction(engine) as session:
        jobs.retry_job(session, job.id, team=TEAM)
    with transaction(engine) as session:
        assert jobs.get_job(session, job.id, team=TEAM).status == JobStatus.CANCELLED


def test_a_succeeded_compression_cannot_be_retried_whether_its_source_is_there_or_not(
    engine: Engine,
) -> None:
    source = trained_adapter(engine)
    job = compression_in(engine, JobStatus.SUCCEEDED, source)
    with pytest.raises(IllegalTransition), transaction(engine) as session:
        jobs.retry_job(session, job.id, team=TEAM)


def test_a_compression_of_another_teams_adapter_is_refused(engine: Engine) -> None:
    source = trained_adapter(engine)
    with transaction(engine) as session:
        dataset = prepare(session, team="other")
    spec = new_job(dataset, kind=JobKind.COMPRESSION, source_adapter_id=source.id)
    with pytest.raises(NotFound, match=source.id), transaction(engine) as session:
        jobs.create_job(session, team="other", spec=spec)


def test_a_source_deleted_while_its_compression_is_created_is_in_use_or_not_found(
    engine: Engine,
) -> None:
    def outcome(work: Callable[[], object]) -> str:
        try:
            work()
        except StoreError as error:
            return type(error).__name__
        return "done"

    for _ in range(8):
        source = trained_adapter(engine)
        with transaction(engine) as session:
            dataset = prepare(session)
        spec = new_job(dataset, kind=JobKind.COMPRESSION, source_adapter_id=source.id)

        def create(spec: jobs.NewJob = spec) -> object:
            return run_in_transaction(
                engine, lambda session: jobs.create_job(session, team=TEAM, spec=spec)
            )

        with ThreadPoolExecutor(2) as pool:
            created = pool.submit(outcome, create)
            deleted = pool.submit(outcome, lambda source=source: delete(engine, source.id))
        both = (created.result(), deleted.result())
        assert both in {("done", "StillReferenced"), ("NotFound", "done")}
        with transaction(engine) as session:
            filters = jobs.JobFilters(statuses=(JobStatus.QUEUED,))
            for job in jobs.list_jobs(session, team=TEAM, filters=filters).rows:
                assert job.source_adapter_id == source.id
                jobs.request_cancel(session, job.id, team=TEAM)


def test_an_adapter_leads_to_the_job_that_trained_what_it_was_cut_from(engine: Engine) -> None:
    source = trained_adapter(engine)
    first = compression_in(engine, JobStatus.SUCCEEDED, source)
    with transaction(engine) as session:
        cut = adapters.adapter_of_job(session, first.id, team=TEAM)
    assert cut is not None
    second = compression_in(engine, JobStatus.SUCCEEDED, cut)
    with transaction(engine) as session:
        cut_again = adapters.adapter_of_job(session, second.id, team=TEAM)
        imported = adapters.create_adapter(
            session, team=TEAM, origin=AdapterOrigin.IMPORT, model=MODEL, prefix="adapters/i"
        )
        assert cut_again is not None
        found = adapters.training_job_of(session, cut_again)
        assert found is not None
        assert found.id == source.job_id
        assert adapters.training_job_of(session, imported) is None
        # A link of the chain is gone: nobody knows any more.
        adapters.delete_adapter(session, cut.id, team=TEAM)
        session.expire_all()
        assert adapters.training_job_of(session, cut_again) is None


def test_a_compression_that_fails_for_good_adds_nothing(engine: Engine) -> None:
    source = trained_adapter(engine)
    job = compression_in(engine, JobStatus.RUNNING, source)
    failure = Failure(code="adapter_invalid", message="No.", category="user")
    with transaction(engine) as session:
        attempts.fail(session, job_id=job.id, attempt=job.attempt, failure=failure)
    with transaction(engine) as session:
        assert adapters.adapter_of_job(session, job.id, team=TEAM) is None
        assert len(adapters.list_adapters(session, team=TEAM).rows) == 1


def test_equal_imports_at_once_make_one_adapter(engine: Engine) -> None:
    with transaction(engine) as session:
        prepare(session)

    def take(number: int) -> str:
        made = run_in_transaction(
            engine,
            lambda session: adapters.import_adapter(
                session,
                team=TEAM,
                id=f"adp_{number}",
                model=MODEL,
                prefix=f"adapters/adp_{number}",
                name="same",
                sha256="a" * 64,
                manifest_sha256="b" * 64,
                size_bytes=1,
                trainable_parameters=1,
                details={},
            ),
        )
        return made.id

    with ThreadPoolExecutor(8) as pool:
        found = set(pool.map(take, range(8)))
    with transaction(engine) as session:
        rows = adapters.list_adapters(session, team=TEAM).rows
    assert {row.id for row in rows} == found
    assert len(found) == 1
    assert (rows[0].origin, rows[0].details) == ("import", {"manifest_sha256": "b" * 64})


def test_an_import_is_known_by_its_content_and_its_name(engine: Engine) -> None:
    with transaction(engine) as session:
        prepare(session)
    same = {"model": MODEL, "sha256": "a" * 64, "manifest_sha256": "b" * 64}
    with transaction(engine) as session:
        made = adapters.import_adapter(
            session,
            team=TEAM,
            id="adp_1",
            prefix="adapters/adp_1",
            name="mine",
            size_bytes=1,
            trainable_parameters=1,
            details={},
            **same,
        )

        def find(**changes: str) -> Adapter | None:
            return adapters.find_import(session, **{"team": TEAM, **same, **changes})

        assert find() is find(name="mine") is made
        others = [{"name": "x"}, {"manifest_sha256": "c"}, {"sha256": "c"}, {"team": "other"}]
        assert [find(**changes) for changes in others] == [None] * 4
