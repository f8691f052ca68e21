"""Which models are allowed, and what is known of them."""

from pathlib import Path

import pytest
from sqlalchemy import Engine

from store import base_models
from store.base_models import allowed
from store.database import transaction
from store.errors import NotFound
from store.models import ModelStatus
from store.settings import Settings


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
        assert [row.id for row in base_models.registering(session)] == ["tiny"]
    with transaction(engine) as session:
        saved = base_models.save_inventory(
            session, id="tiny", inventory={"layers": [1]}, inventory_hash="h"
        )
        assert (saved.status, saved.inventory) == (ModelStatus.READY, {"layers": [1]})
        again = base_models.register(session, id="tiny", source="/models/tiny")
        assert again.status == ModelStatus.READY
        assert base_models.registering(session) == []
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
