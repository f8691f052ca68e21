"""Passwords of any characters against a PostgreSQL and a Valkey that check them."""

import json
import logging
import traceback
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
import redis
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from psycopg import sql

from store import migrate
from store.configuration.sources import InvalidSettings
from store.database import create_engine_from
from store.errors import QueueUnavailable, StorageUnavailable
from store.inference import Mailbox
from store.parts import try_broker
from store.queue import Doorbell
from store.settings import Settings, load_settings
from store.tables import TablesOutdated, check_tables
from tests.services import Postgres

_LETTERS = "XZ79"
"""In no message of ours or of a driver next to each other, so that a piece of a password shows."""
_numbers = count()

PASSWORDS = st.text(st.sampled_from(f"/#@%:?&+=[]\\'\"`$!~*;,<>|^{{}} {_LETTERS}"), min_size=6)
EXAMPLES = [
    "XZ/#@%:79XZ",
    "XZ79%41XZ79",
    "p@XZ79/79XZ",
    ' XZ79"\\ ',
    "XZ79;XZ79",
    "XZ79' host=evil",
    "XZ79%(here)s%%",
    "ЖЩЮ\u00e9XZ79",
]
several = settings(
    max_examples=15,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@pytest.fixture(scope="module")
def role(postgres: Postgres) -> Iterator[str]:
    """A role that is asked for its password, and a database of the same name."""
    name = f"role_{next(_numbers)}"
    postgres.execute(sql.SQL("CREATE ROLE {} LOGIN").format(sql.Identifier(name)))
    postgres.create(name)
    yield name
    postgres.drop(name)
    postgres.execute(sql.SQL("DROP ROLE {}").format(sql.Identifier(name)))


@pytest.fixture
def secrets_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "secrets"
    folder.mkdir()
    monkeypatch.setenv("GRIT_HOME", str(tmp_path))
    monkeypatch.setenv("GRIT_SECRETS_FOLDER", str(folder))
    return folder


def set_password(postgres: Postgres, role: str, password: str) -> None:
    statement = sql.SQL("ALTER ROLE {} PASSWORD {}")
    postgres.execute(statement.format(sql.Identifier(role), sql.Literal(password)))


def connect(found: Settings) -> None:
    engine = create_engine_from(found)
    try:
        with pytest.raises(TablesOutdated, match="no tables"):
            check_tables(engine)
    finally:
        engine.dispose()


def connection_error() -> Exception | None:
    """Connect as the environment says, and return what kept us from it."""
    try:
        connect(load_settings())
    except (InvalidSettings, StorageUnavailable) as error:
        return error
    return None


def pieces(password: str) -> set[str]:
    """Return all that would tell four characters of a password, as text and as a line of JSON."""
    grams = {password[at : at + 4] for at in range(len(password) - 3)}
    telling = {each for each in grams if not set(_LETTERS).isdisjoint(each)}
    return telling | {json.dumps(each)[1:-1] for each in telling} | {quote(password, safe="")}


def assert_unseen(password: str, *texts: object) -> None:
    for text in texts:
        found = [each for each in pieces(password) if each in str(text)]
        assert not found, (found, text)


@pytest.mark.parametrize("password", EXAMPLES)
@pytest.mark.parametrize("place", ["file", "variable", "encoded"])
def test_a_database_password_connects_from_a_file_a_variable_and_an_encoded_url(
    place: str,
    password: str,
    postgres: Postgres,
    role: str,
    secrets_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    set_password(postgres, role, password)
    login = role
    if place == "file":
        (secrets_folder / "grit_database_password").write_text(f"{password}\n", encoding="utf-8")
    elif place == "variable":
        monkeypatch.setenv("GRIT_DATABASE_PASSWORD", password)
    else:
        login += f":{quote(password, safe='')}"
    url = f"postgres://{login}@127.0.0.1:{postgres.port}/{role}"
    monkeypatch.setenv("GRIT_DATABASE_URL", url)
    found = load_settings()
    connect(found)
    assert found.secrets() == [password]
    assert_unseen(password, repr(found), found.model_dump(exclude={"database_url"}))


@several
@given(password=PASSWORDS)
@example(password=EXAMPLES[0])
@example(password=EXAMPLES[1])
def test_any_database_password_connects_and_a_raw_one_in_a_url_does_or_is_refused_unseen(
    password: str, postgres: Postgres, role: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    set_password(postgres, role, password)
    server = f"127.0.0.1:{postgres.port}/{role}"
    values: dict[str, Any] = {"home": tmp_path, "database_url": f"postgresql://{role}@{server}"}
    connect(Settings(**values, database_password=password))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRIT_DATABASE_URL", f"postgresql://{role}:{password}@{server}")
        error = connection_error()
    if error is not None:
        assert "GRIT_DATABASE_PASSWORD" in str(error)
        assert "percent-encode" in str(error)
        assert_unseen(password, *traceback.format_exception(error))
    if isinstance(error, StorageUnavailable):
        assert "%" in password, "only an escape may be read as something else"
    assert_unseen(password, caplog.text)


def test_a_migration_runs_whatever_percent_signs_the_password_has(
    postgres: Postgres, role: str, tmp_path: Path
) -> None:
    password = "XZ79%(here)s%%/#@"
    set_password(postgres, role, password)
    statement = sql.SQL("ALTER DATABASE {} OWNER TO {}")
    postgres.execute(statement.format(sql.Identifier(role), sql.Identifier(role)))
    url = f"postgresql://{role}@127.0.0.1:{postgres.port}/{role}"
    engine = create_engine_from(
        Settings(home=tmp_path, database_url=url, database_password=password)
    )  # type: ignore[arg-type] # pydantic makes a secret of it
    migrate.upgrade(engine)
    assert check_tables(engine) is None
    migrate.downgrade(engine, "base")
    engine.dispose()


def test_a_wrong_database_password_is_refused_with_what_to_check(
    postgres: Postgres, role: str, tmp_path: Path
) -> None:
    set_password(postgres, role, "right")
    url = f"postgresql://{role}:wr0ngXZ79@127.0.0.1:{postgres.port}/{role}"
    engine = create_engine_from(Settings(home=tmp_path, database_url=url))
    with pytest.raises(StorageUnavailable, match="GRIT_DATABASE_PASSWORD") as refused:
        check_tables(engine)
    engine.dispose()
    assert not refused.value.passing
    assert_unseen("wr0ngXZ79", *traceback.format_exception(refused.value))


@several
@given(password=PASSWORDS)
@example(password=EXAMPLES[0])
@example(password=EXAMPLES[4])
def test_any_broker_password_reaches_the_mailbox_and_the_doorbell(
    password: str, valkey: str, tmp_path: Path
) -> None:
    client = redis.Redis.from_url(valkey)
    user = f"user{next(_numbers)}"
    client.acl_setuser(
        user, enabled=True, reset=True, keys=["*"], channels=["*"], categories=["+@all"],
        passwords=[f"+{password}"],
    )  # fmt: skip
    url = valkey.replace("//", f"//{user}@")
    try:
        found = Settings(home=tmp_path, broker_url=url, broker_password=password)  # type: ignore[arg-type] # pydantic makes a secret of it
        mailbox, doorbell = Mailbox(found), Doorbell(found)
        try_broker(mailbox)
        assert doorbell.ring("cpu")
        mailbox.close_sync()
        doorbell.close()
        wrong = Settings(home=tmp_path, broker_url=url, broker_password=f"{password}Z")  # type: ignore[arg-type] # as above
        mailbox = Mailbox(wrong)
        with pytest.raises(QueueUnavailable, match="check the user") as refused:
            try_broker(mailbox)
        mailbox.close_sync()
        assert_unseen(password, *traceback.format_exception(refused.value))
    finally:
        client.acl_deluser(user)
        client.close()
