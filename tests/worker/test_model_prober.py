"""Registering models in any worker: side by side, once each, and never in the way."""

import shutil
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest
from huggingface_hub import constants
from sqlalchemy import Engine
from structlog.testing import capture_logs

from store import base_models
from store.database import transaction
from store.models import BaseModelRow, ModelStatus
from store.settings import Settings
from tests.hub_server import HubServer, hub_server
from tests.tiny_models import tiny_causal_folder, tiny_vlm_folder
from worker.model_prober import ModelProber

SETTLED_SECONDS = 90.0
Start = Callable[..., ModelProber]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_vlm_folder(tmp_path_factory.mktemp("models"))


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    with hub_server(tiny=tiny_causal_folder(tmp_path)) as server:
        template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "home" / "hub"))
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
        yield server


@pytest.fixture
def start(embedded_settings: Settings, sqlite_engine: Engine) -> Iterator[Start]:
    made: list[ModelProber] = []

    def start_one(**changes: object) -> ModelProber:
        settings = embedded_settings.model_copy(update=changes)
        made.append(ModelProber(settings, sqlite_engine, worker_id=f"wrk_{len(made)}"))
        made[-1].start()
        return made[-1]

    yield start_one
    for prober in made:
        prober.stop()


def register(engine: Engine, **sources: str | Path) -> None:
    with transaction(engine) as session:
        for name, source in sources.items():
            base_models.register(session, id=name, source=str(source))


def row_of(engine: Engine, name: str) -> BaseModelRow:
    with transaction(engine, read_only=True) as session:
        return base_models.get(session, name)


def settled(engine: Engine, name: str) -> BaseModelRow:
    deadline = time.monotonic() + SETTLED_SECONDS
    while (row := row_of(engine, name)).status == ModelStatus.REGISTERING:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return row


def test_registering_records_the_layers_and_the_probe_or_the_reason_and_goes_on_after_a_failure(
    sqlite_engine: Engine, start: Start, model: Path, tmp_path: Path
) -> None:
    empty, torn = tmp_path / "empty", shutil.copytree(model, tmp_path / "torn")
    empty.mkdir()
    (torn / "chat_template.jinja").write_text("{{ raise_exception('no chat') }}")
    register(sqlite_engine, empty=empty, torn=torn, tiny=model)
    start()
    ready = settled(sqlite_engine, "tiny")
    assert ready.status == ModelStatus.READY
    assert ready.inventory is not None
    assert any(row["modality"] == "vision" for row in ready.inventory["layers"])
    assert ready.inventory["probe"]["max_images"] == 2
    missing, refused = settled(sqlite_engine, "empty"), settled(sqlite_engine, "torn")
    assert missing.failure is not None
    assert refused.failure is not None
    assert "config.json" in missing.failure["message"]
    assert refused.failure["code"] == "model_unavailable"
    assert "no chat" in refused.failure["message"]


def test_a_folder_does_not_wait_for_wrong_names_of_a_hub_that_hangs(
    sqlite_engine: Engine, start: Start, model: Path, hub: HubServer
) -> None:
    hub.hang_seconds = 30
    wrong = [f"org/wrong-{number}" for number in range(200)]
    register(sqlite_engine, **{name: name for name in wrong})
    register(sqlite_engine, good=model)
    start(hub_seconds=20.0)  # so that the first names hold their places all the while
    assert settled(sqlite_engine, "good").status == ModelStatus.READY
    assert row_of(sqlite_engine, wrong[-1]).status == ModelStatus.REGISTERING
    assert row_of(sqlite_engine, wrong[-1]).claimed_by is None


def test_wrong_names_are_refused_side_by_side(
    sqlite_engine: Engine, start: Start, hub: HubServer
) -> None:
    hub.hang_seconds = 30
    wrong = [f"org/wrong-{number}" for number in range(60)]
    register(sqlite_engine, **{name: name for name in wrong})
    started = time.monotonic()
    start(hub_seconds=1.0)
    failures = [settled(sqlite_engine, name).failure for name in wrong]
    assert {failure and failure["code"] for failure in failures} == {"hub_unreachable"}
    assert time.monotonic() - started < 30  # one after the other would take a minute


def test_a_hub_model_is_looked_up_and_probed_and_then_read_from_the_cache_without_the_hub(
    sqlite_engine: Engine, start: Start, hub: HubServer
) -> None:
    register(sqlite_engine, own="org/tiny", none="org/none")
    start(hub_seconds=10.0)
    found, refused = settled(sqlite_engine, "own"), settled(sqlite_engine, "none")
    assert (found.status, found.claimed_by) == (ModelStatus.READY, None)
    assert found.found_at is not None
    assert refused.failure is not None
    assert refused.failure["code"] == "model_not_found"
    about_none = [each for each in hub.requests if "none" in each]
    assert about_none == ["HEAD /org/none/resolve/main/config.json"]
    hub.status = 503
    asked = len(hub.requests)
    register(sqlite_engine, again="org/tiny")
    assert settled(sqlite_engine, "again").status == ModelStatus.READY
    assert len(hub.requests) - asked <= 2  # a look-up before and one at its turn, and no file


def test_a_model_that_was_found_is_not_lost_by_a_slow_answer_at_its_turn(
    sqlite_engine: Engine, start: Start, hub: HubServer
) -> None:
    hub.hang_seconds = 2.0
    register(sqlite_engine, own="org/tiny")
    with transaction(sqlite_engine) as session:
        base_models.get(session, "own").found_at = datetime.now(UTC)
    start(hub_seconds=0.5)
    while not hub.requests:
        time.sleep(0.02)
    hub.hang_seconds = 0.0  # for the files that follow
    assert settled(sqlite_engine, "own").status == ModelStatus.READY


def test_one_of_many_workers_probes_a_model_and_needs_no_bell(
    sqlite_engine: Engine, start: Start, model: Path
) -> None:
    with capture_logs() as logs:
        probers = [start(reaper_seconds=0.05) for _ in range(3)]
        register(sqlite_engine, tiny=model)
        assert settled(sqlite_engine, "tiny").status == ModelStatus.READY
        for prober in probers:
            prober.stop()
    assert [log["model"] for log in logs if log["event"] == "model_registered"] == ["tiny"]


def claimed(engine: Engine, name: str) -> str:
    while (claimed_by := row_of(engine, name).claimed_by) is None:
        time.sleep(0.02)
    return claimed_by


def test_a_worker_that_stops_leaves_its_models_to_the_next(
    sqlite_engine: Engine, model: Path, start: Start
) -> None:
    first = start()
    register(sqlite_engine, later=model)
    first.ring()
    assert claimed(sqlite_engine, "later") == "wrk_0"
    first.stop()
    left = row_of(sqlite_engine, "later")
    assert (left.status, left.claimed_by) == (ModelStatus.REGISTERING, None)
    start()
    assert claimed(sqlite_engine, "later") == "wrk_1"


def test_a_model_that_is_deleted_while_it_is_probed_stays_deleted(
    sqlite_engine: Engine, model: Path, start: Start
) -> None:
    prober = start(heartbeat_seconds=0.1)
    register(sqlite_engine, brief=model)
    prober.ring()
    claimed(sqlite_engine, "brief")
    with transaction(sqlite_engine) as session:
        base_models.delete_model(session, "brief")
    prober.stop()
    with transaction(sqlite_engine, read_only=True) as session:
        assert base_models.find(session, "brief") is None
