"""Ids, settings, workers, datasets and adapters."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from sqlalchemy import Engine, update

from store import adapters, datasets, quotas, workers
from store.database import transaction
from store.database_time import database_time_in
from store.errors import InvalidCursor, NotFound
from store.ids import KINDS, is_id, new_id
from store.models import AdapterOrigin, DatasetStatus, Worker
from store.settings import Settings
from tests.builders import MODEL, TEAM, prepare


def test_ids_carry_their_kind_and_sort_by_the_time_they_were_made() -> None:
    for kind in KINDS:
        assert is_id(new_id(kind), kind)
    made = [new_id("job") for _ in range(2000)]
    assert made == sorted(set(made))
    with pytest.raises(ValueError, match="unknown kind"):
        new_id("task")


def test_ids_made_in_parallel_are_different() -> None:
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda _: new_id("job"), range(4000)))
    assert len(set(made)) == 4000


@pytest.mark.parametrize(
    "text", ["", "job_", "job_" + "0" * 25, "job_" + "u" * 26, "ds_" + "0" * 26]
)
def test_what_is_no_id_of_a_job_is_told(text: str) -> None:
    assert not is_id(text, "job")
    assert is_id("job_" + "0" * 26, "job")


def test_settings_come_from_the_environment(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GRIT_HOME", "here")
    monkeypatch.setenv("GRIT_ALLOWED_MODELS", '["org/*"]')
    monkeypatch.setenv("GRIT_LEASE_SECONDS", "30")
    monkeypatch.setenv("GRIT_S3_ACCESS_KEY_ID", "id")
    monkeypatch.setenv("GRIT_S3_SECRET_ACCESS_KEY", "hush")
    settings = Settings()
    assert settings.home == tmp_path / "here"
    assert settings.database_url == f"sqlite:///{tmp_path}/here/grit.db"
    assert settings.objects_url == f"file://{tmp_path}/here/objects"
    assert settings.allowed_models == ["org/*"]
    assert settings.lease_seconds == 30
    assert "hush" not in repr(settings)


def test_a_lease_shorter_than_its_heartbeat_is_refused() -> None:
    with pytest.raises(ValueError, match="GRIT_LEASE_SECONDS is 5"):
        Settings(lease_seconds=5, heartbeat_seconds=10)


def test_every_setting_says_what_it_is() -> None:
    undescribed = [name for name, field in Settings.model_fields.items() if not field.description]
    assert undescribed == []


def test_a_worker_is_live_while_it_beats(engine: Engine) -> None:
    with transaction(engine) as session:
        worker = workers.register_worker(
            session, hostname="host", process_id=1, queues=["cpu", "infer.cpu"], device="cpu"
        )
        workers.register_worker(session, hostname="b", process_id=2, queues=["cuda"], device="cuda")
        session.execute(
            update(Worker).where(Worker.id == worker.id).values(seen_at=database_time_in(-60))
        )
    with transaction(engine) as session:
        assert workers.live_queues(session) == {"cuda"}
        workers.beat(session, worker.id, details={"job": "job_1"})
        assert workers.live_queues(session) == {"cpu", "infer.cpu", "cuda"}
        workers.beat(session, worker.id, stopping=True)
        assert workers.live_queues(session) == {"cuda"}
        assert len(workers.live_workers(session)) == 2
        workers.remove_worker(session, worker.id)
        with pytest.raises(NotFound):
            workers.beat(session, worker.id)


def test_a_worker_silent_for_a_day_is_forgotten(engine: Engine) -> None:
    with transaction(engine) as session:
        workers.register_worker(session, hostname="a", process_id=1, queues=["cpu"], device="cpu")
        session.execute(update(Worker).values(seen_at=database_time_in(-90_000)))
    with transaction(engine) as session:
        workers.register_worker(session, hostname="b", process_id=2, queues=["cpu"], device="cpu")
        rows = workers.live_workers(session, seen_within_seconds=1e6)
        assert [row.hostname for row in rows] == ["b"]


def test_an_object_that_two_datasets_share_outlives_the_first(engine: Engine) -> None:
    with transaction(engine) as session:
        prepare(session)
        prepare(session, team="other")
        first, second = (
            datasets.create_dataset(
                session, team=team, status=DatasetStatus.READY, object_key="datasets/0.jsonl"
            )
            for team in (TEAM, "other")
        )
    with transaction(engine) as session:
        with pytest.raises(NotFound):
            datasets.delete_dataset(session, first.id, team="other")
        assert datasets.delete_dataset(session, first.id, team=TEAM) is None
        assert datasets.delete_dataset(session, second.id, team="other") == "datasets/0.jsonl"


def test_adapters_and_datasets_are_their_teams_own(engine: Engine) -> None:
    with transaction(engine) as session:
        dataset_id = prepare(session)
        adapter = adapters.create_adapter(
            session,
            team=TEAM,
            origin=AdapterOrigin.IMPORT,
            model=MODEL,
            prefix="adapters/x/",
            size_bytes=3_000_000_000,
        )
        assert adapters.get_adapter(session, adapter.id, team=TEAM) is adapter
        assert datasets.get_dataset(session, dataset_id, team=TEAM).num_rows == 8
        assert quotas.stored_bytes(session, team=TEAM) == 3_000_000_100
        assert quotas.stored_bytes(session, team="other") == 0
        for read in (
            lambda: adapters.get_adapter(session, adapter.id, team="other"),
            lambda: adapters.delete_adapter(session, adapter.id, team="other"),
            lambda: datasets.get_dataset(session, dataset_id, team="other"),
        ):
            with pytest.raises(NotFound):
                read()
        assert adapters.list_adapters(session, team="other").rows == []
        assert adapters.list_adapters(session, team=TEAM, model="org/none").rows == []
        assert [row.id for row in datasets.list_datasets(session, team=TEAM).rows] == [dataset_id]
        with pytest.raises(InvalidCursor):
            adapters.list_adapters(session, team=TEAM, cursor="?")
        assert adapters.delete_adapter(session, adapter.id, team=TEAM) == "adapters/x/"
