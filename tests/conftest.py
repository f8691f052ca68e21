"""Real servers once a session; a fresh database, object prefix and queue prefix for every test."""

import os
import shutil
import time
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from sqlalchemy import Engine

from store import migrate
from store.database import create_engine_from
from store.objects import Objects
from store.settings import Settings
from tests.run_guard import start_guard
from tests.services import S3, Postgres, running_postgres, running_s3, running_valkey

if TYPE_CHECKING:
    from tests.accelerator import Accelerator

_TEMPLATE = "grit_template"
_numbers = count(1)
_SETTINGS = (
    *("GRIT_", "AWS_", "S3_", "OPENAI_", "HF_", "HUGGINGFACE_", "TRANSFORMERS_"),
    *("CELERY_", "UVICORN_", "WEB_CONCURRENCY", "FORWARDED_ALLOW_IPS", "PG", "REDIS_", "XDG_"),
    *("NO_COLOR", "FORCE_COLOR", "CLICOLOR", "COLUMNS", "LINES", "_TYPER_"),
)
"""Beginnings of variables that the service, its libraries or the command line read."""
_PROXIES = ("http_proxy", "https_proxy", "all_proxy", "ftp_proxy", "no_proxy")


def pytest_configure() -> None:
    """Let no setting of the machine reach a test, and no process outlive the run."""
    for name in list(os.environ):
        if name.startswith(_SETTINGS) or name.lower() in _PROXIES:
            del os.environ[name]
    os.environ["TZ"] = "UTC"
    time.tzset()
    start_guard()


def pytest_collection_finish(session: pytest.Session) -> None:
    """Register the simulated accelerator before any test goes backward.

    torch starts its autograd threads with the first backward pass of the process, one for each
    device that is registered by then.
    """
    if any("accelerator" in getattr(item, "fixturenames", ()) for item in session.items):
        from tests.accelerator import install  # noqa: PLC0415 - loads torch

        install()


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    """A PostgreSQL whose template database holds our tables."""
    with running_postgres() as server:
        url = server.create(_TEMPLATE)
        engine = create_engine_from(Settings(database_url=url))
        migrate.upgrade(engine)
        engine.dispose()
        yield server


@pytest.fixture(scope="session")
def sqlite_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SQLite file that holds our tables."""
    file = tmp_path_factory.mktemp("template") / "grit.db"
    engine = create_engine_from(Settings(database_url=f"sqlite:///{file}"))
    migrate.upgrade(engine)
    engine.dispose()
    return file


@pytest.fixture(scope="session")
def valkey() -> Iterator[str]:
    """The URL of a Valkey."""
    with running_valkey() as url:
        yield url


@pytest.fixture(scope="session")
def s3() -> Iterator[S3]:
    """An S3 server with one bucket."""
    with running_s3() as server:
        yield server


@pytest.fixture
def sqlite_url(sqlite_template: Path, tmp_path: Path) -> str:
    """A fresh SQLite database."""
    file = tmp_path / "grit.db"
    shutil.copyfile(sqlite_template, file)
    return f"sqlite:///{file}"


@pytest.fixture
def postgres_url(postgres: Postgres) -> Iterator[str]:
    """A fresh PostgreSQL database."""
    name = f"test_{os.getpid()}_{next(_numbers)}"
    yield postgres.create(name, template=_TEMPLATE)
    postgres.drop(name)


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest) -> str:
    """A fresh database of each kind, so that a test runs on both."""
    return str(
        request.getfixturevalue("sqlite_url" if request.param == "sqlite" else "postgres_url")
    )


@pytest.fixture
def engine(database_url: str, tmp_path: Path) -> Iterator[Engine]:
    """An engine for a fresh database of each kind."""
    settings = Settings(home=tmp_path, database_url=database_url, pool_size=20)
    made = create_engine_from(settings)
    yield made
    made.dispose()


@pytest.fixture
def sqlite_engine(embedded_settings: Settings) -> Iterator[Engine]:
    """An engine for the embedded settings."""
    made = create_engine_from(embedded_settings)
    yield made
    made.dispose()


@pytest.fixture
def queue_prefix() -> str:
    """A part of the broker of this test's own."""
    return f"test-{os.getpid()}-{next(_numbers)}:"


@pytest.fixture
def embedded_settings(sqlite_url: str, valkey: str, queue_prefix: str, tmp_path: Path) -> Settings:
    """One machine: a SQLite file, a folder of objects, a Valkey."""
    return Settings(
        home=tmp_path,
        database_url=sqlite_url,
        broker_url=valkey,
        queue_prefix=queue_prefix,
        allowed_models=["*"],
    )


@pytest.fixture
def production_settings(
    postgres_url: str, valkey: str, s3: S3, queue_prefix: str, tmp_path: Path
) -> Settings:
    """Several machines: PostgreSQL, S3, a Valkey."""
    return Settings(
        home=tmp_path,
        database_url=postgres_url,
        objects_url=f"s3://{s3.bucket}/{queue_prefix.rstrip(':')}",
        s3_endpoint=s3.endpoint,
        s3_access_key_id=s3.access_key_id,
        s3_secret_access_key=s3.secret_access_key,
        broker_url=valkey,
        queue_prefix=queue_prefix,
        allowed_models=["*"],
    )


@pytest.fixture(params=["file", "s3"])
def objects(request: pytest.FixtureRequest, tmp_path: Path) -> Objects:
    """A fresh object store of each kind."""
    if request.param == "file":
        return Objects(Settings(home=tmp_path))
    server: S3 = request.getfixturevalue("s3")
    return Objects(
        Settings(
            home=tmp_path,
            objects_url=f"s3://{server.bucket}/test-{os.getpid()}-{next(_numbers)}",
            s3_endpoint=server.endpoint,
            s3_access_key_id=server.access_key_id,
            s3_secret_access_key=server.secret_access_key,
            objects_retry_seconds=5,
        )
    )


@pytest.fixture
def accelerator(monkeypatch: pytest.MonkeyPatch) -> Iterator["Accelerator"]:
    """Give this process a simulated accelerator, the device `sim` (see `tests.accelerator`)."""
    from tests.accelerator.fixtures import present  # noqa: PLC0415 - loads torch

    with present(monkeypatch) as card:
        yield card
