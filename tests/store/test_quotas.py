"""What a team may store, on both databases, also when several ask at once."""

import threading

import pytest
from sqlalchemy import Engine, update
from sqlalchemy.orm import Session

from store import adapters, attempts, datasets, jobs, quotas
from store.database import run_in_transaction, transaction
from store.errors import NotFound, QuotaExceeded
from store.models import AdapterOrigin, DatasetStatus, Team
from tests.builders import MODEL, TEAM, new_job, prepare, running_job


def _add_dataset(engine: Engine, size: int, *, default: int | None = None) -> str:
    def work(session: Session) -> str:
        owner = quotas.hold_team(session, TEAM)
        quotas.refuse_bytes(session, owner, adding=size, default=default)
        made = datasets.create_dataset(
            session, team=TEAM, status=DatasetStatus.READY, size_bytes=size
        )
        return made.id

    return run_in_transaction(engine, work)


def _bound(engine: Engine, size: int | None) -> None:
    with transaction(engine) as session:
        session.execute(update(Team).where(Team.name == TEAM).values(max_stored_bytes=size))


def test_datasets_adapters_and_checkpoints_count(engine: Engine) -> None:
    job = running_job(engine)
    with transaction(engine) as session:
        before = quotas.stored_bytes(session, team=TEAM)
        attempts.save_checkpoint_pointer(
            session, job_id=job.id, attempt=1, step=1, prefix="p/", size_bytes=70
        )
        adapters.create_adapter(
            session, team=TEAM, origin=AdapterOrigin.IMPORT, model=MODEL, prefix="a/", size_bytes=5
        )
        session.add(Team(name="other"))
        session.flush()
        datasets.create_dataset(session, team="other", status=DatasetStatus.READY, size_bytes=9)
        assert quotas.stored_bytes(session, team=TEAM) == before + 75
        usage = quotas.usage_of(session, TEAM)
        assert (usage.open_jobs, usage.running_jobs, usage.stored_bytes) == (1, 1, before + 75)
        everyone = quotas.usage_by_team(session)
    assert everyone == {TEAM: usage, "other": quotas.Usage(stored_bytes=9)}


def test_the_last_byte_fits_and_one_more_does_not(engine: Engine) -> None:
    with transaction(engine) as session:
        prepare(session)
        free = 100
        bound = quotas.stored_bytes(session, team=TEAM) + free
    _bound(engine, bound)
    with pytest.raises(QuotaExceeded, match="would add 101"):
        _add_dataset(engine, free + 1)
    kept = _add_dataset(engine, free)
    with pytest.raises(QuotaExceeded, match=f"{bound} of at most {bound} stored bytes") as refused:
        _add_dataset(engine, 1)
    # It says what to delete, and that somebody may allow more.
    assert kept in str(refused.value)
    assert "max_stored_bytes" in str(refused.value)


def test_a_teams_own_bound_goes_before_the_deployments(engine: Engine) -> None:
    with transaction(engine) as session:
        prepare(session)
    with pytest.raises(QuotaExceeded, match="of at most 150 stored"):
        _add_dataset(engine, 51, default=150)
    _bound(engine, 1_000)
    _add_dataset(engine, 51, default=150)
    _bound(engine, None)
    _add_dataset(engine, 10**12)


def test_a_full_team_starts_no_job_that_would_store_more(engine: Engine) -> None:
    with transaction(engine) as session:
        dataset = prepare(session)
        full = quotas.stored_bytes(session, team=TEAM)
    _bound(engine, full)
    with pytest.raises(QuotaExceeded, match="stored bytes"), transaction(engine) as session:
        jobs.create_job(session, team=TEAM, spec=new_job(dataset))
    _bound(engine, full + 1)
    with transaction(engine) as session:
        jobs.create_job(session, team=TEAM, spec=new_job(dataset))


def test_uploads_at_once_do_not_share_the_last_bytes(engine: Engine) -> None:
    with transaction(engine) as session:
        prepare(session)
        used = quotas.stored_bytes(session, team=TEAM)
    _bound(engine, used + 300)
    refused: list[QuotaExceeded] = []

    def upload() -> None:
        try:
            _add_dataset(engine, 100)
        except QuotaExceeded as error:
            refused.append(error)

    threads = [threading.Thread(target=upload) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with transaction(engine, read_only=True) as session:
        assert quotas.stored_bytes(session, team=TEAM) == used + 300
    assert len(refused) == 5


def test_an_import_counts_once_however_often_it_is_sent(engine: Engine) -> None:
    with transaction(engine) as session:
        prepare(session)
        bound = quotas.stored_bytes(session, team=TEAM) + 60
    content = {"team": TEAM, "model": MODEL, "name": None, "sha256": "0", "manifest_sha256": "1"}
    for number in range(2):
        with transaction(engine) as session:
            adapters.import_adapter(
                session,
                **content,  # type: ignore[arg-type] # only `name` is none
                id=f"adp_{number}",
                prefix=f"a/{number}",
                size_bytes=60,
                trainable_parameters=1,
                details={},
                max_stored_bytes=bound,
            )
    with pytest.raises(QuotaExceeded), transaction(engine) as session:
        adapters.import_adapter(
            session,
            **{**content, "sha256": "2"},  # type: ignore[arg-type] # as above
            id="adp_2",
            prefix="a/2",
            size_bytes=1,
            trainable_parameters=1,
            details={},
            max_stored_bytes=bound,
        )


def test_a_deleted_dataset_gives_its_bytes_back(engine: Engine) -> None:
    with transaction(engine) as session:
        prepare(session)
        used = quotas.stored_bytes(session, team=TEAM)
    _bound(engine, used + 10)
    gone = _add_dataset(engine, 10)
    with transaction(engine) as session:
        datasets.delete_dataset(session, gone, team=TEAM)
    _add_dataset(engine, 10)


def test_a_team_that_is_not_there_has_nothing(engine: Engine) -> None:
    with transaction(engine) as session:
        with pytest.raises(NotFound):
            quotas.hold_team(session, "nobody")
        assert quotas.usage_of(session, "nobody") == quotas.Usage()
