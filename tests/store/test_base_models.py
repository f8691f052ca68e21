"""Which models are allowed, and what is known of them."""

from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from sqlalchemy import Engine, update

from store import base_models
from store.base_models import Stage, allowed
from store.database import transaction
from store.errors import NotFound, StillReferenced
from store.models import BaseModelRow, ModelStatus
from store.settings import Settings
from tests.builders import MODEL, queued_job


def _settings(*globs: str) -> Settings:
    return Settings(allowed_models=list(globs))


@pytest.mark.parametrize(
    ("glob", "source", "expected"),
    [
        ("HuggingFaceTB/SmolVLM*", "HuggingFaceTB/SmolVLM-256M-Instruct", True),
        ("HuggingFaceTB/SmolVLM*", "HuggingFaceTB/Idefics3", False),
        ("HuggingFaceTB/*", "huggingfacetb/SmolVLM", False),
        ("*", "org/model", True),
        ("*", "gpt2", True),
        ("*", "https://host/model", False),
        ("*", "org/model/../../etc", False),
        ("*", "org/..", False),
        ("*", "org//model", False),
        ("*", "", False),
        ("*", "org/mod\nel", False),
        ("org/[ab]", "org/a", True),
        ("org/[ab]", "org/c", False),
    ],
)
def test_hub_ids_are_matched_by_globs(glob: str, source: str, *, expected: bool) -> None:
    assert allowed(_settings(glob), source) is expected


def test_nothing_is_allowed_by_default() -> None:
    assert not allowed(Settings(), "org/model")
    assert not allowed(Settings(), "/")


def test_a_folder_is_judged_by_where_it_really_is(tmp_path: Path) -> None:
    models, secret = tmp_path / "models", tmp_path / "secret"
    for folder in (models / "tiny", secret):
        folder.mkdir(parents=True)
    (models / "link").symlink_to(secret)
    (tmp_path / "alias").symlink_to(models)
    settings = _settings(f"{models}/*")
    assert allowed(settings, f"{models}/tiny")
    assert allowed(settings, f"{tmp_path}/alias/tiny")
    assert allowed(settings, f"{secret}/../models/tiny")
    assert not allowed(settings, f"{models}/link")
    assert not allowed(settings, f"{models}/../secret")
    assert not allowed(settings, str(secret))
    assert not allowed(settings, f"{models}/tiny\0")
    assert allowed(_settings(f"{tmp_path}/alias/*"), f"{models}/tiny")
    assert allowed(_settings(str(models / "tiny")), f"{models}/tiny/")
    assert not allowed(_settings("org/*"), f"{models}/tiny")


def test_a_model_is_registered_once_and_then_known(engine: Engine) -> None:
    with transaction(engine) as session:
        row = base_models.register(session, id="tiny", source="/models/tiny")
        assert (row.status, row.inventory) == (ModelStatus.REGISTERING, None)
        assert base_models.is_waiting(session, Stage.FOLDER)
    with transaction(engine) as session:
        saved = base_models.save_inventory(
            session, id="tiny", inventory={"layers": [1]}, inventory_hash="h"
        )
        assert (saved.status, saved.inventory) == (ModelStatus.READY, {"layers": [1]})
        again = base_models.register(session, id="tiny", source="/models/tiny")
        assert again.status == ModelStatus.READY
        assert not base_models.is_waiting(session, Stage.FOLDER)
        failed = base_models.save_failure(session, id="tiny", code="late", message="late")
        assert failed.status == ModelStatus.READY
        assert [row.id for row in base_models.list_models(session)] == ["tiny"]
    with transaction(engine) as session, pytest.raises(ValueError, match="already registered"):
        base_models.register(session, id="tiny", source="/elsewhere")


def test_a_failed_registration_can_be_tried_again(engine: Engine) -> None:
    with transaction(engine) as session:
        base_models.register(session, id="tiny", source="/models/tiny")
        failed = base_models.save_failure(session, id="tiny", code="no_config", message="why")
        assert (failed.status, failed.failure) == (
            ModelStatus.FAILED,
            {"code": "no_config", "message": "why"},
        )
        again = base_models.register(session, id="tiny", source="/models/tiny")
        assert (again.status, again.failure) == (ModelStatus.REGISTERING, None)


def test_an_unknown_model_is_not_found(engine: Engine) -> None:
    with transaction(engine) as session:
        with pytest.raises(NotFound):
            base_models.get(session, "none")
        with pytest.raises(NotFound):
            base_models.save_failure(session, id="none", code="x", message="x")


def claim(
    engine: Engine, stage: Stage, worker_id: str, *, lease_seconds: float = 60.0
) -> list[str]:
    with transaction(engine) as session:
        rows = base_models.claim_models(
            session, stage, worker_id=worker_id, lease_seconds=lease_seconds, limit=10
        )
        return [row.id for row in rows]


def test_a_model_waits_at_one_stage_at_a_time(engine: Engine) -> None:
    folders = {"a": "/models/a", "b": "./b", "c": "~/c", "d": "../d", "e": "."}
    with transaction(engine) as session:
        for name, source in folders.items():
            base_models.register(session, id=name, source=source)
        base_models.register(session, id="hub", source="org/x")
    assert claim(engine, Stage.HUB, "wrk_1") == []
    assert claim(engine, Stage.LOOK_UP, "wrk_1") == ["hub"]
    assert sorted(claim(engine, Stage.FOLDER, "wrk_1")) == list(folders)
    with transaction(engine) as session:
        base_models.release_claim(session, id="hub", worker_id="wrk_1", found=True)
    assert claim(engine, Stage.LOOK_UP, "wrk_1") == []
    assert claim(engine, Stage.HUB, "wrk_2") == ["hub"]


def test_a_claim_is_one_workers_until_it_ends(engine: Engine) -> None:
    with transaction(engine) as session:
        base_models.register(session, id="tiny", source="/models/tiny")
    assert claim(engine, Stage.FOLDER, "wrk_1", lease_seconds=-1) == ["tiny"]
    assert claim(engine, Stage.FOLDER, "wrk_2") == ["tiny"]
    assert claim(engine, Stage.FOLDER, "wrk_1") == []
    with transaction(engine) as session:
        renew = {"id": "tiny", "lease_seconds": 60.0}
        assert not base_models.renew_claim(session, worker_id="wrk_1", **renew)  # type: ignore[arg-type]
        assert base_models.renew_claim(session, worker_id="wrk_2", **renew)  # type: ignore[arg-type]
        late = base_models.save_failure(
            session, id="tiny", code="late", message="late", worker_id="wrk_1"
        )
        assert late.status == ModelStatus.REGISTERING
        saved = base_models.save_inventory(
            session, id="tiny", inventory={}, inventory_hash="h", worker_id="wrk_2"
        )
        assert (saved.status, saved.claimed_by) == (ModelStatus.READY, None)


def test_a_name_that_led_nowhere_is_in_no_list_and_is_collected(engine: Engine) -> None:
    with transaction(engine) as session:
        for name, code in (("org/x", "model_not_found"), ("/torn", "model_unavailable")):
            base_models.register(session, id=name, source=name)
            base_models.save_failure(session, id=name, code=code, message="why")
        base_models.register(session, id="new", source="/new")
        assert [row.id for row in base_models.list_models(session)] == ["/torn", "new"]
        assert base_models.names(session) == ["new"]
        assert base_models.led_nowhere(base_models.get(session, "org/x"))
        assert base_models.delete_failed(session, after_seconds=1000) == 0  # somebody may just ask
        old = datetime.now(UTC) - timedelta(seconds=500)
        session.execute(update(BaseModelRow).values(requested_at=old))
        assert base_models.delete_failed(session, after_seconds=1000) == 1
        assert base_models.find(session, "org/x") is None
        assert base_models.delete_failed(session, after_seconds=400) == 1
        assert [row.id for row in base_models.list_models(session)] == ["new"]


def test_a_name_that_the_hub_is_still_asked_about_is_offered_to_no_one(engine: Engine) -> None:
    with transaction(engine) as session:
        for name in ("org/asked", "org/found", "/models/folder"):
            base_models.register(session, id=name, source=name)
        base_models.claim_models(
            session, Stage.LOOK_UP, worker_id="wrk_1", lease_seconds=60, limit=9
        )
        base_models.release_claim(session, id="org/found", worker_id="wrk_1", found=True)
        assert base_models.names(session) == ["/models/folder", "org/found"]


def test_a_model_is_deleted_unless_a_job_or_an_adapter_names_it(engine: Engine) -> None:
    job = queued_job(engine)
    with transaction(engine) as session, pytest.raises(StillReferenced, match=job.id):
        base_models.delete_model(session, MODEL)
    with transaction(engine) as session:
        base_models.save_failure(session, id=MODEL, code="late", message="late")
        base_models.register(session, id="unused", source="/unused")
        base_models.delete_model(session, "unused")
        assert base_models.names(session) == [MODEL]
        with pytest.raises(NotFound):
            base_models.delete_model(session, "unused")
